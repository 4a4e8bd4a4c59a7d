"""Which files an offline job reads: what folders, patterns, lists and URIs stand for."""

from __future__ import annotations

import fnmatch
import glob
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from vilu.data.image_files import SUFFIXES, ignored, walk
from vilu.data.shards import expand
from vilu.data.tables import first_line
from vilu.errors import UserError
from vilu.serving.offline.files import is_uri, join, resolve

# What a folder holds is the first of these kinds that it has files of.
KINDS = {"shards": (".tar",), "images": SUFFIXES, "parquet": (".parquet",), "csv": (".csv", ".tsv")}
ENDINGS = tuple(suffix for suffixes in KINDS.values() for suffix in suffixes)


@dataclass(frozen=True, slots=True)
class Unit:
    """A file of the input.

    Attributes:
        name: its path or URI.
        size: bytes.
        changed: time of its last change in ns; 0 where the store does not say.
        rows: how many rows it holds; -1 where only reading it says so.
        groups: of a Parquet file: rows and bytes of each row group.
    """

    name: str
    size: int
    changed: int
    rows: int = -1
    groups: tuple[tuple[int, int], ...] = ()


def find(name: str, without: str | None = None) -> tuple[str, list[Unit]]:
    """Return the kind (a key of KINDS) and the files that one name stands for, but not those in the folder `without`.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    name, without = _plain(name), without and f"{_absolute(without)}/"
    try:
        if name.lower().endswith(".txt"):
            return "images", _listed(name)
        if any(sign in name for sign in "{[*?") and (is_uri(name) or not os.path.exists(name)):
            found = [unit for pattern in expand(name) for unit in _matching(pattern)]
        else:
            found = _below(name)
    except UserError:
        raise
    except Exception as error:  # stores raise many types
        raise UserError(f"{name}: cannot be read ({first_line(error)})") from None
    found = [unit for unit in found if not without or not unit.name.startswith(without)]
    for kind, suffixes in KINDS.items():
        units = [unit for unit in found if unit.name.lower().endswith(suffixes)]
        if units:
            return kind, units
    raise UserError(f"{name}: holds no {', '.join(ENDINGS)} files")


def _plain(name: str) -> str:
    return "/" + name[7:].lstrip("/") if name.lower().startswith("file://") else name


def _absolute(name: str) -> str:
    name = _plain(name).rstrip("/")
    return name if is_uri(name) else os.path.abspath(name)


def _below(name: str) -> list[Unit]:
    if not is_uri(name):
        return _below_here(os.path.abspath(name))
    from pyarrow import fs

    system, path = resolve(name)
    prefix = name[: name.index("://") + 3]
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{name}: no such file or folder")
    if info.type == fs.FileType.File:
        return [Unit(prefix + info.path, info.size, info.mtime_ns or 0)]
    inside = system.get_file_info(fs.FileSelector(path, recursive=True))
    return [
        Unit(prefix + each.path, each.size, each.mtime_ns or 0)
        for each in inside
        if each.type == fs.FileType.File and not any(map(ignored, each.path[len(path) :].split("/")))
    ]


def _below_here(path: str) -> list[Unit]:
    """Do as `_below` does for a local path, whose names may hold bytes that are no UTF-8."""
    if os.path.isdir(path):
        return [_local(os.path.join(path, name)) for name in walk(Path(path), ENDINGS)]
    if os.path.lexists(path):
        return [_local(path)]
    raise UserError(f"{path}: no such file or folder")


def _local(path: str) -> Unit:
    try:
        found = os.stat(path)
    except FileNotFoundError:  # a link to nothing is a bad image, not one image fewer
        found = os.lstat(path)
    return Unit(path, found.st_size, found.st_mtime_ns)


def _matching(pattern: str) -> list[Unit]:
    """Return the files that a pattern matches; one without wildcards must exist."""
    if not glob.has_magic(pattern):
        return _below(pattern)
    if is_uri(pattern):
        fixed = pattern[: min(pattern.index(sign) for sign in "*?[" if sign in pattern)].rpartition("/")[0]
        units = [unit for unit in _below(fixed) if fnmatch.fnmatchcase(unit.name, pattern)]
    else:
        names = [os.path.abspath(name) for name in glob.glob(pattern, recursive=True)]
        units = [_local(name) for name in names if not os.path.isdir(name)]
    if not units:
        raise UserError(f"{pattern}: matches no file")
    return units


def _listed(name: str) -> list[Unit]:
    """Return the images that a text file lists, one a line; the list's own time stands for them all."""
    (listing,) = _below(name)
    system, path = resolve(name)
    with system.open_input_stream(path) as file:
        lines = file.read().decode("utf-8-sig", "surrogateescape").split("\n")
    base = posixpath.dirname(listing.name)
    names = [join(base, line.strip()) for line in lines if line.strip()]
    if not names:
        raise UserError(f"{name}: lists no image")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(one for one in names if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise UserError(f"{name}: lists {twice} twice")
    return [Unit(one, listing.size, listing.changed) for one in names]
