"""`vilu guard`: a gRPC front that lets only whole, well-formed questions through to a tritonserver.

tritonserver trusts its clients in ways that no setting changes: a request that asks for a string output as classes ends
it (2.51; mended in July 2025), a batch dimension of 0 or a string longer than its bytes fails the whole batch it rides
in (every version), an unread stream is kept in memory, and all models can be asked, those inside an ensemble, too.
Behind this it listens on loopback; here a request is read, held against the model's own configuration, and only then
sent on, byte for byte. Streams, shared memory, statistics and everything that changes the server are not offered.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator, Mapping
from math import prod
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from vilu.errors import UserError
from vilu.serving.access import Access, listen
from vilu.serving.client import GRPC_HEADER, TOKEN

SERVICE = "inference.GRPCInferenceService"
# What people ask; the models within the ensembles are not among them.
MODELS = ("vilu", "vilu_open", "vilu_embeddings", "vilu_text", "vilu_full", "class_sets")
ASKED = {"ServerLive": pb.ServerLiveRequest, "ServerReady": pb.ServerReadyRequest,
         "ServerMetadata": pb.ServerMetadataRequest, "ModelReady": pb.ModelReadyRequest,
         "ModelMetadata": pb.ModelMetadataRequest, "ModelConfig": pb.ModelConfigRequest}  # fmt: skip
HEADERS = (GRPC_HEADER + TOKEN, "traceparent")  # handed on
# Bytes of an element, and the field of typed contents (where a client sends no raw ones).
BYTES_OF = {"BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "INT32": 4, "UINT32": 4, "FP32": 4,
            "INT64": 8, "UINT64": 8, "FP64": 8}  # fmt: skip
CONTENTS = {"BOOL": "bool", "UINT8": "uint", "UINT16": "uint", "UINT32": "uint", "INT8": "int", "INT16": "int",
            "INT32": "int", "UINT64": "uint64", "INT64": "int64", "FP32": "fp32", "FP64": "fp64",
            "BYTES": "bytes"}  # fmt: skip
MOST_ELEMENTS = 1 << 26  # of one tensor; also keeps every product of dimensions small
MOST_STRINGS = 200_000  # of one tensor: 100 images with 1,000 labels each, and as many again
LONGEST_NAME = 256  # bytes of a request's id and of what it names
FRESH_SECONDS = 5.0  # a model's configuration is asked for anew after so long: versions change while the server runs


class Refused(Exception):  # noqa: N818  it is told, not raised to callers
    """A request that is not let through: gRPC's code and one line."""

    def __init__(self, told: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> None:
        super().__init__(told)
        self.code = code


def check(request: pb.ModelInferRequest, model: Mapping[str, Any]) -> None:
    """Let only what the model can take pass, whatever else is in the batch.

    Args:
        model: what `tensors` made of the asked model's configuration.

    Raises:
        Refused: what is wrong with the request, in one line.
    """
    if len(request.id.encode()) > LONGEST_NAME or "\0" in request.id:
        raise Refused(f"the request's id is longer than {LONGEST_NAME} bytes or holds a NUL")
    if "class_set" in request.parameters and "CLASS_SET" not in model["outputs"]:
        raise Refused("class_set: this model has the exported classes alone")
    _parameters(request.parameters)
    _inputs(request, model)
    asked = [output.name for output in request.outputs]
    for output in request.outputs:
        if output.name not in model["outputs"]:
            raise Refused(f"there is no output {output.name[:64]!r}")
        if output.parameters:
            raise Refused(f"output {output.name}: parameters (classes, shared memory) are not taken here")
    if len(set(asked)) < len(asked):
        raise Refused("an output is asked for twice")


def parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise Refused(f"not a {kind.DESCRIPTOR.name}") from None


def named(request: Any) -> str:
    """The model a request names. Raises Refused: none that may be asked, or a version that is no number."""
    name = request.model_name if hasattr(request, "model_name") else request.name
    version = request.model_version if hasattr(request, "model_version") else request.version
    if name not in MODELS:
        raise Refused(f"there is no model {name[:64]!r} here", grpc.StatusCode.NOT_FOUND)
    if version and not (version.isascii() and version.isdecimal() and len(version) <= 9):
        raise Refused(f"a version is a number, not {version[:64]!r}")
    return str(name)


def _parameters(parameters: Mapping[str, Any]) -> None:
    for key, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if key == "class_set" and kind == "string_param":
            if len(value.string_param) > LONGEST_NAME or "\0" in value.string_param:
                raise Refused("class_set: not a name")
        elif key == "timeout" and kind == "int64_param":
            if value.int64_param < 0:
                raise Refused("timeout: microseconds, not below 0")
        else:
            raise Refused(f"parameter {key[:64]!r}: only class_set (a string) and timeout (an int64) are taken here")


def _inputs(request: pb.ModelInferRequest, model: Mapping[str, Any]) -> None:
    given = [tensor.name for tensor in request.inputs]
    if len(set(given)) < len(given):
        raise Refused("an input is there twice")
    missing = [name for name, (*_, optional) in model["inputs"].items() if not optional and name not in given]
    if missing:
        raise Refused(f"input {missing[0]} is missing")
    if request.raw_input_contents and len(request.raw_input_contents) != len(given):
        raise Refused(f"{len(given)} inputs, but the contents of {len(request.raw_input_contents)}")
    images = set()
    for i, tensor in enumerate(request.inputs):
        if tensor.name not in model["inputs"]:
            raise Refused(f"there is no input {tensor.name[:64]!r}")
        if tensor.parameters:
            raise Refused(f"input {tensor.name}: parameters (shared memory) are not taken here")
        kind, dims, _ = model["inputs"][tensor.name]
        if tensor.datatype != kind:
            raise Refused(f"input {tensor.name}: {kind} is wanted, not {tensor.datatype[:64]!r}")
        shape = list(tensor.shape)
        if model["batch"]:
            dims = [-1, *dims]
            if shape and not 1 <= shape[0] <= model["batch"]:
                raise Refused(f"input {tensor.name}: 1 to {model['batch']} rows are taken, not {shape[0]}")
            images.update(shape[:1])
        if len(shape) != len(dims) or not all(n >= 1 and d in (-1, n) for n, d in zip(shape, dims, strict=True)):
            raise Refused(f"input {tensor.name}: shape {shape[:8]} is not {dims} (-1: any, but not none)")
        elements = prod(shape)
        if elements > MOST_ELEMENTS:
            raise Refused(f"input {tensor.name}: more than {MOST_ELEMENTS} elements")
        typed = {field.name: len(values) for field, values in tensor.contents.ListFields()}
        if request.raw_input_contents:
            if typed:
                raise Refused(f"input {tensor.name}: raw contents and typed ones")
            _raw(tensor, elements, request.raw_input_contents[i])
        elif typed != {f"{CONTENTS.get(kind)}_contents": elements}:
            raise Refused(f"input {tensor.name}: its contents are not {elements} values of {kind}")
    if len(images) > 1:
        raise Refused("the inputs have different numbers of rows")


def _raw(tensor: Any, elements: int, data: bytes) -> None:
    """Refuse raw contents that are not so many elements."""
    if tensor.datatype != "BYTES":
        if len(data) != elements * BYTES_OF[tensor.datatype]:
            raise Refused(f"input {tensor.name}: {len(data)} bytes are not {elements} values of {tensor.datatype}")
        return
    if elements > MOST_STRINGS:
        raise Refused(f"input {tensor.name}: more than {MOST_STRINGS} strings")
    at = 0
    for _ in range(elements):
        if at + 4 > len(data):
            break
        at += 4 + struct.unpack_from("<I", data, at)[0]
    else:
        if at == len(data):
            return
    raise Refused(f"input {tensor.name}: its bytes are not {elements} whole strings")


def tensors(config: Any) -> dict[str, Any]:
    """What `check` needs of a ModelConfig: batch (0: none), inputs -> (type, dims, optional), outputs."""
    kind = type(config).DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
    short = {number: value.name.removeprefix("TYPE_") for number, value in kind.values_by_number.items()}
    inputs = {
        one.name: ("BYTES" if short[one.data_type] == "STRING" else short[one.data_type], list(one.dims), one.optional)
        for one in config.input
    }
    return {"batch": config.max_batch_size, "inputs": inputs, "outputs": {one.name for one in config.output}}


class Guard:
    """The front. Use: `async with guard.serving(host, port): ...`.

    Args:
        url: HOST:PORT of the server's gRPC.
        access: TLS files of the front itself; tokens are the server's, and handed on.
        in_flight: requests at a time; more are told UNAVAILABLE at once.
        max_request_bytes: larger messages are told RESOURCE_EXHAUSTED.
        timeout: seconds for a client that gives no deadline, and at most.
    """

    def __init__(
        self, url: str, *, access: Access | None = None, in_flight: int = 128, max_request_bytes: int = 64 << 20,
        timeout: float = 60.0,
    ) -> None:  # fmt: skip
        self.access, self.most, self.timeout = access or Access(), in_flight, timeout
        self.max_request_bytes = max_request_bytes
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(url, options=options)
        self.calls = {name: self.channel.unary_unary(f"/{SERVICE}/{name}") for name in (*ASKED, "ModelInfer")}
        self.active: set[asyncio.Future[bytes]] = set()
        self.configs: dict[str, tuple[float, dict[str, Any]]] = {}

    @contextlib.asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncIterator[int]:
        """Listen; gives the port. Raises UserError: it cannot be listened on."""
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self.max_request_bytes),
                ("grpc.so_reuseport", 0),
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is sent is as large as it says
                ("grpc.max_connection_idle_ms", 600_000),
                ("grpc.keepalive_time_ms", 60_000),
            ],
            # Above it a call is refused before its message is read, which bounds the memory that messages take.
            maximum_concurrent_rpcs=2 * self.most,
        )
        handlers = {name: grpc.unary_unary_rpc_method_handler(self._front(name)) for name in self.calls}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        listen(host, port).close()  # gRPC would say more than one line
        try:
            if self.access.tls_cert is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, _credentials(self.access))
        except RuntimeError as error:
            raise UserError(f"cannot listen on {address} ({error})") from None
        await server.start()
        try:
            yield bound
        finally:
            await server.stop(grace=5)
            await self.channel.close()

    def _front(self, method: str) -> Any:
        async def answer(data: bytes, context: Any) -> bytes:
            try:
                if method == "ModelInfer":
                    return await self._infer(data, context)
                request = parsed(ASKED[method], data)
                if method.startswith("Model"):
                    named(request)
                return await self._ask(method, data, context)
            except Refused as error:
                await context.abort(error.code, str(error))
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "")
            raise AssertionError("abort raises")

        return answer

    async def _infer(self, data: bytes, context: Any) -> bytes:
        if len(self.active) >= self.most:
            raise Refused(f"{self.most} requests are under way", grpc.StatusCode.UNAVAILABLE)
        request = parsed(pb.ModelInferRequest, data)
        check(request, await self._config(named(request), context))
        return await self._ask("ModelInfer", data, context)

    async def _ask(self, method: str, data: bytes, context: Any) -> bytes:
        """Send on; the server is never told that a client has gone: tritonserver 2.51 can fail at that, and its queues
        drop what is too old."""
        left = context.time_remaining()
        timeout = self.timeout if left is None else min(self.timeout, left)
        sent = [(key, value) for key, value in context.invocation_metadata() if key in HEADERS]
        task = asyncio.ensure_future(self.calls[method](data, metadata=sent, timeout=self.timeout))
        self.active.add(task)
        task.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.shield(task), timeout)
        except asyncio.TimeoutError:
            raise Refused("no answer in time", grpc.StatusCode.DEADLINE_EXCEEDED) from None

    def _done(self, task: asyncio.Future[bytes]) -> None:
        self.active.discard(task)
        if not task.cancelled():
            task.exception()  # a client that has gone does not fetch it

    async def _config(self, name: str, context: Any) -> dict[str, Any]:
        at, config = self.configs.get(name, (0.0, {}))
        if not config or time.monotonic() - at > FRESH_SECONDS:
            reply = await self._ask("ModelConfig", pb.ModelConfigRequest(name=name).SerializeToString(), context)
            config = tensors(pb.ModelConfigResponse.FromString(reply).config)
            self.configs[name] = time.monotonic(), config
        return config


def _credentials(access: Access) -> Any:
    assert access.tls_cert is not None
    assert access.tls_key is not None
    pair = access.tls_key.read_bytes(), access.tls_cert.read_bytes()
    ca = access.tls_ca.read_bytes() if access.tls_ca else None
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)
