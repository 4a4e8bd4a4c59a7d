"""`vilu web`: one page in front of a running server. It keeps no image, and asks through `AsyncClient`.

The page is web.html, whole in itself. Its script and style are the only ones that its Content-Security-Policy lets run,
by their hashes; what users and the server say reaches the page as text, never as markup.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import ipaddress
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vilu.errors import UserError
from vilu.preprocess.class_names import names_problem
from vilu.preprocess.image import Transform
from vilu.serving.address import open_directly
from vilu.serving.answers import Answer, DeadlineExceeded, RequestRefused, ServerUnavailable
from vilu.serving.async_client import AsyncClient
from vilu.serving.classes import get_set, list_sets

PAGE, MONITOR_PAGE = (Path(__file__).with_name(name) for name in ("web.html", "monitor.html"))
MOST_REPORT = 16 << 20  # bytes of a monitor's report
MAX_QUESTION = 1 << 20  # bytes of labels: the server takes 1000 of 256
AT_ONCE = 16  # images held in memory; later requests wait before theirs is read
UPLOAD_SECONDS = 30.0
STATUS: dict[type[Exception], int] = {RequestRefused: 400, DeadlineExceeded: 504, ServerUnavailable: 503}
SOME_CLASSES = 2  # named as examples of labels
EXAMPLES, EMBEDDED = 24, 7  # offered: of a folder, of each embedded source


class PageError(UserError):
    """An error for the page to show: an HTTP status and one line."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class OwnPagesOnly:
    """Middleware that refuses a request from a foreign page, or to a name that is not ours, before anything else.

    A name that is not one of ours is how DNS rebinding gets a foreign page in; an address or `localhost` cannot be
    rebound. A foreign Origin is a foreign page. Every response carries the headers.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str], headers: dict[str, str]) -> None:
        self.app, self.names = app, frozenset(name.lower() for name in names)
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {key for key, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(one for one in self.headers if one[0] not in own)]
            await send(message)

        headers = Request(scope).headers
        app: ASGIApp = self.app
        if not own_name(headers.get("host", ""), self.names):
            app = _error(421, "this name is not served here; see `vilu web --allow-host`")
        elif headers.get("origin", "://" + headers["host"]).partition("://")[2] != headers["host"]:
            app = _error(403, "another page may not ask")
        await app(scope, receive, send_with_headers)


def own_name(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header is an address, `localhost` or one of our names."""
    name = re.sub(r":\d+$", "", host).lower()
    if name == "localhost" or name in names:
        return True
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status)


def _policy(page: str) -> str:
    """The Content-Security-Policy of a page whose scripts and styles all stand in it."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in parts)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src 'self' blob: data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


async def read_question(request: Request, max_bytes: int) -> tuple[dict[str, Any], bytes]:
    """A request's body: one line of JSON, then the image as it is. Nothing over the limit is held.

    Returns:
        (`labels` and `class_set` of the question, each None where absent; the image)

    Raises:
        PageError: too large, too slow, or not of that form.
    """
    limit = MAX_QUESTION + max_bytes
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            # Until its end is there, the line counts against its own limit.
            start = body.find(b"\n", 0, MAX_QUESTION + 1) + 1
            if len(body) > (start + max_bytes if start else MAX_QUESTION):
                raise PageError(413, f"this image is too large, the limit is {max_bytes} bytes")

    # An image's type: what a foreign page may send unasked (forms, plain text) is none of it.
    if request.headers.get("content-type") != "application/octet-stream":
        raise PageError(415, "the body must be application/octet-stream")
    declared = request.headers.get("content-length", "0")
    if int(declared if declared.isdecimal() else 0) > limit:
        raise PageError(413, f"this image is too large, the limit is {max_bytes} bytes")
    try:
        await asyncio.wait_for(read(), UPLOAD_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):
        raise PageError(408, f"the image did not arrive in {UPLOAD_SECONDS:g} s") from None
    line, _, image = bytes(body).partition(b"\n")
    try:
        asked = json.loads(line)
        labels, class_set = asked.get("labels"), asked.get("class_set")
        if not (labels is None or (isinstance(labels, list) and labels)) or not isinstance(class_set, str | None):
            raise ValueError
        for name in [*(labels or []), class_set or ""]:
            name.encode("utf-8")  # JSON may hold half a surrogate pair
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise PageError(400, "labels must be a list of names, and the class set a name") from None
    if labels and (problem := names_problem(labels, "label")):
        raise PageError(400, f"labels: {problem}")
    return {"labels": labels, "class_set": class_set}, image


async def _ask(
    client: AsyncClient, image: bytes, stage: bool, labels: Sequence[str] | None, class_set: str | None
) -> Answer:
    return (await client.ask([image], labels, class_set=class_set, details=True, stage=stage))[0]


async def _is_cascade(client: AsyncClient) -> bool:
    """Whether the model that is asked says which stage answered."""
    return any(output["name"] == "STAGE" for output in (await client.config(client.model))["output"])


async def _served(client: AsyncClient) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """The class sets to choose from, the exported one first, and the names of the exported one's classes."""
    sets = await list_sets(client)
    rows = [
        {"name": one.name, "title": f"{one.name} ({one.classes} classes)", "threshold": one.threshold} for one in sets
    ]
    return rows, (await get_set(client, sets[0].name)).names or ()


