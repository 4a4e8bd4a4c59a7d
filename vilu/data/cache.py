"""A cache of arrays on disk. It is written block by block, resumes after a kill, and is used only when it is whole.

A folder of the cache holds these files:

* NAME.npy: one file for each array, with a blank header until all rows are written.
* journal.jsonl: one line for each block, with the checksums of the rows that the block appended.
* lock: the file that a writing process locks.
* index.json: written last, by one rename. Without it, nothing in the folder counts as embeddings.

A resumed run keeps the blocks whose checksums in the journal match the arrays.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilu import atomic
from vilu.errors import UserError

HEADER = 128  # bytes of a .npy header, which is enough for arrays of any size
CHUNK = 1 << 22
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file grew too large"}

Skipped = list[tuple[int, str]]


def default_cache() -> Path:
    """Return the folder that keeps embeddings by default, in the XDG base directory for caches.

    Raises:
        UserError: the user has no home folder, as in a container that runs under a number.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vilu"
    except RuntimeError:
        raise UserError("no home folder is known here: set VILU_CACHE to a folder that keeps embeddings") from None


@dataclass(frozen=True)
class Stored:
    """The content of a whole folder.

    The arrays are mapped copy-on-write: torch wants writable arrays, and the files must never change.

    arrays: the arrays by name.
    skipped: index and message of each image that was skipped.
    """

    arrays: dict[str, np.ndarray]
    skipped: Skipped


ELSEWHERE = "--cache or VILU_CACHE names another folder"


