"""Asking a running server, over gRPC or HTTP, with asyncio or without.

`AsyncClient` does the work. `Client` runs one on an event loop in a thread of its own, so it can be shared by threads
and used where a loop already runs. Memory stays bounded whatever the number of images: at most `in_flight` requests
of `batch_size` images each are read and under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import re
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Union

import numpy as np
from tritonclient.utils import InferenceServerException

from vilu.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
ImageLike = Union[str, "os.PathLike[str]", bytes, np.ndarray, "Image.Image"]
OPEN = "vilu_open"  # the ensemble that reads LABELS
OUTPUTS = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")
DETAILS = ("TOP_LABELS", "TOP_PROBABILITIES", "ENTROPY", "DOCTOR", "CONCEPTS", "CONCEPT_WEIGHTS")
DEFAULT_URL = "127.0.0.1:8001"
LOAD_SECONDS = 300.0  # that a model may take to load: a large tower, on busy cores
# The headers' names; gRPC's have tritonserver's prefix before them.
TOKEN, CONTROL = "vilu-token", "vilu-control"
GRPC_HEADER = "triton-grpc-protocol-"  # before the name of a token, in gRPC's metadata
SCHEMES = ("grpc", "grpcs", "http", "https")
REQUEST_BYTES = 32 << 20  # a batch of large images is cut here, whatever its number
SHARED_FROM = 1 << 20  # below, registering and copying cost more than sending
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0


class ServerUnavailable(UserError):  # noqa: N818 - an answer of the server, not a fault of the program
    """The server cannot be reached or is overloaded; the request was retried until its time was over."""


class DeadlineExceeded(ServerUnavailable):
    """No answer within the client's timeout."""


class RequestRefused(UserError):  # noqa: N818
    """The server answered that this request is wrong: a damaged image, an unknown model."""


class AccessDenied(RequestRefused):
    """The server wants a token, or another one."""


@dataclass(frozen=True)
class Answer:
    """One image's answer; `error` says why there is none, and the other fields are then empty.

    accept is True when failure_probability is below the class set's threshold. Only where they were asked for:

    class_set: "NAME@VERSION" of the set that was answered from; "" for labels of the request's own.
    top: (label, probability) of CLIP's likeliest labels, at most 5. concepts: (label, weight) where the head looked,
        the classes that its doubt is between.
    entropy, doctor: two other confidences, higher is better: Σ p log p / log K in [-1, 0], and -(1 - g) / g with
        g = Σ p², in [1 - K, 0].
    embedding: (D,) float32, unit length.
    """

    source: str
    label: str = ""
    class_index: int = -1
    confidence: float = float("nan")
    failure_probability: float = float("nan")
    accept: bool = False
    error: str | None = None
    class_set: str | None = None
    top: tuple[tuple[str, float], ...] = ()
    entropy: float | None = None
    doctor: float | None = None
    concepts: tuple[tuple[str, float], ...] = ()
    embedding: np.ndarray | None = field(default=None, compare=False, repr=False)

    def raise_for_error(self) -> Answer:
        """This answer, or RequestRefused with its error."""
        if self.error is not None:
            raise RequestRefused(f"{self.source}: {self.error}")
        return self


@dataclass(frozen=True)
class Question:
    """What is asked about images.

    labels: candidates of one's own, asked of the ensemble `vilu_open`; class_set: the name of one that the server
        has; neither: the model's own.
    details: tell class_set, top, entropy, doctor and concepts of every Answer, too; embedding: its embedding.
    """

    labels: Sequence[str] | None = None
    class_set: str | None = None
    details: bool = False
    embedding: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        named = ("CLASS_SET",) if self.class_set is not None or self.details else ()
        embedding = ("IMAGE_EMBEDDING",) if self.embedding else ()
        return (*OUTPUTS, *named, *(DETAILS if self.details else ()), *embedding)


Item = tuple[str, "bytes | Answer"]  # an image's name and its encoded bytes, or an answer that says why there are none


def read(image: ImageLike, index: int) -> Item:
    """(name, encoded bytes) of a path, bytes, Pillow image or (H, W, 3) uint8 array; an Answer with the error where
    a file cannot be read."""
    if isinstance(image, bytes):
        return f"image {index}", image
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        try:
            return name, Path(name).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            return name, Answer(name, error=f"cannot be read ({getattr(error, 'strerror', None) or error})")
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            reason = f"arrays must be (H, W, 3) uint8, got {image.shape} {image.dtype}"
            return f"image {index}", Answer(f"image {index}", error=reason)
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")  # lossless: the server sees these very pixels
    return f"image {index}", buffer.getvalue()


