"""The processes of a local server: which they are, and their CPU time and memory."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


class Processes:
    """The process group of a local server: CPU time by part, and memory."""

    def __init__(self, group: int) -> None:
        self.group = group

    def _members(self) -> list[Path]:
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError, ValueError, IndexError):
                if folder.name.isdigit() and int(_stat(folder)[2]) == self.group:
                    found.append(folder)
        return found

    def cpu(self) -> dict[str, float]:
        """Part ("tritonserver", or the model of a Python stub) -> CPU seconds so far."""
        total: Counter[str] = Counter()
        for folder in self._members():
            with suppress(OSError, IndexError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                fields = _stat(folder)
                total[_part(words)] += (int(fields[11]) + int(fields[12])) / _TICK  # type: ignore[assignment]
        return dict(total)

    def memory(self) -> int:
        """Bytes, pages shared by several processes counted once (PSS; RSS where that cannot be read)."""
        return sum(pss for pss, _ in self.usage().values())

    def usage(self) -> dict[str, tuple[int, int]]:
        """Part -> bytes with shared pages counted once (PSS), and of its own pages alone (USS); RSS for both where
        they cannot be read."""
        total: dict[str, tuple[int, int]] = {}
        for folder in self._members():
            with suppress(OSError, IndexError, ValueError):
                part = _part((folder / "cmdline").read_bytes().decode(errors="replace").split("\0"))
                try:
                    lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
                    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
                    pss, uss = sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"]
                except OSError:
                    pss = uss = int(_stat(folder)[21]) * os.sysconf("SC_PAGE_SIZE")
                was = total.get(part, (0, 0))
                total[part] = was[0] + pss, was[1] + uss
        return total


def _stat(folder: Path) -> list[str]:
    """/proc/PID/stat from its third field (state) on: the second may hold spaces."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _part(words: Sequence[str]) -> str:
    if "triton_python_backend_stub" not in Path(words[0]).name:
        return Path(words[0]).name
    return Path(words[1]).parents[1].name  # MODEL/VERSION/FILE


def descendants(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]
