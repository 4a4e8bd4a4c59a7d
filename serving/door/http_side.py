"""The door's HTTP: KServe v2 in REST, `POST /ask`, health, and an OpenAPI description."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from python_multipart.exceptions import MultipartParseError
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from tritonclient.grpc import InferResult
from tritonclient.grpc import service_pb2 as pb

from vilu.serving.answers import Answer, Question, read_answers
from vilu.serving.door.check import LONGEST_NAME
from vilu.serving.door.core import Core
from vilu.serving.door.grpc_side import CHANGE_SECONDS
from vilu.serving.door.observe import Seen
from vilu.serving.door.openapi import DOCS, description
from vilu.serving.door.refused import (
    LONG_HEADERS,
    MALFORMED,
    NOT_FOUND,
    RETRY_SECONDS,
    STOPPING,
    TOO_LARGE,
    TOO_SLOW,
    UNAVAILABLE,
    UNSUPPORTED,
    Refused,
)
from vilu.serving.door.rest import image_bytes, image_question, plain, read_request, write_reply

LINGER_SECONDS, LINGER_BYTES = 1.0, 4 << 20  # that a refused sender may go on sending, so that it reads the refusal
HEADER_LENGTH = "inference-header-content-length"
FIELDS = ("label", "class_index", "confidence", "failure_probability", "accept")
DETAILED = ("class_set", "top", "entropy", "doctor", "concepts")
PARAMETERS = ("labels", "class_set", "details", "embedding")  # of /ask
Handler = Callable[[Request, Seen], Awaitable[Response]]


class HttpSide:
    """The ASGI application of a door."""

    def __init__(self, core: Core) -> None:
        self.core, self.limits = core, core.limits
        model = "/v2/models/{model}"
        version = "/versions/{version}"
        self.app = Starlette(
            routes=[
                self._route("/ask", self._ask, "POST"),
                self._route("/healthz", self._live),
                self._route("/readyz", self._ready),
                self._route("/openapi.json", self._openapi),
                self._route("/docs", self._docs),
                self._route("/v2", self._server),
                self._route("/v2/health/live", self._live),
                self._route("/v2/health/ready", self._ready),
                *(
                    self._route(model + one + path, handler, method)
                    for one in ("", version)
                    for path, handler, method in (
                        ("", self._metadata, "GET"), ("/config", self._config, "GET"),
                        ("/ready", self._model_ready, "GET"), ("/infer", self._infer, "POST"),
                    )
                ),
                self._route("/v2/repository/index", self._index, "POST"),
                self._route("/v2/repository/models/{model}/{change:str}", self._change, "POST"),
            ],
            exception_handlers={HTTPException: self._http_error, 404: self._http_error, 405: self._http_error},
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = sum(len(key) + len(value) for key, value in scope["headers"])
            if size + len(scope["raw_path"]) + len(scope["query_string"]) > self.limits.header_bytes:
                request = Request(scope, receive)
                error = Refused(
                    f"the address and headers are larger than {self.limits.header_bytes} bytes", LONG_HEADERS
                )
                await self._refusal(request, self._seen(request), error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _route(self, path: str, handler: Handler, method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            seen = self._seen(request)
            try:
                response = await handler(request, seen)
            except Refused as error:
                return self._refusal(request, seen, error)
            except ClientDisconnect:
                self.core.observer.done(seen, "CANCELLED")
                return Response(status_code=499)
            except asyncio.CancelledError:  # uvicorn's, at the end of the grace
                return self._refusal(request, seen, Refused("the server is stopping", STOPPING))
            self.core.observer.done(seen, "ok" if response.status_code < 400 else str(response.status_code))
            return response

        return Route(path, endpoint, methods=[method])

    def _seen(self, request: Request) -> Seen:
        peer = request.client.host if request.client else ""
        return self.core.seen("http", peer, f"{request.method} {request.url.path[:128]}", request.headers)

    def _refusal(self, request: Request, seen: Seen, error: Refused) -> Response:
        self.core.observer.done(seen, str(error.kind.http), error.kind.reason, str(error))
        headers = {}
        if error.kind.http == 503:
            headers["retry-after"] = str(RETRY_SECONDS)
        if error.kind.http == 401:
            headers["www-authenticate"] = "Bearer"
        response = JSONResponse({"error": str(error)}, error.kind.http, headers)
        return response if seen.bytes_in or error.kind is STOPPING else Lingering(response, request)

    def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.core.observer.done(self._seen(request), str(error.status_code), "not_found")
        return Lingering(JSONResponse({"error": error.detail}, error.status_code, error.headers), request)

    # Questions

    async def _ask(self, request: Request, seen: Seen) -> Response:
        core, query = self.core, request.query_params
        core.authenticate(seen, request.headers)
        _known(query)
        end = core.end()
        body = await self._body(request, seen)
        given = query.multi_items()
        added: list[tuple[str, str]] = []
        image = await _uploaded(request, body, added)
        _known(dict(added))
        twice = sorted({key for key, _ in given} & {key for key, _ in added})
        if twice:
            raise Refused(f"{twice[0]}: is in the address and in the body")
        given += added
        for key, value in given:
            _utf8(value, key)
        labels = [value for key, value in given if key == "labels"]
        class_sets = [value for key, value in given if key == "class_set"]
        if len(class_sets) > 1 or (labels and class_sets):
            raise Refused("give labels, or one class_set")
        with_details, with_embedding = (_flag(given, key) for key in ("details", "embedding"))
        question = Question(labels or None, class_sets[0] if class_sets else None, with_details, with_embedding)
        asked, raw = image_question(image, question.outputs, [label.encode() for label in labels], question.class_set)
        answer = await self._answer(request, seen, asked, raw, end)
        (found,) = read_answers(InferResult(answer), ["image"], question)
        return JSONResponse(described(found, question))

    async def _infer(self, request: Request, seen: Seen) -> Response:
        core = self.core
        core.authenticate(seen, request.headers)
        end = core.end()
        length = request.headers.get(HEADER_LENGTH)
        if length is not None and not (length.isascii() and length.isdecimal() and len(length) < 12):
            raise Refused("Inference-Header-Content-Length is not a number")
        body = await self._body(request, seen)
        version = request.path_params.get("version", "")
        split = None if length is None else int(length)
        asked, raw, binary = read_request(_model(request), version, body, split)
        reply = await self._answer(request, seen, asked, raw, end)
        content, header_length = write_reply(reply, binary)
        if header_length is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={HEADER_LENGTH: str(header_length)}, media_type="application/octet-stream")

    async def _answer(
        self, request: Request, seen: Seen, asked: pb.ModelInferRequest, raw: list[bytes], end: float
    ) -> pb.ModelInferResponse:
        data = asked.SerializeToString() + b"".join(part for one in raw for part in (b"\x3a", _varint(len(one)), one))
        metadata = self.core.metadata(request.headers)
        work = asyncio.create_task(self.core.infer_parsed(asked, raw, data, seen, end, metadata))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return pb.ModelInferResponse.FromString(work.result())
        finally:
            work.cancel()
            gone.cancel()

    async def _body(self, request: Request, seen: Seen) -> bytes:
        """The whole body. Raises Refused before it is read where it is too large, after where it was too slow."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused("a compressed body is not taken", UNSUPPORTED)
        limit = self.limits.body_bytes
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > limit:
            raise Refused(f"the body is larger than {limit} bytes", TOO_LARGE)

        async def read() -> bytes:
            chunks, size = [], 0
            async with self.core.arriving(seen.peer, int(declared)) as arriving:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        raise Refused(f"the body is larger than {limit} bytes", TOO_LARGE)
                    arriving.add(len(chunk))
                    chunks.append(chunk)
                return b"".join(chunks)

        try:
            body = await asyncio.wait_for(read(), self.limits.body_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refused(f"the body did not arrive in {self.limits.body_seconds:g} s", TOO_SLOW) from None
        seen.bytes_in = len(body)
        return body

    # The server and its models

    async def _live(self, request: Request, seen: Seen) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request, seen: Seen) -> Response:
        if not self.core.ready:
            raise Refused("no server answers", UNAVAILABLE)
        return JSONResponse({"ready": True})

    async def _server(self, request: Request, seen: Seen) -> Response:
        data = pb.ServerMetadataRequest().SerializeToString()
        reply = await self.core.upstreams.ask(
            "ServerMetadata", data, self.core.end(), self.core.metadata(request.headers)
        )
        found = pb.ServerMetadataResponse.FromString(reply)
        return JSONResponse({"name": found.name, "version": found.version, "extensions": ["binary_tensor_data"]})

    async def _upstream(self, method: str, data: bytes, request: Request) -> bytes:
        return await self.core.upstreams.ask(method, data, self.core.end(), self.core.metadata(request.headers))

    async def _metadata(self, request: Request, seen: Seen) -> Response:
        found = pb.ModelMetadataResponse.FromString(await self._describe("ModelMetadata", request, seen))
        tensors = {
            kind: [
                {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in getattr(found, kind)
            ]
            for kind in ("inputs", "outputs")
        }
        return JSONResponse(
            {"name": found.name, "versions": list(found.versions), "platform": found.platform, **tensors}
        )

    async def _config(self, request: Request, seen: Seen) -> Response:
        from google.protobuf.json_format import MessageToDict

        found = pb.ModelConfigResponse.FromString(await self._describe("ModelConfig", request, seen))
        return JSONResponse(MessageToDict(found.config, preserving_proto_field_name=True))

    async def _model_ready(self, request: Request, seen: Seen) -> Response:
        found = pb.ModelReadyResponse.FromString(await self._describe("ModelReady", request, seen))
        if not found.ready:
            raise Refused("the model, or this version of it, is not ready", NOT_FOUND)
        return JSONResponse({"ready": True})

    async def _describe(self, method: str, request: Request, seen: Seen) -> bytes:
        kinds = {"ModelMetadata": pb.ModelMetadataRequest, "ModelConfig": pb.ModelConfigRequest}
        model, version = _model(request), request.path_params.get("version", "")
        data = kinds.get(method, pb.ModelReadyRequest)(name=model, version=version).SerializeToString()
        return await self.core.describe(method, data, seen, self.core.end(), self.core.metadata(request.headers))

    async def _index(self, request: Request, seen: Seen) -> Response:
        self.core.authorize_change(request.headers)
        await self._body(request, seen)
        data = pb.RepositoryIndexRequest().SerializeToString()
        reply = await self.core.upstreams.ask(
            "RepositoryIndex", data, self.core.end(), self.core.metadata(request.headers)
        )
        found = pb.RepositoryIndexResponse.FromString(reply)
        return JSONResponse(
            [
                {"name": one.name, "version": one.version, "state": one.state, "reason": one.reason}
                for one in found.models
            ]
        )

    async def _change(self, request: Request, seen: Seen) -> Response:
        self.core.authorize_change(request.headers)
        method = {"load": "RepositoryModelLoad", "unload": "RepositoryModelUnload"}.get(request.path_params["change"])
        if method is None:
            raise Refused("not found", NOT_FOUND)
        body = await self._body(request, seen)
        try:
            parameters = json.loads(body or b"{}").get("parameters", {})
            config = parameters.get("config") if method == "RepositoryModelLoad" else None
            kind = pb.RepositoryModelLoadRequest if method == "RepositoryModelLoad" else pb.RepositoryModelUnloadRequest
            message = kind(model_name=_model(request))
            if config is not None:
                message.parameters["config"].string_param = config
            data = message.SerializeToString()
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise Refused("the body must be JSON; parameters.config the configuration as a string") from None
        end = time.monotonic() + CHANGE_SECONDS
        await self.core.change(method, data, seen, end, self.core.metadata(request.headers))
        return Response(status_code=200)

    # The description

    async def _openapi(self, request: Request, seen: Seen) -> Response:
        return JSONResponse(description(self.limits))

    async def _docs(self, request: Request, seen: Seen) -> Response:
        return HTMLResponse(DOCS, headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"})


class Lingering(Response):
    """A refusal whose sender may still be sending: the answer goes out at once, what comes is thrown away for a while,
    then the connection ends. Without that the sender would see a reset instead of the answer."""

    def __init__(self, response: Response, request: Request) -> None:
        self.response, self.request = response, request
        self.status_code, self.background = response.status_code, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.response.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.response.body, "more_body": True})
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._discard(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})

    async def _discard(self, receive: Receive) -> None:
        left = LINGER_BYTES
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return


