"""The access log's file, written by a thread of its own: a full disk or a stalled reader costs lines, never answers."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading

from prometheus_client import Counter

from vilu.errors import UserError

MOST_LINES = 10_000  # that wait to be written; more are dropped
CLOSE_SECONDS = 1.0  # that the end waits for them


class AccessLog:
    """Lines appended to a file.

    Args:
        where: the file; "-" for standard output.
        dropped: counts the lines that could not be queued or written.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, where: str, dropped: Counter) -> None:
        self.where, self.dropped = where, dropped
        self.lines: queue.Queue[bytes | None] = queue.Queue(MOST_LINES)
        self.stale = False
        self.torn = False  # the last line was written in part
        self.thread: threading.Thread | None = None
        try:
            self.file = self._open()
        except OSError as error:
            raise UserError(f"{where}: cannot be written ({error.strerror})") from None

    def _open(self) -> int:
        if self.where == "-":
            return os.dup(1)
        return os.open(self.where, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def write(self, line: str) -> None:
        """Queue a line. It never waits."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="access log", daemon=True)
            self.thread.start()
        try:
            self.lines.put_nowait(line.encode() + b"\n")
        except queue.Full:
            self.dropped.inc()

    def reopen(self) -> None:
        """Open the file anew before the next line, after a rotation."""
        self.stale = self.where != "-"

    def close(self) -> None:
        """Wait for the queued lines, a second at most; the rest is dropped."""
        if self.thread is None:
            return
        with contextlib.suppress(queue.Full):
            self.lines.put(None, timeout=CLOSE_SECONDS / 2)
        self.thread.join(CLOSE_SECONDS / 2)
        if not self.thread.is_alive():
            self.thread = None

    def _run(self) -> None:
        while (line := self.lines.get()) is not None:
            if self.stale:
                self._reopen()
            try:
                self._put(b"\n" + line if self.torn else line)
            except OSError:
                self.dropped.inc()

    def _reopen(self) -> None:
        self.stale = False
        try:
            new = self._open()
        except OSError as error:
            print(f"vilu: {self.where}: cannot be reopened ({error.strerror})", file=sys.stderr, flush=True)
            return
        os.close(self.file)
        self.file, self.torn = new, False

    def _put(self, data: bytes) -> None:
        sent = 0
        while sent < len(data):
            sent += os.write(self.file, data[sent:])
            self.torn = sent < len(data)
