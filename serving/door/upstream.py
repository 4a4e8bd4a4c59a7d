"""The tritonservers behind the door: which are well, which is asked next, and one more try where one fails."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from vilu.errors import UserError
from vilu.serving.address import grpc_options, parse_url
from vilu.serving.async_client import EMBEDDINGS
from vilu.serving.door.check import tensors
from vilu.serving.door.limits import Limits
from vilu.serving.door.observe import Metrics
from vilu.serving.door.refused import NO_ANSWER, NOT_NOW, UNAVAILABLE, Refused
from vilu.serving.server import PROBE_IMAGE

logger = logging.getLogger(__name__)
SERVICE = "inference.GRPCInferenceService"
Metadata = Sequence[tuple[str, str]]
FRESH_SECONDS = 5.0  # a model's configuration is asked for anew after so long: versions change while the server runs
PROBE_SECONDS, PROBE_TIMEOUT = 3.0, 2.0  # a server that stops answering is left out within 10 s
GIVEN_UP_SECONDS = 60.0  # past its time, until a question that tritonserver does not answer is cancelled there
FAILURES = 2  # probes in a row without an answer: the server is not well
# What tritonserver says when a model's process has died (INTERNAL): asked again elsewhere, or after the restart.
STUB_DIED = "is not healthy"


class Upstream:
    """One tritonserver.

    Args:
        url: its gRPC, HOST:PORT or grpcs://HOST:PORT.
        secrets: metadata that every call carries.
        ca: PEM of who signed its certificate, for grpcs://.
    """

    def __init__(self, url: str, secrets: Metadata = (), ca: bytes | None = None) -> None:
        server = parse_url(url)
        if server.http:
            raise UserError(f"{url}: expected HOST:PORT of a server's gRPC")
        self.url, self.secrets = url, list(secrets)
        self.server, self.ca = server, ca
        self.channel: grpc.aio.Channel | None = None  # belongs to the event loop of the first call
        self.calls: dict[str, Any] = {}
        self.sent = 0  # questions under way
        self.well = False  # it has answered, and its probes do
        self.answered_at = float("-inf")
        self.failures = 0
        self.proven = False  # it has been well
        self.fault = ""  # why the last probe failed
        self.probing: asyncio.Task[bytes] | None = None
        self.missed: list[bytes] = []  # changes that it has yet to be given

    async def call(self, method: str, data: bytes, timeout: float, metadata: Metadata = ()) -> bytes:
        """Raises grpc.aio.AioRpcError."""
        if self.channel is None:
            self.channel = self._connect()
        if method not in self.calls:
            self.calls[method] = self.channel.unary_unary(f"/{SERVICE}/{method}")
        return await self.calls[method](data, metadata=[*self.secrets, *metadata], timeout=timeout)

    def _connect(self) -> grpc.aio.Channel:
        times = {"max_reconnect_backoff": 500, "initial_reconnect_backoff": 100, "min_reconnect_backoff": 100}
        options = [*grpc_options(self.server.host), *((f"grpc.{name}_ms", value) for name, value in times.items())]
        options += [("grpc.use_local_subchannel_pool", 1), ("grpc.max_metadata_size", 16 << 10)]
        if self.server.tls:
            credentials = grpc.ssl_channel_credentials(self.ca)
            return grpc.aio.secure_channel(self.server.target, credentials, options=options)
        return grpc.aio.insecure_channel(self.server.target, options=options)

    async def probe(self, data: bytes) -> None:
        """Ask a question, unless one was answered lately, and note whether the server is well.

        A probe without an answer is not cancelled (2.51 can fail at that); the next one waits for the same answer.
        """
        if self.well and time.monotonic() - self.answered_at < PROBE_SECONDS:
            return
        if self.probing is None or self.probing.done():
            self.probing = asyncio.create_task(self._ask_probe(data))
            self.probing.add_done_callback(_taken)  # a door that ends meanwhile asks for no result
        await asyncio.wait({self.probing}, timeout=PROBE_TIMEOUT)
        try:
            if not self.probing.done():
                raise _Silent(f"no answer in {PROBE_TIMEOUT:g} s")
            self.probing.result()
        except (grpc.aio.AioRpcError, _Silent) as error:
            if "protocol is restricted" in str(error):  # it wants the clients' own token, and says so
                self.answered()
                return
            # Questions answered meanwhile are as good as the probe's.
            if self.well and time.monotonic() - self.answered_at < PROBE_SECONDS + PROBE_TIMEOUT:
                return
            self.fault = error.details() or "" if isinstance(error, grpc.aio.AioRpcError) else str(error)
            self.failures += 1
            if self.failures >= FAILURES or not isinstance(error, _Silent):
                self.well = False
            return
        self.answered()

    async def _ask_probe(self, data: bytes) -> bytes:
        """Ask the probe's question; a server of a head alone, which has no `vilu`, is asked about one embedding."""
        try:
            return await self.call("ModelInfer", data, GIVEN_UP_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            request = pb.ModelConfigRequest(name=EMBEDDINGS).SerializeToString()
            try:
                reply = await self.call("ModelConfig", request, GIVEN_UP_SECONDS)
            except grpc.aio.AioRpcError:
                raise error from None
            inputs = tensors(pb.ModelConfigResponse.FromString(reply).config)["inputs"]
            _, (width,), _ = inputs["IMAGE_EMBEDDING"]
            return await self.call("ModelInfer", embedding_question(width).SerializeToString(), GIVEN_UP_SECONDS)

    def answered(self) -> None:
        self.answered_at, self.failures = time.monotonic(), 0
        self.well = True


class Upstreams:
    """All of them as one server: the one with the fewest questions under way is asked next.

    Args:
        upstreams: at least one.
        limits: `sent` questions at most are under way at each; others wait here, first come, first served.
    """

    def __init__(self, upstreams: Sequence[Upstream], limits: Limits, metrics: Metrics) -> None:
        self.all, self.limits, self.metrics = list(upstreams), limits, metrics
        self.waiting: deque[asyncio.Future[Upstream]] = deque()
        self.configs: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}
        self.changing = asyncio.Lock()
        self.work: set[asyncio.Task[bytes]] = set()

    @property
    def well(self) -> bool:
        return any(upstream.well for upstream in self.all)

    async def watch(self) -> None:
        """Probe every server for ever."""
        data = probe_question().SerializeToString()
        while True:
            await asyncio.gather(*(self._probe(upstream, data) for upstream in self.all))
            await asyncio.sleep(0.2 if not self.well else PROBE_SECONDS / 2)

    async def _probe(self, upstream: Upstream, data: bytes) -> None:
        before = upstream.well
        await upstream.probe(data)
        if upstream.well and upstream.missed:
            await self._catch_up(upstream)
        if upstream.well != before:
            said = "answers" if upstream.well else f"does not answer; it is left out ({upstream.fault})"
            logger.log(logging.WARNING if upstream.proven else logging.INFO, "%s: %s", upstream.url, said)
            upstream.proven = True
        self._hand_out()

    async def ask(self, method: str, data: bytes, end: float, metadata: Metadata = ()) -> bytes:
        """The reply of the server that has least to do; asked once more where it fails before it has answered.

        A caller that is cancelled or whose time is over while the question waits has it dropped; once it is sent,
        nobody tells tritonserver (2.51 can fail at a cancelled request), and its reply is thrown away.

        Raises:
            Refused: no answer by `end` (time.monotonic), no server, or what the server said.
        """
        for attempt in (1, 2):
            upstream = await self._slot(end)
            task = asyncio.create_task(upstream.call(method, data, self.limits.timeout + GIVEN_UP_SECONDS, metadata))
            self.work.add(task)
            task.add_done_callback(partial(self._done, upstream))
            done, _ = await asyncio.wait({task}, timeout=max(0.0, end - time.monotonic()))
            if not done:
                raise Refused("no answer in time", NO_ANSWER)
            try:
                return task.result()
            except grpc.aio.AioRpcError as error:
                if attempt == 2 or not _again(error):
                    raise Refused.of(error) from None
                self.metrics.retries.inc()
        raise AssertionError("unreachable")

    def _done(self, upstream: Upstream, task: asyncio.Task[bytes]) -> None:
        self.work.discard(task)
        upstream.sent -= 1
        error = None if task.cancelled() else task.exception()
        if error is None:
            upstream.answered()
        elif isinstance(error, grpc.aio.AioRpcError) and _gone(error):
            upstream.well = False  # until a probe finds it well again
        self._hand_out()

    async def _slot(self, end: float) -> Upstream:
        free = self._free()
        if free is not None and not self.waiting:
            free.sent += 1
            return free
        ticket: asyncio.Future[Upstream] = asyncio.get_running_loop().create_future()
        self.waiting.append(ticket)
        try:
            await asyncio.wait({ticket}, timeout=max(0.0, end - time.monotonic()))
            if ticket.done():
                return ticket.result()
            if self.well:
                raise Refused("no answer in time", NO_ANSWER)
            raise Refused("no server answers", UNAVAILABLE)
        except asyncio.CancelledError:
            if ticket.done():  # handed out in this very moment
                ticket.result().sent -= 1
                self._hand_out()
            raise
        finally:
            if not ticket.done():
                self.waiting.remove(ticket)

    def _free(self) -> Upstream | None:
        free = [upstream for upstream in self.all if upstream.well and upstream.sent < self.limits.sent]
        return min(free, key=lambda upstream: upstream.sent, default=None)

    def _hand_out(self) -> None:
        while self.waiting and (free := self._free()) is not None:
            ticket = self.waiting.popleft()
            if not ticket.done():
                free.sent += 1
                ticket.set_result(free)

    async def config(self, name: str, end: float, metadata: Metadata = (), version: str = "") -> dict[str, Any]:
        """What `tensors` makes of a model's configuration, a few seconds old at most. Raises Refused as `ask`."""
        at, config = self.configs.get((name, version), (0.0, {}))
        if not config or time.monotonic() - at > FRESH_SECONDS:
            request = pb.ModelConfigRequest(name=name, version=version).SerializeToString()
            config = tensors(
                pb.ModelConfigResponse.FromString(await self.ask("ModelConfig", request, end, metadata)).config
            )
            self.configs[name, version] = time.monotonic(), config
        return config

    async def change(self, method: str, data: bytes, end: float, metadata: Metadata = ()) -> bytes:
        """Load or unload a model everywhere or nowhere.

        It is refused unless every server is well. The first server's refusal is everybody's. A server that fails
        after the first took the change is left out until it has taken it, too.

        Raises:
            Refused: as `ask`, or a server that is not well.
        """
        async with self.changing:
            ill = [upstream.url for upstream in self.all if not upstream.well or upstream.missed]
            if ill:
                raise Refused(f"a change needs every server, but {ill[0]} does not answer", NOT_NOW)
            first, *others = self.all
            left = max(1.0, end - time.monotonic())
            try:
                reply = await first.call(method, data, left, metadata)
            except grpc.aio.AioRpcError as error:
                raise Refused.of(error) from None
            finally:
                self.configs.clear()
            for upstream in others:
                upstream.missed.append(data)
                upstream.well = False
                await self._catch_up(upstream, method, metadata)
            return reply

    async def _catch_up(self, upstream: Upstream, method: str = "RepositoryModelLoad", metadata: Metadata = ()) -> None:
        """Give a server the changes it has missed; it is well again once it has them all."""
        while upstream.missed:
            try:
                await upstream.call(method, upstream.missed[0], self.limits.timeout, metadata)
            except grpc.aio.AioRpcError as error:
                logger.warning("%s: has yet to take a change: %s", upstream.url, error.details())
                upstream.well = False
                return
            upstream.missed.pop(0)
        upstream.answered()
        self._hand_out()

    async def close(self) -> None:
        """Wait a moment for what is under way, then close the channels."""
        if self.work:
            await asyncio.wait(self.work, timeout=5)
        for upstream in self.all:
            if upstream.channel is not None:
                await upstream.channel.close()