def described(answer: Answer, question: Question) -> dict[str, Any]:
    """An answer as /ask gives it."""
    names = (*FIELDS, *(DETAILED if question.details else ("class_set",) if question.class_set is not None else ()))
    found = {name: getattr(answer, name) for name in names}
    if question.embedding and answer.embedding is not None:
        found["embedding"] = plain(answer.embedding).tolist()
    for name in ("top", "concepts"):
        if name in found:
            found[name] = [
                {"label": label, "probability" if name == "top" else "weight": p} for label, p in found[name]
            ]
    return found


async def _uploaded(request: Request, body: bytes, given: list[tuple[str, str]]) -> bytes:
    """The image of a body: the body itself, the file `image` of a form, or the string `image` of a JSON object. The
    form's and the object's other fields are added to `given`. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request, body, given)
    if kind == "application/json":
        try:
            fields = json.loads(body, object_pairs_hook=_once)
            image = fields.pop("image")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise Refused("the JSON must be an object with the image in base64 as `image`") from None
        for key, value in fields.items():
            if value == []:
                raise Refused(f"{key[:64]!r}: the list is empty")
            for one in value if isinstance(value, list) else [value]:
                given.append((key, str(one).lower() if isinstance(one, bool) else one))
        _known(fields)
        if not isinstance(image, str) or not all(isinstance(value, str) for _, value in given):
            raise Refused("the JSON's fields must be strings, lists of strings, true or false")
        return image_bytes(image)
    if not body:
        raise Refused("the body is empty: an image is wanted")
    return body


async def _form(request: Request, body: bytes, given: list[tuple[str, str]]) -> bytes:
    async def chunks() -> Any:
        yield body
        yield b""

    try:
        size = 4 * LONGEST_NAME
        form = await MultiPartParser(
            request.headers, chunks(), max_files=1, max_fields=1100, max_part_size=size
        ).parse()
        images = [await value.read() for value in form.values() if isinstance(value, UploadFile)]
        given.extend((key, value) for key, value in form.multi_items() if isinstance(value, str))
        await form.close()
    except (MultiPartException, MultipartParseError, UnicodeDecodeError, KeyError) as error:
        raise Refused(f"the form cannot be read ({getattr(error, 'message', error)})") from None
    if len(images) != 1:
        raise Refused("the form must hold one file, the image")
    return images[0]


def _known(names: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(PARAMETERS))
    if unknown:
        raise Refused(f"there is no parameter {unknown[0][:64]!r}: {', '.join(PARAMETERS)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Refused("a field of the JSON is there twice")
    return found


def _flag(given: list[tuple[str, str]], name: str) -> bool:
    values = [value.lower() for key, value in given if key == name]
    if len(values) > 1:
        raise Refused(f"{name}: is given twice")
    if values and values[0] not in ("", "true", "false", "1", "0"):
        raise Refused(f"{name}: must be true or false")
    return values[:1] in (["true"], ["1"])


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Refused(f"{name}: is not UTF-8", MALFORMED) from None


def _model(request: Request) -> str:
    return _utf8(request.path_params["model"], "the model").decode()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