def _batches(images: Iterable[ImageLike], size: int) -> Iterator[list[Item]]:
    """The images, read as they are needed, in lists of at most `size` and about REQUEST_BYTES."""
    batch: list[Item] = []
    held = 0
    for index, image in enumerate(images):
        batch.append(read(image, index))
        data = batch[-1][1]
        held += len(data) if isinstance(data, bytes) else 0
        if len(batch) == size or held >= REQUEST_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _pairs(labels: np.ndarray, weights: np.ndarray) -> tuple[tuple[str, float], ...]:
    return tuple((_text(label), float(weight)) for label, weight in zip(labels, weights, strict=True))


def _answers(result: Any, sources: Sequence[str], question: Question) -> list[Answer]:
    found = {name: result.as_numpy(name) for name in question.outputs}
    missing = [name for name, column in found.items() if column is None]
    if missing:
        raise RequestRefused(f"the server did not answer {', '.join(missing)}")
    columns = [found[name].reshape(-1) for name in OUTPUTS]
    answers = []
    for row, (source, label, i, c, f, a) in enumerate(zip(sources, *columns, strict=True)):
        more: dict[str, Any] = {}
        if "CLASS_SET" in found:
            more["class_set"] = _text(found["CLASS_SET"][row, 0])
        if question.details:
            more["top"] = _pairs(found["TOP_LABELS"][row], found["TOP_PROBABILITIES"][row])
            more["concepts"] = _pairs(found["CONCEPTS"][row], found["CONCEPT_WEIGHTS"][row])
            more |= {name.lower(): float(found[name][row, 0]) for name in ("ENTROPY", "DOCTOR")}
        if question.embedding:
            more["embedding"] = found["IMAGE_EMBEDDING"][row]
        answers.append(Answer(source, _text(label), int(i), float(c), float(f), bool(a), **more))
    return answers


