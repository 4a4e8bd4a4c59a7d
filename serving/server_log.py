"""tritonserver's log without the alarms about CUDA that it raises on every machine that has no GPU."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

GPU = Path("/dev/nvidiactl")
_ALARM = re.compile(
    rb"CUDA driver version is insufficient|CudaDriverHelper has not been initialized|pinned (system memory|memory pool)"
)

_LOAD_FAILURE = re.compile(rb"failed to load '([^']+)' version \d+: ([^\n\\\"]*)")  # up to an escaped end of line


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that the server could use."""
    return GPU.exists()


def load_failure(line: bytes) -> str:
    r"""What a line of the log says of a model that did not load; "" for any other line.

    Example:
        >>> load_failure(b"E1126 lifecycle.cc:654] \"failed to load 'clip_image' version 1: Internal: no file\"")
        'clip_image did not load (Internal: no file)'
    """
    found = _LOAD_FAILURE.search(line)
    if found is None:
        return ""
    name, reason = (part.decode("utf-8", "replace").strip() for part in found.groups())
    return f"{name} did not load ({reason[:200]})"


def copy_without_alarms(
    log: IO[bytes], target: IO[bytes], notice: Callable[[bytes], None] = lambda _: None
) -> threading.Thread:
    """Copy a server's log, line by line, in a thread of its own that ends with the log and closes both.

    Args:
        log: the read end of the pipe that the server writes to.
        notice: called with every line that is copied.
        target: where the lines go. If nobody reads them any more, the log is still read, and the server never waits.
    """

    def copy() -> None:
        with log, contextlib.suppress(OSError), target:
            for line in log:
                if not _ALARM.search(line):
                    notice(line)
                    with contextlib.suppress(OSError):
                        target.write(line)
                        target.flush()

    thread = threading.Thread(target=copy, name="tritonserver's log", daemon=True)
    thread.start()
    return thread
