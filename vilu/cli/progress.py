"""Progress of every command that takes more than two seconds: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from vilu.cli import output

SECONDS = 10.0  # between two lines where stderr is no terminal


class Bar(Protocol):
    """What `progress_bar` gives; call it with (what is done now, steps done, steps in all)."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@contextlib.contextmanager
def progress_bar(shown: bool = True) -> Iterator[Bar]:
    """Show the progress of one long step on stderr. --quiet hides it.

    In a terminal this is a bar. Elsewhere it is a line every ten seconds, so that a log shows what goes on and a short
    step prints nothing.
    """
    if not shown or output.is_quiet():
        yield lambda what, done, total: None
        return
    if not sys.stderr.isatty():
        lines = _Lines()
        with lines:
            yield lines
        return
    from rich.console import Console  # imported here, because listing the commands needs only click
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


class _Lines:
    """Prints the last state that it was called with, from a thread, so that a step that reports nothing is seen too."""

    def __init__(self) -> None:
        self.state: tuple[str, int, int] | None = None
        self.started = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._print, daemon=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        self.state = (what, done, total)

    def __enter__(self) -> _Lines:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _print(self) -> None:
        while not self.over.wait(SECONDS):
            if self.state is not None:
                what, done, total = self.state
                at = f" {done:,} of {total:,} ({done / total:.0%})" if total > 1 else ""
                output.note(f"{what}:{at} after {time.monotonic() - self.started:.0f} s")