class _Region:
    """A piece of system shared memory that one request at a time puts its images in."""

    def __init__(self, size: int) -> None:
        self.memory = SharedMemory(f"vilu_client_{os.getpid()}_{uuid.uuid4().hex[:12]}", create=True, size=size)
        self.name, self.size = self.memory.name, self.memory.size
        try:
            with open(f"/dev/shm/{self.name}", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # else writing to a full /dev/shm would be a SIGBUS
        except OSError:
            self.close()
            raise

    def fill(self, batch: Sequence[bytes]) -> None:
        """Triton's layout of BYTES: every string after its length, 4 bytes little endian."""
        at, memory = 0, self.memory.buf
        assert memory is not None  # until it is closed
        for data in batch:
            memory[at : at + 4] = len(data).to_bytes(4, "little")
            memory[at + 4 : at + 4 + len(data)] = data
            at += 4 + len(data)

    def close(self) -> None:
        self.memory.close()
        with contextlib.suppress(FileNotFoundError):  # already gone is what is wanted
            self.memory.unlink()


class AsyncClient:
    """Ask a server.

    Args:
        url: "HOST:PORT" or "grpc://HOST:PORT" for gRPC, "http://HOST:PORT" for HTTP; grpcs:// and https:// with TLS.
        model: the ensemble to ask.
        timeout: seconds for each request, retries included.
        batch_size: images in a request; at most the model's max_batch_size.
        in_flight: requests under way at once.
        token: what `vilu serve --token` asks for.
        tls_ca, tls_cert, tls_key: PEM files: who signed the server's certificate (by default the system's
            authorities), and the client's own certificate and key where the server asks for one.
        shared_memory: pass large requests through system shared memory; None: where the server is on this machine
            and takes it.

    A request that the server cannot take now (UNAVAILABLE, connection refused) is sent again, after a pause that
    doubles, until the timeout; nothing else is.

    Raises:
        UserError: another scheme, an unreadable PEM file, or a number out of range.
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
        scheme, _, rest = url.rpartition("://")
        if scheme not in ("", *SCHEMES):
            raise UserError(f"{url}: the scheme must be grpc://, grpcs://, http:// or https://")
        if batch_size < 1 or in_flight < 1 or not timeout > 0:
            raise UserError(f"batch_size {batch_size}, in_flight {in_flight} and timeout {timeout} must be positive")
        secure = scheme in ("grpcs", "https")
        if (tls_ca or tls_cert or tls_key) and not secure:
            raise UserError(f"{url}: TLS files are for grpcs:// and https://")
        self.url, self.model, self.timeout = rest.rstrip("/"), model, timeout
        self.batch_size, self.in_flight = batch_size, in_flight
        self.http = scheme.startswith("http")
        self._prefix = "" if self.http else GRPC_HEADER
        self._headers = None if token is None else {self._prefix + TOKEN: token}
        host = self.url.rpartition(":")[0].strip("[]")
        near = host in ("localhost", "::1") or host.startswith("127.")
        self._shared = near if shared_memory is None else shared_memory
        self._regions: list[_Region] = []
        self._given_up: list[str] = []  # regions of requests that nobody waited for
        self._client: Any
        try:
            if self.http:
                from tritonclient.http import aio as api

                context: Any = None
                if secure:
                    context = ssl.create_default_context(cafile=tls_ca)
                    if tls_cert:
                        context.load_cert_chain(tls_cert, tls_key)
                limit = max(100, in_flight)
                self._client = api.InferenceServerClient(
                    self.url, ssl=secure, ssl_context=context, conn_timeout=timeout, conn_limit=limit
                )
            else:
                from tritonclient.grpc import aio as api

                files = [None if path is None else os.fspath(path) for path in (tls_ca, tls_key, tls_cert)]
                self._client = api.InferenceServerClient(
                    self.url, ssl=secure, root_certificates=files[0], private_key=files[1], certificate_chain=files[2]
                )
        except OSError as error:
            raise UserError(f"TLS: {error.filename or ''}: {error.strerror or error}") from None
        self._api: Any = api

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection and give shared memory back."""
        for region in self._regions:
            region.close()
            self._given_up.append(region.name)
        self._regions.clear()
        await self._unregister()
        await self._client.close()

    async def ask(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        class_set: str | None = None,
        details: bool = False,
        embedding: bool = False,
    ) -> list[Answer]:
        """One Answer per image, in order; a bad image has `error` set and costs the others nothing.

        Args:
            images: paths, encoded bytes, Pillow images or (H, W, 3) uint8 arrays.
            labels, class_set, details, embedding: as `Question`'s.

        Raises:
            ServerUnavailable: no server, an overload, or (DeadlineExceeded) no answer in time.
            AccessDenied: a token is missing or wrong.
        """
        asked = {"class_set": class_set, "details": details, "embedding": embedding}
        return [answer async for answer in self.stream(images, labels, **asked)]

    async def stream(
        self, images: Iterable[ImageLike], labels: Sequence[str] | None = None, **asked: Any
    ) -> AsyncIterator[Answer]:
        """`ask` for any number of images: answers come in order while later images are read and asked."""
        question = Question(labels, **asked)
        pending: deque[asyncio.Task[list[Answer]]] = deque()
        try:
            for batch in _batches(images, self.batch_size):
                pending.append(asyncio.create_task(self.ask_batch(batch, question)))
                if len(pending) == self.in_flight:
                    for answer in await pending.popleft():
                        yield answer
            while pending:
                for answer in await pending.popleft():
                    yield answer
        finally:
            for task in pending:
                task.cancel()

    async def ask_batch(self, items: list[Item], question: Question) -> list[Answer]:
        """One request. Where the server refuses it for one bad image, each is asked for alone."""
        good = [(name, data) for name, data in items if isinstance(data, bytes)]
        found: Iterator[Answer] = iter(())
        if good:
            try:
                result = await self._retry(lambda: self._infer([data for _, data in good], question))
                found = iter(_answers(result, [name for name, _ in good], question))
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
        result = await self._retry(lambda: self._client.infer(model, inputs, outputs=outputs, headers=self._headers))
        return result.as_numpy(output)

    async def config(self, model: str) -> dict[str, Any]:
        """A model's configuration, as the server has it."""
        more = {} if self.http else {"as_json": True}
        found = await self._retry(lambda: self._client.get_model_config(model, headers=self._headers, **more))
        return found if self.http else found["config"]

    async def versions(self, model: str) -> list[int]:
        """The versions of a model that the server answers from."""
        found = await self._retry(lambda: self._client.get_model_metadata(model, headers=self._headers))
        return [int(version) for version in (found["versions"] if self.http else found.versions)]

    async def load(self, model: str, config: str | None, control_token: str | None) -> None:
        """Load a model with another configuration, or as the repository has it now: Triton's model control, guarded by
        a token of its own.
        """
        headers = dict(self._headers or {})
        if control_token is not None:
            headers[self._prefix + CONTROL] = control_token
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
            except Exception as error:
                told, again = self._told(error)
            # Half of the pause is random: clients that were refused together must not come back together.
            wait = pause * random.uniform(0.5, 1.0)
            if not again or time.monotonic() + wait >= end:
                raise told from None
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _infer(self, batch: Sequence[bytes], question: Question) -> Any:
        tensor = self._api.InferInput("IMAGE", [len(batch), 1], "BYTES")
        outputs = [self._api.InferRequestedOutput(name) for name in question.outputs]
        size = sum(map(len, batch)) + 4 * len(batch)
        region = await self._region(size) if self._shared and size >= SHARED_FROM else None
        if region is None:
            tensor.set_data_from_numpy(np.array(batch, dtype=np.object_).reshape(-1, 1))
        else:
            region.fill(batch)
            tensor.set_shared_memory(region.name, size)
        inputs, model = [tensor], self.model
        if question.labels is not None:
            row = [label.encode("utf-8", "surrogateescape") for label in question.labels]
            inputs.append(self._api.InferInput("LABELS", [len(batch), len(row)], "BYTES"))
            inputs[1].set_data_from_numpy(np.array([row] * len(batch), dtype=np.object_).reshape(len(batch), -1))
            model = OPEN
        named = {} if question.class_set is None else {"parameters": {"class_set": question.class_set}}
        answered = False
        try:
            result = await self._client.infer(model, inputs, outputs=outputs, headers=self._headers, **named)
            answered = True
            return result
        except InferenceServerException:
            answered = True
            raise
        finally:
            if region is not None and answered:
                self._regions.append(region)
            elif region is not None:
                # The server may still read it: nothing else may be written there.
                region.close()
                self._given_up.append(region.name)

    async def _region(self, size: int) -> _Region | None:
        """A free region of that size, registered with the server; None, from then on, where it takes none."""
        await self._unregister()
        while self._regions:
            free = self._regions.pop()
            if free.size >= size:
                return free
            free.close()
            self._given_up.append(free.name)
        region = None
        try:
            region = _Region(1 << (size - 1).bit_length())
            await self._client.register_system_shared_memory(
                region.name, f"/{region.name}", region.size, headers=self._headers
            )
            return region
        except Exception:  # another machine's or container's memory, a full /dev/shm, or a protocol that is closed
            self._shared = False
            if region is not None:
                region.close()
            return None

    async def _unregister(self) -> None:
        while self._given_up:
            with contextlib.suppress(Exception):  # the server may be gone
                await self._client.unregister_system_shared_memory(self._given_up.pop(), headers=self._headers)

    def _told(self, error: Exception) -> tuple[UserError, bool]:
        """What to tell the user, and whether the same request may be sent again."""
        status, text = "", str(error)
        if isinstance(error, InferenceServerException):
            status, text = str(error.status() or "").removeprefix("StatusCode."), str(error.message())
        text = " ".join(text.split()) or type(error).__name__
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or status == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{self.url}: no answer in {self.timeout:g} s"), False
        # gRPC says UNAVAILABLE for a protocol that wants a token.
        if "protocol is restricted" in text or "API is restricted" in text or status in ("401", "403"):
            return AccessDenied(f"{self.url}: the server wants another token"), False
        if status in ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "400", "404", "INTERNAL", "500"):
            # The ensemble's own words around the message say nothing to the client.
            return RequestRefused(re.sub(r"^in ensemble '[^']*', ", "", text)), False
        again = status in ("UNAVAILABLE", "503") or type(error).__name__ == "ClientConnectorError"
        return ServerUnavailable(f"{self.url}: {text}"), again