def read(folder: Path, identity: Mapping[str, Any]) -> Stored | None:
    """Read a folder.

    Args:
        folder: the folder.
        identity: everything that its arrays depend on.

    Returns:
        The folder's content, or None if the folder is not whole yet.

    Raises:
        UserError: the folder has another identity, or one of its files is missing, cut short or damaged.
    """
    try:
        index = json.loads((folder / "index.json").read_text())
        kept = index["identity"]
        arrays = {
            str(name): (_row(spec), int(spec["rows"]), int(spec["crc32"])) for name, spec in index["arrays"].items()
        }
        skipped = [(int(i), str(line)) for i, line in index["skipped"]]
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); {ELSEWHERE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, "index.json", type(error).__name__) from None
    identity = json.loads(json.dumps(identity))
    if kept != identity:
        differs = next(
            (key for key in identity if not isinstance(kept, dict) or kept.get(key) != identity[key]), "more"
        )
        raise UserError(
            f"{folder}: is the cache of something else (its {differs!r} differs); delete it or name another"
        )
    found = {}
    for name, (row, rows, crc) in arrays.items():
        file = folder / f"{name}.npy"
        try:
            if file.stat().st_size != HEADER + rows * row.itemsize:
                raise _damaged(folder, file.name, f"{file.stat().st_size} bytes")
            if _crc(file, HEADER, rows * row.itemsize) != crc:
                raise _damaged(folder, file.name, "checksum")
            array = np.load(file, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            if isinstance(error, PermissionError):
                raise UserError(f"{file}: cannot be read ({error.strerror}); {ELSEWHERE}") from None
            raise _damaged(folder, file.name, str(getattr(error, "strerror", None) or error)) from None
        if array.dtype != row.base or array.shape != (rows, *row.shape):
            raise _damaged(folder, file.name, f"{array.dtype} {array.shape}")
        found[name] = array
    return Stored(found, skipped)


class Writer:
    """A context manager that appends to a folder. Only one process can hold it at a time.

    position: where the caller continues: the `position` of the last block that is safely stored, or 0.
    skipped: index and message of each image that was skipped before that position.

    Raises:
        UserError: another process is writing to the folder, or the folder cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rows: int) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.expected_rows = rows
        self.position = 0
        self.skipped: Skipped = []
        self.rows: dict[str, np.dtype] = {}
        self.counts: dict[str, int] = {}
        self.files: dict[str, Any] = {}

    def __enter__(self) -> Writer:
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a")
        try:
            self._hold()
            with _disk(self.folder):
                self._resume()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            with suppress(OSError):  # a full disk fails here again, and append has already reported it
                file.close()
        self.lock.close()  # this also releases the lock, as a kill does

    def _hold(self) -> None:
        import fcntl

        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{self.folder}: another process is writing it; wait for it or name another") from None
            raise UserError(f"{self.folder}: cannot be locked ({error.strerror})") from None

    def _resume(self) -> None:
        """Keep the blocks whose checksums match, and cut off everything after them."""
        journal = self.folder / "journal.jsonl"
        proven = 0
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        blocks = [_parsed(line) for line in lines]
        if blocks and blocks[0] == {"identity": self.identity}:
            proven = len(lines[0])
            for line, block in zip(lines[1:], blocks[1:], strict=True):
                if block is None or not self._holds(block):
                    break
                proven += len(line)
        self.files["journal"] = open(journal, "r+b" if journal.exists() else "w+b")
        self.files["journal"].truncate(proven)
        self.files["journal"].seek(proven)
        if not proven:
            self._journal({"identity": self.identity})
            for stale in self.folder.glob("*.npy"):
                stale.unlink()
        for name, row in self.rows.items():
            file = self.files[name] = open(self.folder / f"{name}.npy", "r+b")
            end = HEADER + self.counts[name] * row.itemsize
            file.truncate(end)
            file.seek(end)

    def _holds(self, block: dict[str, Any]) -> bool:
        try:
            rows = {name: _row(spec) for name, spec in block["arrays"].items()}
            for name, spec in block["arrays"].items():
                start = HEADER + self.counts.get(name, 0) * rows[name].itemsize
                if _crc(self.folder / f"{name}.npy", start, spec["rows"] * rows[name].itemsize) != spec["crc32"]:
                    return False
            for name, spec in block["arrays"].items():
                self.rows[name] = rows[name]
                self.counts[name] = self.counts.get(name, 0) + spec["rows"]
            self.skipped += [(int(i), str(line)) for i, line in block["skipped"]]
            self.position = int(block["position"])
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            return False
        return True

    def append(self, position: int, arrays: Mapping[str, np.ndarray], skipped: Skipped) -> None:
        """Append a block of rows. Once this returns, a kill loses nothing before `position`.

        Args:
            position: where the caller would continue after this block.
            arrays: rows (n, ...) to append to each array, by name.
            skipped: index and message of each image that this block skipped.

        Raises:
            UserError: the disk is full. Earlier blocks stay.
        """
        with _disk(self.folder):
            block: dict[str, Any] = {"position": position, "skipped": skipped, "arrays": {}}
            if not self.rows and arrays:
                self._room(arrays)
            for name, array in arrays.items():
                data = np.ascontiguousarray(array)
                row = np.dtype((data.dtype, data.shape[1:]))
                if name not in self.files:
                    self.files[name] = open(self.folder / f"{name}.npy", "w+b")
                    self.files[name].write(bytes(HEADER))
                self.files[name].write(data)
                self.files[name].flush()
                self.rows[name] = row
                self.counts[name] = self.counts.get(name, 0) + len(data)
                block["arrays"][name] = _spec(row, len(data), zlib.crc32(data.data))
            self._journal(block)
            self.position = position
            self.skipped += skipped

    def _journal(self, line: dict[str, Any]) -> None:
        self.files["journal"].write(json.dumps(line).encode() + b"\n")
        self.files["journal"].flush()

    def _room(self, arrays: Mapping[str, np.ndarray]) -> None:
        need = self.expected_rows * sum(array[0].nbytes for array in arrays.values())
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(f"{self.folder}: needs {need / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free")

    def finish(self) -> Stored:
        """Write the headers and then the index, which makes the folder whole. Return its content."""
        with _disk(self.folder):
            specs = {}
            for name, row in self.rows.items():
                shape = (self.counts[name], *row.shape)
                text = f"{{'descr': {row.base.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
                head = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little")
                file = self.files[name]
                file.seek(0)
                file.write(head + text.ljust(HEADER - 11).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                size = self.counts[name] * row.itemsize
                specs[name] = _spec(row, self.counts[name], _crc(self.folder / f"{name}.npy", HEADER, size))
            index = {"identity": self.identity, "arrays": specs, "skipped": self.skipped}
            atomic.write(self.folder / "index.json", json.dumps(index))
            (self.folder / "journal.jsonl").unlink()
        stored = read(self.folder, self.identity)
        if stored is None:
            raise _damaged(self.folder, "index.json", "gone since it was written")
        return stored


class Memory:
    """A stand-in for Writer that keeps everything in memory, for callers that want no cache."""

    def __init__(self) -> None:
        self.position = 0
        self.skipped: Skipped = []
        self.parts: dict[str, list[np.ndarray]] = {}

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def append(self, position: int, arrays: Mapping[str, np.ndarray], skipped: Skipped) -> None:
        for name, array in arrays.items():
            self.parts.setdefault(name, []).append(array)
        self.position = position
        self.skipped += skipped

    def finish(self) -> Stored:
        return Stored({name: np.concatenate(parts) for name, parts in self.parts.items()}, self.skipped)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UserError with one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"{folder}: {FULL[error.errno]}; what is there stays, a rerun goes on from it") from None
        raise UserError(f"{folder}: cannot be written ({error.strerror}); {ELSEWHERE}") from None


def _spec(row: np.dtype, rows: int, crc: int) -> dict[str, Any]:
    return {"dtype": row.base.str, "shape": list(row.shape), "rows": rows, "crc32": crc}


def _row(spec: Mapping[str, Any]) -> np.dtype:
    base = np.dtype(str(spec["dtype"]))
    if base.kind != "f":
        raise ValueError(f"dtype {base}")
    return np.dtype((base, tuple(int(side) for side in spec["shape"])))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _crc(file: Path, start: int, size: int) -> int:
    """Return the CRC-32 of `size` bytes of a file from `start` on, or of fewer where the file ends earlier."""
    crc = 0
    with open(file, "rb") as data:
        data.seek(start)
        while size > 0 and (chunk := data.read(min(size, CHUNK))):
            crc = zlib.crc32(chunk, crc)
            size -= len(chunk)
    return crc


def _damaged(folder: Path, file: str, reason: str) -> UserError:
    return UserError(f"{folder / file}: damaged ({reason}); delete {folder} to have it made again")
