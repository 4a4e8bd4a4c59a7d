"""A progress bar for every command that takes more than two seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Bar:
    """A progress bar on stderr. It shows nothing where stderr is no terminal."""

    def __init__(self, shown: bool = True) -> None:
        from rich.console import Console  # imported here, because listing the commands needs only click
        from rich.progress import Progress

        self.console = Console(stderr=True)
        hidden = not (shown and self.console.is_terminal)
        self.progress = Progress(console=self.console, disable=hidden, transient=True)
        self.task = self.progress.add_task("", total=None)

    def __call__(self, what: str, done: int, total: int) -> None:
        self.progress.update(self.task, description=what, completed=done, total=total)


@contextlib.contextmanager
def progress_bar(shown: bool = True) -> Iterator[Bar]:
    """Show a bar for one long step. Call the bar with (what, done, total)."""
    bar = Bar(shown)
    with bar.progress:
        yield bar