class Client:
    """`AsyncClient` without asyncio; arguments and errors are the same. Threads may share one."""

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vilu client", daemon=True)
        self._thread.start()

        async def make() -> AsyncClient:
            return AsyncClient(url, **options)

        try:
            self._asker = self._run(make())
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupted caller wants no answer any more
            raise

    def run(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **options: Any) -> T:
        """What is asynchronous over an AsyncClient, as a call: client.run(put_set, "pets", ["cat", "dog"])."""
        return self._run(work(self._asker, *arguments, **options))

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def close(self) -> None:
        """Close the connection; a second time does nothing."""
        if not self._loop.is_closed():
            self._run(self._asker.close())
            self._end()

    def ask(self, images: Iterable[ImageLike], labels: Sequence[str] | None = None, **asked: Any) -> list[Answer]:
        """As `AsyncClient.ask`."""
        return list(self.stream(images, labels, **asked))

    def stream(
        self, images: Iterable[ImageLike], labels: Sequence[str] | None = None, **asked: Any
    ) -> Iterator[Answer]:
        """As `AsyncClient.stream`; the images are read in the caller's thread."""
        question = Question(labels, **asked)
        pending: deque[Any] = deque()
        try:
            for batch in _batches(images, self._asker.batch_size):
                pending.append(asyncio.run_coroutine_threadsafe(self._asker.ask_batch(batch, question), self._loop))
                if len(pending) == self._asker.in_flight:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