def application(
    connect: Callable[[], AsyncClient],
    *,
    names: Sequence[str] = (),
    max_bytes: int = Transform.max_bytes,
    examples: Sequence[tuple[str, bytes]] = (),
    served_examples: bool = False,
    monitor: str | None = None,
) -> ASGIApp:
    """The page as an ASGI application.

    Args:
        connect: makes the client, once, on the event loop that serves the page.
        names: that the page is reached by, besides addresses and `localhost`.
        max_bytes: of an uploaded image.
        examples: (name, encoded image), offered to choose from.
        served_examples: offer only the examples whose name is one of the served classes.
        monitor: URL of a `vilu monitor`, whose report /monitor shows; None: there is no such page.
    """
    page = PAGE.read_text("utf-8")
    room = asyncio.Semaphore(AT_ONCE)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.stage = None  # not known before the server answers
        async with connect() as app.state.client:
            yield

    async def index(request: Request) -> Response:
        return Response(page, media_type="text/html; charset=utf-8")

    async def served(request: Request) -> Response:
        sets, classes = await _served(request.app.state.client)
        known = frozenset(classes)
        offered = [
            {"index": index, "name": name}
            for index, (name, _) in enumerate(examples)
            if not served_examples or name in known
        ]
        told = {"class_sets": sets, "max_bytes": max_bytes, "examples": offered, "some_classes": classes[:SOME_CLASSES]}
        return JSONResponse(told)

    async def example(request: Request) -> Response:
        index = request.path_params["index"]
        if index >= len(examples):
            raise PageError(404, "no such example")
        return Response(examples[index][1], media_type="application/octet-stream")

    async def ask(request: Request) -> Response:
        async with room:
            question, image = await read_question(request, max_bytes)
            state = request.app.state
            if state.stage is None:
                state.stage = await _is_cascade(state.client)
            answer = await _ask(state.client, image, state.stage, **question)
        answer.raise_for_error()
        return JSONResponse(_plain(answer))

    async def monitor_page(request: Request) -> Response:
        text = MONITOR_PAGE.read_text("utf-8")
        return Response(text, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": _policy(text)})

    async def report(request: Request) -> Response:
        assert monitor is not None
        try:
            return Response(await asyncio.to_thread(_report, monitor), media_type="application/json")
        except OSError as error:
            raise PageError(502, f"the monitor does not answer ({getattr(error, 'reason', error)})") from None

    def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _error(error.status_code, error.detail)
        if isinstance(error, PageError):
            return _error(error.status, str(error))
        return _error(STATUS.get(type(error), 502), str(error).removeprefix("image 0: "))

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/api/served", served),
            Route("/api/ask", ask, methods=["POST"]),
            Route("/examples/{index:int}", example),
            *([] if monitor is None else [Route("/monitor", monitor_page), Route("/api/monitor", report)]),
        ],
        exception_handlers={UserError: failed, HTTPException: failed, ClientDisconnect: failed},
        lifespan=lifespan,
    )
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
    return OwnPagesOnly(app, names, headers)


def _report(monitor: str) -> bytes:
    """A monitor's report. Raises OSError."""
    with open_directly(f"{monitor.rstrip('/')}/report.json", timeout=10) as reply:
        found: bytes = reply.read(MOST_REPORT)
        return found


def _plain(answer: Answer) -> dict[str, Any]:
    fields = (
        "label",
        "confidence",
        "failure_probability",
        "accept",
        "class_set",
        "top",
        "concepts",
        "entropy",
        "doctor",
        "stage",
        "escalation_failed",
    )
    return {name: getattr(answer, name) for name in fields}


def embedded_examples() -> list[tuple[str, bytes]]:
    """Held-out images of the embedded default: shapes, and digits where scikit-learn is there to give them."""
    from PIL import Image

    from vilu.tiny import data

    sources = [data.shapes("test", EMBEDDED)]
    with contextlib.suppress(ModuleNotFoundError):
        sources.append(data.digits("test"))
    found = []
    for source in sources:
        step = max(1, len(source.images) // EMBEDDED)
        for image, label in list(zip(source.images, source.labels, strict=True))[::step][:EMBEDDED]:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            found.append((source.names[label], buffer.getvalue()))
    return found


def folder_examples(folder: Path) -> list[tuple[str, bytes]]:
    """The first EXAMPLES images below a folder. Raises UserError where there is none."""
    from vilu.data.image_files import image_files

    return [(path.stem, path.read_bytes()) for path in image_files(folder)[:EXAMPLES]]
