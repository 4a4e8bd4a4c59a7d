"""Files anywhere: local paths, and URIs that pyarrow or fsspec opens."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from vilu.data.source import READ_LIMIT
from vilu.data.tables import first_line
from vilu.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_REFUSED = {"http", "https", "ftp"}  # a download is not a read: it changes, and its host may not answer
_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_ATTEMPTS = 4


def is_uri(name: str) -> bool:
    """Return whether a name starts with a scheme, such as s3://."""
    return _SCHEME.match(name) is not None


def resolve(name: str | os.PathLike[str]) -> tuple[Any, str]:
    """Return the pyarrow file system of a path or URI, and the path inside it.

    Raises:
        UserError: nothing here opens such a URI.
    """
    from pyarrow import fs

    name = os.fspath(name)
    found = _SCHEME.match(name)
    if found is None:
        return fs.LocalFileSystem(), os.path.abspath(name)
    scheme, rest = found[1].lower(), name[found.end() :]
    if scheme in _REFUSED:
        raise UserError(f"{name}: URLs are not read; download the images first")
    if scheme == "file":
        return fs.LocalFileSystem(), os.path.abspath("/" + rest.lstrip("/"))
    return _remote(f"{found[1]}://{rest.partition('/')[0]}"), rest.rstrip("/")


@lru_cache(maxsize=64)
def _remote(root: str) -> Any:
    from pyarrow import fs

    try:
        system, _ = fs.FileSystem.from_uri(root)
        return system
    except (ValueError, NotImplementedError):
        pass  # pyarrow does not know the scheme; fsspec may
    except Exception as error:  # a client raises many types where it cannot reach its store
        raise UserError(f"{root}: cannot be opened ({first_line(error)})") from None
    try:
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(root.partition("://")[0])))
    except Exception as error:  # fsspec raises ValueError, and ImportError where the scheme's package is missing
        raise UserError(f"{root}: cannot be opened ({first_line(error)})") from None


def join(base: str, name: str) -> str:
    """Return a table's path as it counts from the folder `base`: absolute paths and URIs stay as they are."""
    if is_uri(name) or posixpath.isabs(name):
        return name
    return posixpath.join(base, name)


def read_image(path: str) -> bytes | str:
    """Return a file's bytes, or a line that says why this file cannot be read.

    No more is read than the preprocessing accepts, and one byte, so that it refuses a larger file.

    Raises:
        UserError: the store or the disk failed, four times over. The file itself may be well, so it is no bad image.
    """
    if path.startswith(("http://", "https://", "ftp://")):
        return "cannot be read (URLs are not read; download the images first)"
    for attempt in range(_ATTEMPTS):
        try:
            if not is_uri(path):
                if os.path.exists(path) and not os.path.isfile(path):
                    return "cannot be read (not a file)"  # opening a FIFO could block for ever
                with open(path, "rb") as local:
                    return local.read(READ_LIMIT)
            system, inside = resolve(path)
            with system.open_input_stream(inside) as stream:
                data: bytes = stream.read(READ_LIMIT)
                return data
        except ValueError as error:  # a NUL in the name
            return f"cannot be read ({first_line(error)})"
        except OSError as error:
            if error.errno in _OF_THE_FILE or isinstance(error, FileNotFoundError | PermissionError):
                return f"cannot be read ({os.strerror(error.errno) if error.errno else first_line(error)})"
            if attempt == _ATTEMPTS - 1:
                raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
            time.sleep(0.5 * 4**attempt)
    raise AssertionError


def output_folder(output: str | os.PathLike[str]) -> tuple[Any, str]:
    """Return the file system and the path of an output folder, which is made where it is missing.

    Raises:
        UserError: it cannot be made or written to.
    """
    system, path = resolve(output)
    try:
        system.create_dir(path, recursive=True)
        probe = f"{path}/.probe-{os.getpid()}"  # hidden: a kill may leave it
        with system.open_output_stream(probe) as file:
            file.write(b"0")
        system.delete_file(probe)
    except Exception as error:  # stores raise many types
        raise UserError(f"{output}: cannot be written ({first_line(error)})") from None
    return system, path


def write(system: Any, path: str, content: bytes) -> None:
    """Write a small file whole: beside its place, then moved into it.

    Raises:
        UserError: it cannot be written.
    """
    part = f"{path}.part"
    try:
        with system.open_output_stream(part) as file:
            file.write(content)
        system.move(part, path)
    except Exception as error:  # stores raise many types
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None


def read(system: Any, path: str) -> bytes | None:
    """Return a small file's content, or None where there is no such file."""
    try:
        with system.open_input_stream(path) as file:
            content: bytes = file.read()
            return content
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def name_of(path: str) -> str:
    """Return the last part of a path."""
    return Path(path).name
