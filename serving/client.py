"""Asking a running server without asyncio.

`Client` runs an `AsyncClient` on an event loop in a thread of its own, so it can be shared by threads and used where a
loop already runs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from vilu.answers import Answer, ImageLike
from vilu.errors import UserError
from vilu.serving.address import DEFAULT_URL
from vilu.serving.async_client import CLOSE_SECONDS, AsyncClient, ClientOptions
from vilu.serving.image_input import batches

if TYPE_CHECKING:
    from typing import Unpack  # of Python 3.11

    import numpy as np

T = TypeVar("T")


class Client:
    """`AsyncClient` without asyncio; arguments and errors are the same. Threads may share one.

    Example::

        with Client("127.0.0.1:8001") as client:
            for answer in client.ask(["cat.jpg", "dog.jpg"]):
                print(answer.source, answer.label, answer.failure_probability)
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
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

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop.is_closed():
            work.close()
            raise UserError("this client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise UserError("this client was closed before the answer came") from None
        except BaseException:
            future.cancel()  # an interrupted caller wants no answer any more
            raise

    def run(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **options: Any) -> T:
        """Call a coroutine function of an AsyncClient: client.run(put_set, "pets", ["cat", "dog"])."""
        return self._run(work(self._asker, *arguments, **options))

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def close(self) -> None:
        """Cancel what other threads still ask, and close the connection; a second time does nothing."""
        if not self._loop.is_closed():
            self._run(_cancel_others())
            self._run(self._asker.close())
            self._end()

    def ask(
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
        """One Answer per image, as `AsyncClient.ask`."""
        chosen: dict[str, Any] = {"details": details, "embedding": embedding, "outlier_score": outlier_score}
        return list(self.stream(images, labels, class_set=class_set, stage=stage, **chosen))

    def ask_embeddings(
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
        """One Answer per image embedding (N, D), as `AsyncClient.ask_embeddings`."""
        return self._run(
            self._asker.ask_embeddings(
                image_embedding,
                labels,
                text_embeddings=text_embeddings,
                class_set=class_set,
                details=details,
                embedding=embedding,
                outlier_score=outlier_score,
            )
        )

    def stream(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        class_set: str | None = None,
        details: bool = False,
        embedding: bool = False,
        outlier_score: bool = False,
        stage: bool | None = None,
    ) -> Iterator[Answer]:
        """As `AsyncClient.stream`; the images are read in the caller's thread."""
        chosen = {"details": details, "embedding": embedding, "outlier_score": outlier_score}
        question = self._asker.question(labels, class_set, stage, **chosen)
        pending: deque[concurrent.futures.Future[list[Answer]]] = deque()
        try:
            for batch in batches(images, self._asker.batch_size):
                pending.append(self._submit(self._asker.ask_batch(batch, question)))
                if len(pending) == self._asker.in_flight:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except concurrent.futures.CancelledError:
            raise UserError("this client was closed before the answer came") from None
        finally:
            for future in pending:
                future.cancel()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CLOSE_SECONDS)
