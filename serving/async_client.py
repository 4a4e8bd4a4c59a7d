"""Asking a running server with asyncio, over gRPC or HTTP.

Memory stays bounded whatever the number of images: at most `in_flight` requests
of `batch_size` images each are read and under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import re
import ssl
import time
import uuid
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from types import TracebackType
from typing import Any, TypedDict

import numpy as np
from tritonclient.utils import InferenceServerException

from vilu.answers import Answer, ImageLike, RequestRefused
from vilu.errors import UserError
from vilu.serving.address import DEFAULT_URL, grpc_options, is_loopback, parse_url
from vilu.serving.answers import AccessDenied, DeadlineExceeded, Question, ServerUnavailable, read_answers
from vilu.serving.image_input import Item, batches
from vilu.serving.shared_memory import Region, RegionPool
from vilu.serving.tokens import CONTROL, GRPC_PREFIX, TOKEN, check_header_value

CASCADE = "vilu_cascade"  # the ensemble of a cascade
OPEN, CASCADE_OPEN = "vilu_open", "vilu_cascade_open"  # the ensembles that read LABELS
EMBEDDINGS = "vilu_embeddings"  # the model that reads embeddings
LOAD_SECONDS = 300.0  # that a model may take to load: a large tower, on busy cores
CLOSE_SECONDS = 2.0  # that a server which says nothing may hold up close()
SHARED_FROM = 1 << 20  # below, registering and copying cost more than sending
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between a request's attempts
# What an answer's status means: gRPC's name or HTTP's number.
DENIED = ("401", "403", "UNAUTHENTICATED", "PERMISSION_DENIED")
REFUSED = frozenset(
    ["INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "INTERNAL", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"]
)
REFUSED |= frozenset(["400", "404", "405", "409", "411", "413", "415", "422", "500", "501"])
BUSY = ("UNAVAILABLE", "429", "503")
logger = logging.getLogger(__name__)
_NOBODY_LISTENS = re.compile(r"connection refused|\[Errno 111\]|connect call failed", re.IGNORECASE)


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of `AsyncClient` and `Client`, for type checkers."""

    model: str
    timeout: float
    batch_size: int
    in_flight: int
    token: str | None
    tls_ca: str | os.PathLike[str] | None
    tls_cert: str | os.PathLike[str] | None
    tls_key: str | os.PathLike[str] | None
    shared_memory: bool | None