class _Silent(Exception):  # noqa: N818
    """A probe has no answer yet."""


def probe_question() -> pb.ModelInferRequest:
    """A question about an image of one pixel, which goes through every step of the ensemble."""
    request = pb.ModelInferRequest(model_name="vilu")
    request.inputs.add(name="IMAGE", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(len(PROBE_IMAGE).to_bytes(4, "little") + PROBE_IMAGE)
    return request


def embedding_question(width: int) -> pb.ModelInferRequest:
    """A question about one embedding of this width."""
    request = pb.ModelInferRequest(model_name=EMBEDDINGS)
    request.inputs.add(name="IMAGE_EMBEDDING", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(struct.pack("<f", 1.0) * width)
    return request


def _taken(task: asyncio.Task[bytes]) -> None:
    """Take a task's error, so that asyncio does not print it where nobody waits for the task any more."""
    if not task.cancelled():
        task.exception()


def _gone(error: grpc.aio.AioRpcError) -> bool:
    """Whether the connection or a model's process failed, not the question."""
    if error.code() == grpc.StatusCode.INTERNAL:
        return STUB_DIED in (error.details() or "")
    text = (error.details() or "").lower()
    return error.code() == grpc.StatusCode.UNAVAILABLE and any(
        word in text for word in ("connect", "socket", "goaway", "end of tcp", "recvmsg", "transport", "reset")
    )


def _again(error: grpc.aio.AioRpcError) -> bool:
    return _gone(error) or error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
