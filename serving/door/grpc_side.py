"""The door's gRPC: KServe v2, grpc.health.v1 and reflection. Messages pass as bytes.

Every method takes its request as a stream, so that a client's token and the limits are looked at before the message is
read, and a slow sender's time is the door's to bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2 as pb

from vilu.errors import UserError
from vilu.serving.address import join_host_port, listen
from vilu.serving.door.check import parsed
from vilu.serving.door.core import CHANGES, QUESTIONS, Core
from vilu.serving.door.observe import Seen
from vilu.serving.door.refused import FAILED, MALFORMED, RETRY_SECONDS, STOPPING, TOO_SLOW, Refused
from vilu.serving.door.upstream import SERVICE
from vilu.serving.tokens import GRPC_PREFIX

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
GONE_SECONDS = 0.2  # until gRPC cancels the handler of a client that has left, after it says that there is no message
# What feedback names, as a header and in trailing metadata; there only where the reply does not have it.
ANSWER_ID = "vilu-answer-id"
CHANGE_SECONDS = 600.0  # that a model may take to load


class GrpcSide:
    """Use: `async with GrpcSide(core).serving(host, port) as bound: ...`."""

    def __init__(self, core: Core) -> None:
        self.core, self.limits = core, core.limits

    @contextlib.asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncIterator[int]:
        """Listen; gives the port. Raises UserError where it cannot be listened on."""
        limits = self.limits
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", limits.header_bytes),
                ("grpc.absolute_max_metadata_size", limits.header_bytes),
                ("grpc.max_concurrent_streams", limits.per_connection),
                ("grpc.max_allowed_incoming_connections", limits.connections),
                ("grpc.server_handshake_timeout_ms", int(1e3 * limits.header_seconds)),
                ("grpc.max_connection_idle_ms", int(1e3 * limits.idle_seconds)),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.so_reuseport", 0),
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is sent is as large as it says
                ("grpc.http2.bdp_probe", 0),  # an unread message keeps its sender waiting, in 64 KiB
            ],
        )
        methods = ["ServerLive", "ServerReady", "ServerMetadata", *QUESTIONS, *CHANGES, "RepositoryIndex", "ModelInfer"]
        handlers = {name: grpc.stream_unary_rpc_method_handler(self._handler(name)) for name in methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(_Health(self.core), server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        listen(host, port).close()  # gRPC would say more than one line
        address, credentials = join_host_port(host, port), self.core.keys.tls_for_grpc()
        try:
            bound = (
                server.add_insecure_port(address)
                if credentials is None
                else server.add_secure_port(address, credentials)
            )
        except RuntimeError as error:
            raise UserError(f"cannot listen on {address} ({error})") from None
        await server.start()
        try:
            yield bound
        finally:
            await server.stop(grace=5)

    def _handler(self, method: str) -> Any:
        async def handle(_: Any, context: grpc.aio.ServicerContext) -> bytes:
            headers = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
            seen = self.core.seen("grpc", _peer(context.peer()), method, headers)
            try:
                if self.core.stopping:
                    raise Refused("the server is stopping", STOPPING)
                reply = await self._answer(method, headers, seen, context)
            except Refused as error:
                self.core.observer.done(seen, error.kind.grpc.name, error.kind.reason, str(error))
                trailers = (("retry-after", str(RETRY_SECONDS)),) if error.kind.http == 503 else ()
                await context.abort(error.kind.grpc, str(error), trailers)
            except asyncio.CancelledError:
                self.core.observer.done(seen, "CANCELLED")
                raise
            else:
                self.core.observer.done(seen, "ok")
                if seen.answer_id and not seen.in_reply:
                    context.set_trailing_metadata(((ANSWER_ID, seen.answer_id),))
                return reply
            raise AssertionError("abort raises")

        return handle

    async def _answer(self, method: str, headers: dict[str, str], seen: Seen, context: Any) -> bytes:
        core = self.core
        end = core.end(context.time_remaining())
        metadata = core.metadata(headers, GRPC_PREFIX)
        if method == "ModelInfer":
            core.authenticate(seen, headers, GRPC_PREFIX)
            data = await self._read(context, seen)
            seen.bytes_in = len(data)
            return await core.infer(data, seen, end, metadata)
        if method in CHANGES or method == "RepositoryIndex":
            core.authorize_change(headers, GRPC_PREFIX)
        data = await self._read(context, seen)
        seen.bytes_in = len(data)
        if method == "ServerLive":
            return pb.ServerLiveResponse(live=True).SerializeToString()
        if method == "ServerReady":
            return pb.ServerReadyResponse(ready=core.ready).SerializeToString()
        if method in QUESTIONS:
            return await core.describe(method, data, seen, end, metadata)
        if method in CHANGES:
            left = context.time_remaining()
            end = time.monotonic() + (CHANGE_SECONDS if left is None else min(left, CHANGE_SECONDS))
            return await core.change(method, data, seen, end, metadata)
        parsed(pb.ServerMetadataRequest if method == "ServerMetadata" else pb.RepositoryIndexRequest, data)
        return await core.upstreams.ask(method, data, end, metadata)

    async def _read(self, context: Any, seen: Seen) -> bytes:
        async def read() -> Any:
            async with self.core.arriving(seen.peer):
                return await context.read()

        # Not wait_for: before Python 3.12 it loses a cancellation that comes with the end of the stream.
        reading = asyncio.create_task(read())
        try:
            done, _ = await asyncio.wait({reading}, timeout=self.limits.body_seconds)
            if not done:
                raise Refused(f"the request did not arrive in {self.limits.body_seconds:g} s", TOO_SLOW)
            data = reading.result()
        except (Refused, grpc.aio.UsageError):
            raise
        except Exception as error:
            await asyncio.sleep(GONE_SECONDS)
            raise Refused(f"the request could not be read ({error})", FAILED) from None
        finally:
            if not reading.cancel() and not reading.cancelled():
                reading.exception()  # asyncio logs one that nobody looks at
        if data is grpc.aio.EOF:
            await asyncio.sleep(GONE_SECONDS)
            raise Refused("the request has no message", MALFORMED)
        return data


def _peer(peer: str) -> str:
    """gRPC's "ipv4:127.0.0.1:1234" or "ipv6:%5B::1%5D:1234" as the address alone."""
    return peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "")


class _Health(health_pb2_grpc.HealthServicer):
    """grpc.health.v1, from the door's own last question; a service is "", the protocol's name or `vilu`."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def _status(self) -> int:
        return SERVING if self.core.ready else NOT_SERVING

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        if request.service not in ("", SERVICE, "vilu"):
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return health_pb2.HealthCheckResponse(status=self._status())

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        before = None
        while True:
            status = self._status() if request.service in ("", SERVICE, "vilu") else 3  # SERVICE_UNKNOWN
            if status != before:
                yield health_pb2.HealthCheckResponse(status=status)
                before = status
            await asyncio.sleep(0.5)