class AsyncClient:
    """Ask a server.

    Args:
        url: "HOST:PORT" or "grpc://HOST:PORT" for gRPC, "http://HOST:PORT" for HTTP; grpcs:// and https:// with TLS.
        model: the ensemble to ask: "vilu", or "vilu_cascade" where the server has one.
        timeout: seconds for each request, retries included.
        batch_size: images in a request; at most the model's max_batch_size.
        in_flight: requests under way at once.
        token: what the server's `--token` asks for.
        tls_ca, tls_cert, tls_key: PEM files: who signed the server's certificate (by default the system's
            authorities), and the client's own certificate and key where the server asks for one.
        shared_memory: pass large requests through system shared memory; None: where the server is on this machine.
            Requests are sent as usual wherever that fails.

    A request that the server cannot take now (UNAVAILABLE, connection refused) is sent again, after a pause that
    doubles, until the timeout; nothing else is.

    Raises:
        UserError: another scheme, an unreadable PEM file, a malformed token, or a number out of range.

    Example::

        async with AsyncClient("127.0.0.1:8001") as client:
            async for answer in client.stream(paths):
                print(answer.source, answer.label, answer.failure_probability)
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = "vilu",
        timeout: float = 30.0,
        batch_size: int = 16,
        in_flight: int = 4,
        token: str | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        shared_memory: bool | None = None,
    ) -> None:
        server = parse_url(url)
        if batch_size < 1 or in_flight < 1 or not timeout > 0:
            raise UserError(f"batch_size {batch_size}, in_flight {in_flight} and timeout {timeout} must be positive")
        if (tls_ca or tls_cert or tls_key) and not server.tls:
            raise UserError(f"{url}: TLS files are for grpcs:// and https://")
        self.url, self.http, self.model, self.timeout = server.target, server.http, model, timeout
        self.batch_size, self.in_flight = batch_size, in_flight
        self._prefix = "" if self.http else GRPC_PREFIX
        self._headers = {} if token is None else {self._prefix + TOKEN: check_header_value(token, "token")}
        self._errors: tuple[type[Exception], ...] = (InferenceServerException, OSError, asyncio.TimeoutError)
        self._api: Any
        self._client: Any
        files = [None if path is None else os.fspath(path) for path in (tls_ca, tls_key, tls_cert)]
        try:
            if self.http:
                self._connect_http(server.tls, *files)
            else:
                from tritonclient.grpc import aio as api

                self._api = api
                self._client = api.InferenceServerClient(
                    self.url,
                    ssl=server.tls,
                    root_certificates=files[0],
                    private_key=files[1],
                    certificate_chain=files[2],
                    channel_args=grpc_options(server.host),
                )
        except OSError as error:
            raise UserError(f"TLS: {error.filename or ''}: {error.strerror or error}") from None
        self._shared = is_loopback(server.host) if shared_memory is None else shared_memory
        level = logging.WARNING if shared_memory else logging.INFO
        self._regions = RegionPool(self._register, self._unregister, self._errors, level)

    def _connect_http(self, tls: bool, ca: str | None, key: str | None, cert: str | None) -> None:
        import aiohttp
        from tritonclient.http import aio as api

        context = ssl.create_default_context(cafile=ca) if tls else None
        if context is not None and cert:
            context.load_cert_chain(cert, key)
        self._errors += (aiohttp.ClientError,)
        self._api = api
        self._client = api.InferenceServerClient(
            self.url, ssl=tls, ssl_context=context, conn_timeout=self.timeout, conn_limit=max(100, self.in_flight)
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give shared memory back and close the connection, in a few seconds whatever the server does."""
        for closing in (self._regions.close(), self._client.close()):
            try:
                await asyncio.wait_for(closing, CLOSE_SECONDS)
            except asyncio.TimeoutError:
                logger.info("%s: said nothing for %g s while its client closed", self.url, CLOSE_SECONDS)

    async def ask(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        class_set: str | None = None,
        details: bool = False,
        embedding: bool = False,
        outlier_score: bool = False,
        stage: bool | None = None,
    ) -> list[Answer]:
        """One Answer per image, in order; a bad image has `error` set and costs the others nothing.

        Args:
            images: paths, encoded bytes, Pillow images or (H, W, 3) uint8 arrays.
            labels, class_set, details, embedding, outlier_score: as for `Question`.
            stage: as for `Question`; None: where `vilu_cascade` is asked.

        Raises:
            ServerUnavailable: no server, an overload, or (DeadlineExceeded) no answer in time.
            AccessDenied: a token is missing or wrong.
            TypeError, UserError: as `Question` raises.
        """
        chosen: dict[str, Any] = {"details": details, "embedding": embedding, "outlier_score": outlier_score}
        stream = self.stream(images, labels, class_set=class_set, stage=stage, **chosen)
        return [answer async for answer in stream]

    async def stream(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        class_set: str | None = None,
        details: bool = False,
        embedding: bool = False,
        outlier_score: bool = False,
        stage: bool | None = None,
    ) -> AsyncIterator[Answer]:
        """`ask` for any number of images: answers come in order while later images are read and asked."""
        chosen = {"details": details, "embedding": embedding, "outlier_score": outlier_score}
        question = self.question(labels, class_set, stage, **chosen)
        work = (self.ask_batch(batch, question) for batch in batches(images, self.batch_size))
        async with contextlib.aclosing(self._in_order(work)) as found:
            async for answer in found:
                yield answer

    def question(
        self, labels: Sequence[str] | None, class_set: str | None, stage: bool | None, **chosen: bool
    ) -> Question:
        """What is asked about every image. stage: None: whether `vilu_cascade` is asked. Raises as `Question`."""
        return Question(labels, class_set, stage=self.model == CASCADE if stage is None else stage, **chosen)

    async def _in_order(self, work: Iterable[Coroutine[Any, Any, list[Answer]]]) -> AsyncGenerator[Answer, None]:
        """Answers in the order of the requests, of which `in_flight` are under way at a time."""
        pending: deque[asyncio.Task[list[Answer]]] = deque()
        try:
            for request in work:
                pending.append(asyncio.create_task(request))
                if len(pending) == self.in_flight:
                    for answer in await pending.popleft():
                        yield answer
            while pending:
                for answer in await pending.popleft():
                    yield answer
        finally:
            for task in pending:
                task.cancel()

    async def ask_embeddings(
        self,
        image_embedding: np.ndarray,
        labels: Sequence[str] | None = None,
        *,
        text_embeddings: np.ndarray | None = None,
        class_set: str | None = None,
        details: bool = False,
        embedding: bool = False,
        outlier_score: bool = False,
    ) -> list[Answer]:
        """One Answer per image embedding, in order: `ask` for any model whose embeddings the head was trained on.

        A row that the server refuses has `error` set, and costs the others nothing.

        Args:
            image_embedding: (N, D) numbers of any norm. Row i has the source "row i".
            labels: candidates; with text_embeddings their names, else the server embeds them.
            text_embeddings: (K, D) embeddings of the candidates, of any norm.
            class_set, details, embedding, outlier_score: as for `Question`.

        Raises:
            UserError: embeddings that are no such numbers, and as `ask` raises.
            TypeError, ServerUnavailable, AccessDenied: as `ask` raises.
        """
        named = text_embeddings is not None and labels is not None
        question = Question(labels, class_set, details, embedding, outlier_score)
        v = _matrix("image_embedding", image_embedding)
        t = None if text_embeddings is None else _matrix("text_embeddings", text_embeddings)
        if t is not None and not np.isfinite(t).all():
            raise UserError("text_embeddings hold a value that is not finite")
        if named and t is not None and len(t) != len(labels or ()):
            raise UserError(f"{len(labels or ())} labels but text_embeddings of shape {t.shape}")
        step = self.batch_size
        work = (self._ask_rows(v[start : start + step], start, t, question) for start in range(0, len(v), step))
        found = [answer async for answer in self._in_order(work)]
        if not named or labels is None:
            return found
        return [a if a.error is not None else replace(a, label=labels[a.class_index]) for a in found]

    async def _ask_rows(self, v: np.ndarray, start: int, t: np.ndarray | None, question: Question) -> list[Answer]:
        """One request about image embeddings (B, D), of which the first is the row `start` of all."""
        values: dict[str, tuple[np.ndarray, str]] = {"IMAGE_EMBEDDING": (v, "FP32")}
        if t is not None:
            values["TEXT_EMBEDDINGS"] = np.ascontiguousarray(np.broadcast_to(t, (len(v), *t.shape))), "FP32"
        elif question.labels is not None:
            row = question.encoded_labels()
            values["LABELS"] = np.array([row] * len(v), dtype=np.object_).reshape(len(v), -1), "BYTES"
        inputs = []
        for name, (value, kind) in values.items():
            inputs.append(self._api.InferInput(name, list(value.shape), kind))
            inputs[-1].set_data_from_numpy(value)
        outputs = [self._api.InferRequestedOutput(name) for name in question.outputs]
        parameters = None if question.class_set is None else {"class_set": question.class_set}
        try:
            result = await self._retry(
                lambda: self._client.infer(
                    EMBEDDINGS, inputs, outputs=outputs, headers=dict(self._headers), parameters=parameters
                )
            )
        except AccessDenied:
            raise
        except RequestRefused as error:
            if len(v) == 1:
                return [Answer(f"row {start}", error=str(error))]
            # One bad row costs the others nothing.
            alone = [await self._ask_rows(v[i : i + 1], start + i, t, question) for i in range(len(v))]
            return [answer for answers in alone for answer in answers]
        return read_answers(result, [f"row {start + i}" for i in range(len(v))], question)

    async def ask_batch(self, items: list[Item], question: Question) -> list[Answer]:
        """One request. Where the server refuses it for one bad image, each is asked for alone."""
        good = [(name, data) for name, data in items if isinstance(data, bytes)]
        found: Iterator[Answer] = iter(())
        if good:
            try:
                result = await self._retry(lambda: self._infer([data for _, data in good], question))
                found = iter(read_answers(result, [name for name, _ in good], question))
            except AccessDenied:
                raise
            except RequestRefused as error:
                if len(good) == 1:
                    found = iter([Answer(good[0][0], error=str(error))])
                else:
                    found = iter([answer for item in good for answer in await self.ask_batch([item], question)])
        return [data if isinstance(data, Answer) else next(found) for _, data in items]

    async def infer(self, model: str, strings: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        """One output of any model for BYTES inputs, with the same retries.

        Raises:
            UserError: as `ask` does, and RequestRefused.
        """
        inputs = []
        for name, value in strings.items():
            inputs.append(self._api.InferInput(name, list(value.shape), "BYTES"))
            inputs[-1].set_data_from_numpy(value)
        outputs = [self._api.InferRequestedOutput(output)]
        result = await self._retry(
            lambda: self._client.infer(model, inputs, outputs=outputs, headers=dict(self._headers))
        )
        return result.as_numpy(output)

    async def config(self, model: str) -> dict[str, Any]:
        """A model's configuration, as the server has it."""
        more = {} if self.http else {"as_json": True}
        found = await self._retry(lambda: self._client.get_model_config(model, headers=dict(self._headers), **more))
        return found if self.http else found["config"]

    async def versions(self, model: str) -> list[int]:
        """The versions of a model that the server answers from."""
        found = await self._retry(lambda: self._client.get_model_metadata(model, headers=dict(self._headers)))
        return [int(version) for version in (found["versions"] if self.http else found.versions)]

    async def load(self, model: str, config: str | None, control_token: str | None) -> None:
        """Load a model with another configuration, or as the repository has it now: Triton's model control, guarded by
        a token of its own.

        Raises:
            AccessDenied: the control token is missing or wrong.
            UserError: as `ask` does, and RequestRefused.
        """
        headers = dict(self._headers)
        if control_token is not None:
            headers[self._prefix + CONTROL] = check_header_value(control_token, "control token")
        try:
            await self._retry(
                lambda: self._client.load_model(model, headers=headers, config=config), max(self.timeout, LOAD_SECONDS)
            )
        except AccessDenied:
            raise AccessDenied(
                f"{self.url}: a change needs the control token of `vilu serve --control-token`"
            ) from None

    async def _retry(self, once: Callable[[], Awaitable[Any]], timeout: float | None = None) -> Any:
        end = time.monotonic() + (timeout or self.timeout)
        pause = FIRST_PAUSE
        while True:
            try:
                return await asyncio.wait_for(once(), end - time.monotonic())
            except self._errors as error:  # another exception is a fault of the program
                refusal, again = self._user_error(error)
            # Half of the pause is random: clients that were refused together must not come back together.
            wait = pause * random.uniform(0.5, 1.0)
            if not again or time.monotonic() + wait >= end:
                raise refusal from None
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _infer(self, batch: Sequence[bytes], question: Question) -> Any:
        tensor = self._api.InferInput("IMAGE", [len(batch), 1], "BYTES")
        outputs = [self._api.InferRequestedOutput(name) for name in question.outputs]
        inputs, model = [tensor], self.model
        if question.labels is not None:
            row = question.encoded_labels()
            inputs.append(self._api.InferInput("LABELS", [len(batch), len(row)], "BYTES"))
            inputs[1].set_data_from_numpy(np.array([row] * len(batch), dtype=np.object_).reshape(len(batch), -1))
            model = CASCADE_OPEN if model == CASCADE else OPEN
        parameters = None if question.class_set is None else {"class_set": question.class_set}
        size = sum(map(len, batch)) + 4 * len(batch)
        region = await self._regions.take(size) if self._shared and size >= SHARED_FROM else None
        answered = False
        try:
            if region is None:
                tensor.set_data_from_numpy(np.array(batch, dtype=np.object_).reshape(-1, 1))
            else:
                region.fill(batch)
                tensor.set_shared_memory(region.name, size)
            result = await self._client.infer(
                model, inputs, outputs=outputs, headers=dict(self._headers), parameters=parameters,
                request_id=uuid.uuid4().hex,
            )  # fmt: skip
            answered = True
            return result
        except InferenceServerException:
            answered = True
            raise
        finally:
            if region is not None and answered:
                self._regions.give_back(region)
            elif region is not None:
                self._regions.give_up(region)

    async def _register(self, region: Region) -> None:
        await self._client.register_system_shared_memory(
            region.name, f"/{region.name}", region.size, headers=dict(self._headers)
        )

    async def _unregister(self, name: str) -> None:
        await self._client.unregister_system_shared_memory(name, headers=dict(self._headers))

    def _user_error(self, error: Exception) -> tuple[UserError, bool]:
        """The error for the user, and whether the same request may be sent again."""
        status, text = "", str(error)
        if isinstance(error, InferenceServerException):
            status, text = str(error.status() or "").removeprefix("StatusCode."), str(error.message())
        text = " ".join(text.split()) or type(error).__name__
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or status == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{self.url}: no answer in {self.timeout:g} s"), False
        # gRPC says UNAVAILABLE for a protocol that wants a token.
        if "protocol is restricted" in text or "API is restricted" in text or status in DENIED:
            return AccessDenied(f"{self.url}: the server wants another token"), False
        if status in REFUSED:
            # The ensemble's own words around the message say nothing to the client.
            return RequestRefused(re.sub(r"^in ensemble '[^']*', ", "", text)), False
        again = status in BUSY or type(error).__name__ == "ClientConnectorError"
        if again and _NOBODY_LISTENS.search(text):
            text = "nobody listens there (connection refused); is `vilu serve` running?"
        return ServerUnavailable(f"{self.url}: {text}"), again


def _matrix(name: str, rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) in float32. Raises UserError for anything but numbers of that shape."""
    found = np.asarray(rows)
    if found.ndim != 2 or found.dtype.kind not in "fiu" or not found.shape[1]:
        raise UserError(f"{name} must be numbers, (rows, width), got {found.dtype} {found.shape}")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(found, np.float32)
