"""Files and folders that appear whole or not at all: written beside their place, then renamed into it.

After a kill at any point the path holds the whole old content or the whole new one. What a kill leaves is a hidden
`.NAME.part-…` beside it, which is safe to delete. An exception, an interrupt among them, leaves nothing.

A new file or folder has the permissions that `open()` or `mkdir()` gives it; one that is replaced keeps its own. A
symbolic link stays a link: what it points to is replaced. The content is on the disk (fsync) before it takes its name.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vilu.errors import UserError

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def write(path: str | os.PathLike[str], content: str | bytes | memoryview) -> None:
    """Write a file; text as UTF-8, with its line ends as they are.

    Raises:
        UserError: the path cannot be written; it is as it was.
    """
    with file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file, with the suffix of `path`, that takes the place of `path` once the block has ended well.

    Raises:
        UserError: the path cannot be written, or the block ended in an OSError; the path is as it was.
    """
    with _one_line(path):
        target, part = _places(path)
        try:
            earlier = _earlier(target, stat.S_ISREG, "it is not a file")
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield part
            _own_like(part, earlier)
            _flush(part)
            os.replace(part, target)
            _flush(target.parent)
        finally:
            with suppress(OSError):
                part.unlink()


@contextmanager
def folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder that takes the place of `path`, with all that is there, once the block has ended well.

    Folders above it are made where they are missing. Where the file system cannot exchange two folders (Linux can, on
    most), a kill in one instant leaves the old one under its hidden name, `.NAME.part-….old`, and nothing at `path`.

    Raises:
        UserError: the path cannot be written, or the block ended in an OSError; the path is as it was.
    """
    with _one_line(path):
        target, part = _places(path)
        old = part.with_name(f"{part.name}.old")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            earlier = _earlier(target, stat.S_ISDIR, "it is not a folder")
            part.mkdir()
            yield part
            _own_like(part, earlier)
            for here, _, names in os.walk(part):
                for name in names:
                    if not os.path.islink(os.path.join(here, name)):
                        _flush(Path(here, name))
                _flush(Path(here))
            if earlier is None:
                os.rename(part, target)
            elif not _exchange(part, target):
                os.rename(target, old)
                os.rename(part, target)
            _flush(target.parent)
        finally:
            if old.exists() and not target.exists():
                os.rename(old, target)
            for left in (part, old):
                shutil.rmtree(left, ignore_errors=True)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise UserError now where `folder(path)` would: before the work whose result it is to hold."""
    with _one_line(path):
        target, part = _places(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _earlier(target, stat.S_ISDIR, "it is not a folder")
        part.mkdir()
        part.rmdir()


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise UserError now where `file(path)` would: before the work whose result it is to hold."""
    with _one_line(path):
        target, part = _places(path)
        _earlier(target, stat.S_ISREG, "it is not a file")
        part.touch(exist_ok=False)
        part.unlink()


@contextmanager
def _one_line(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be written ({error.strerror or error})") from None


def _places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Where the content goes, links followed, and a name beside it that nobody else takes."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{target.stem[:40]}.part-{secrets.token_hex(8)}{target.suffix[:20]}")


def _earlier(target: Path, kind: Callable[[int], bool], problem: str) -> os.stat_result | None:
    """The state of what is there, None where nothing is. Raises OSError where it is of another kind."""
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    if not kind(found.st_mode):
        raise OSError(problem)
    return found


def _own_like(part: Path, earlier: os.stat_result | None) -> None:
    if earlier is not None:
        with suppress(OSError):  # only root may give files away
            os.chown(part, earlier.st_uid, earlier.st_gid)
        part.chmod(stat.S_IMODE(earlier.st_mode))


def _flush(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's names; some file systems cannot, for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system has none (then nothing has changed)."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
