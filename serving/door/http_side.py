"""The door's HTTP: KServe v2 in REST, `POST /ask`, health, and an OpenAPI description."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from tritonclient.grpc import InferResult
from tritonclient.grpc import service_pb2 as pb

from vilu.serving.answer_file import DETAILS, STAGES
from vilu.serving.answers import Answer, Question, read_answers
from vilu.serving.async_client import CASCADE, CASCADE_OPEN, OPEN
from vilu.serving.door.check import named
from vilu.serving.door.core import Core
from vilu.serving.door.grpc_side import ANSWER_ID, CHANGE_SECONDS
from vilu.serving.door.observe import Seen
from vilu.serving.door.openapi import DOCS, description
from vilu.serving.door.refused import (
    LONG_HEADERS,
    NOT_FOUND,
    RETRY_SECONDS,
    STOPPING,
    TOO_LARGE,
    TOO_SLOW,
    UNAVAILABLE,
    UNSUPPORTED,
    Refused,
)
from vilu.serving.door.rest import (
    image_question,
    plain,
    read_generate,
    read_request,
    write_generated,
    write_reply,
)
from vilu.serving.door.uploads import check_parameters, read_upload, utf8

LINGER_SECONDS, LINGER_BYTES = 1.0, 4 << 20  # that a refused sender may go on sending, so that it reads the refusal
HEADER_LENGTH = "inference-header-content-length"
FIELDS = ("label", "class_index", "confidence", "failure_probability", "accept")
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
                        ("/generate", self._generate, "POST"),
                    )
                ),
                self._route("/v2/repository/index", self._index, "POST"),
                self._route("/v2/repository/models/{model}/{change:str}", self._change, "POST"),
            ],
            exception_handlers={HTTPException: self._http_error, 404: self._http_error, 405: self._http_error},
        )  # fmt: skip
        self.app.router.redirect_slashes = False  # a redirection would repeat the Host that the client names

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
            if seen.answer_id:
                response.headers[ANSWER_ID] = seen.answer_id
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
        core = self.core
        core.authenticate(seen, request.headers)
        check_parameters(request.query_params)
        end = core.end()
        body = await self._body(request, seen)
        image, question = await read_upload(request, body)
        labels = [label.encode() for label in question.labels or []]
        names = (CASCADE, CASCADE_OPEN) if question.stage else ("vilu", OPEN)
        seen.model = model = names[1] if labels else names[0]
        config = await core.upstreams.config(model, end, core.metadata(request.headers))
        question = replace(question, stage="STAGE" in config["outputs"])  # `vilu` can be a cascade, too
        asked, raw = image_question(model, image, question.outputs, labels, question.class_set)
        answer = await self._answer(request, seen, asked, raw, end)
        (found,) = read_answers(InferResult(answer), ["image"], question)
        said = described(found, question)
        return JSONResponse(said | {"id": seen.answer_id} if seen.answer_id else said)

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

    async def _generate(self, request: Request, seen: Seen) -> Response:
        core = self.core
        core.authenticate(seen, request.headers)
        end = core.end()
        body = await self._body(request, seen)
        name, version = _model(request), request.path_params.get("version", "")
        seen.model = named(pb.ModelInferRequest(model_name=name, model_version=version))
        config = await core.upstreams.config(name, end, core.metadata(request.headers))
        asked, raw = read_generate(name, version, body, config)
        return JSONResponse(write_generated(await self._answer(request, seen, asked, raw, end)))

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
    names = (*FIELDS, *(STAGES if question.stage else ()))
    names += DETAILS if question.details else ("class_set",) if question.class_set is not None else ()
    found = {name: getattr(answer, name) for name in names}
    if question.embedding and answer.embedding is not None:
        found["embedding"] = plain(answer.embedding).tolist()
    if question.outlier_score:
        found["outlier_score"] = answer.outlier_score
    for name in ("top", "concepts"):
        if name in found:
            found[name] = [
                {"label": label, "probability" if name == "top" else "weight": p} for label, p in found[name]
            ]
    return found


def _model(request: Request) -> str:
    return utf8(request.path_params["model"], "the model").decode()


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
