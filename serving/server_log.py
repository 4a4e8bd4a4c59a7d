"""tritonserver's log without the alarms about CUDA that it raises on every machine that has no GPU."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path
from typing import IO

GPU = Path("/dev/nvidiactl")
_ALARM = re.compile(
    rb"CUDA driver version is insufficient|CudaDriverHelper has not been initialized|pinned (system memory|memory pool)"
)


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that the server could use."""
    return GPU.exists()


def copy_without_alarms(log: IO[bytes], target: IO[bytes]) -> threading.Thread:
    """Copy a server's log, line by line, in a thread of its own that ends with the log and closes both.

    Args:
        log: the read end of the pipe that the server writes to.
        target: where the lines go. If nobody reads them any more, the log is still read, and the server never waits.
    """

    def copy() -> None:
        with log, contextlib.suppress(OSError), target:
            for line in log:
                if not _ALARM.search(line):
                    with contextlib.suppress(OSError):
                        target.write(line)
                        target.flush()

    thread = threading.Thread(target=copy, name="tritonserver's log", daemon=True)
    thread.start()
    return thread
