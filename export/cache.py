"""Files and arrays that an export keeps for the next one: traced towers, and what towers answered on the sample.

An entry is a folder named by the SHA-256 of everything that its content depends on. It holds its files and index.json
with their sizes and SHA-256s; it appears whole, by one rename, and an entry whose bytes differ from its index is
deleted and made again. Only a folder that belongs to this user, and that nobody else can write, is used: the index
proves that the bytes are those that were kept, not who kept them. A cache that cannot be used makes an export slower,
and never makes it fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from vilu import atomic
from vilu.errors import UserError

INDEX = "index.json"
MAX_INDEX = 1 << 16  # bytes; an index names a few files
MAX_BYTES = 8 << 30  # of all entries: the towers of a few large CLIPs
ABANDONED = 24 * 3600  # seconds after which what a killed export left is deleted
CHUNK = 1 << 22
ARRAYS = "arrays.safetensors"


def key(**parts: Any) -> str:
    """The name of an entry: SHA-256 of `parts`, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest(*content: Path | np.ndarray) -> str:
    """SHA-256 of files and arrays, in this order."""
    found = hashlib.sha256()
    for part in content:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while chunk := file.read(CHUNK):
                    found.update(chunk)
        else:
            found.update(f"{part.dtype} {part.shape}".encode())
            found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Entries below a folder.

    Attributes:
        folder: made where it is absent; None: nothing is kept.
        max_bytes: of all entries; those not used for the longest time are deleted beyond it.
    """

    folder: Path | None
    max_bytes: int = MAX_BYTES

    def fetch(self, name: str, into: Path) -> bool:
        """Copy the files of an entry into a folder, each proven while it is copied; False: nothing was copied."""
        copied = []
        with self._entry(name) as found:
            for file, (size, checksum) in found.items():
                copied.append(into / file)
                _copy(self._path(name) / file, into / file, size, checksum)
            return bool(found)
        for file in copied:  # the entry is damaged
            file.unlink(missing_ok=True)
        return False

    def keep(self, name: str, files: Sequence[Path]) -> None:
        """Keep copies of these files as an entry, if the cache has room for them."""
        size = sum(file.stat().st_size for file in files)
        if not self._usable() or size > self.max_bytes:
            return
        with suppress(OSError, UserError):
            self._make_room(size)
            if shutil.disk_usage(self._path("")).free < 2 * size:
                return
            with atomic.folder(self._path(name)) as part:
                index = {}
                for file in files:
                    shutil.copyfile(file, part / file.name)
                    index[file.name] = [file.stat().st_size, digest(part / file.name)]
                (part / INDEX).write_text(json.dumps(index))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an entry; none where there is no such entry."""
        with self._entry(name) as found:
            if set(found) == {ARRAYS}:
                size, checksum = found[ARRAYS]
                with _open(self._path(name) / ARRAYS, size) as file:
                    content = file.read()
                if hashlib.sha256(content).hexdigest() != checksum:
                    raise ValueError("checksum")
                return load(content)
        return {}

    def keep_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays as an entry, in the place of one that is there."""
        if not self._usable():
            return
        with suppress(OSError, UserError):
            content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
            with atomic.folder(self._path(name)) as part:
                (part / ARRAYS).write_bytes(content)
                (part / INDEX).write_text(json.dumps({ARRAYS: [len(content), hashlib.sha256(content).hexdigest()]}))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    def _usable(self) -> bool:
        """Whether the folder is there, or can be made, and nobody else can write it."""
        if self.folder is None:
            return False
        with suppress(OSError):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            state = os.lstat(self.folder)
            return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o022
        return False

    @contextmanager
    def _entry(self, name: str) -> Iterator[dict[str, tuple[int, str]]]:
        """The index of an entry, empty where there is none. An entry that the block finds damaged is deleted."""
        found = self._index(name) if self._usable() else {}
        try:
            yield found
        except (OSError, ValueError, UserError):
            shutil.rmtree(self._path(name), ignore_errors=True)

    def _index(self, name: str) -> dict[str, tuple[int, str]]:
        index = self._path(name) / INDEX
        try:
            with _open(index, MAX_INDEX) as file:
                read = json.loads(file.read(MAX_INDEX))
            found = {str(file): (int(size), str(checksum)) for file, (size, checksum) in read.items()}
            if any(Path(file).name != file or file in (INDEX, "..") for file in found):
                raise ValueError("a file outside the entry")
            os.utime(index)  # used now
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            shutil.rmtree(self._path(name), ignore_errors=True)
            return {}
        return found

    def _make_room(self, size: int) -> None:
        """Delete the entries that were not used for the longest time, and what killed exports left."""
        entries = []
        for path in self._path("").iterdir():
            if path.name.startswith("."):
                if time.time() - path.lstat().st_mtime > ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            with suppress(OSError):
                held = sum(file.lstat().st_size for file in path.iterdir())
                used = (path / INDEX).stat().st_mtime if (path / INDEX).exists() else 0.0
                entries.append((used, held, path))
        total = size + sum(held for _, held, _ in entries)
        for _, held, path in sorted(entries):
            if total <= self.max_bytes:
                break
            shutil.rmtree(path, ignore_errors=True)
            total -= held


NO_CACHE = Cache(None)


def _open(path: Path, most: int) -> Any:
    """Open a plain file of at most `most` bytes; raises OSError or ValueError for anything else."""
    file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode) or state.st_size > most:
        file.close()
        raise ValueError(f"{path}: not a file of at most {most} bytes")
    return file


def _copy(source: Path, target: Path, size: int, checksum: str) -> None:
    found = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _open(source, size) as read, open(target, "wb") as write:
        while chunk := read.read(CHUNK):
            found.update(chunk)
            write.write(chunk)
    if found.hexdigest() != checksum:
        raise ValueError(f"{source}: checksum")
