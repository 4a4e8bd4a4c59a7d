"""The input of an offline job: what is in it, in a fixed order, so that every row has a number that stays its own."""

from __future__ import annotations

import csv
import fnmatch
import glob
import hashlib
import io
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from vilu.data.image_files import SUFFIXES
from vilu.data.shards import expand
from vilu.data.tables import first_line, without_surrogates
from vilu.errors import UserError
from vilu.serving.offline.files import is_uri, join, resolve

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

KINDS = {"shards": (".tar",), "images": SUFFIXES, "parquet": (".parquet",), "csv": (".csv", ".tsv")}
COLUMNS = ("image", "bytes", "path", "uri", "image_path", "file_name")  # columns tried where none is named
IMAGE, PATH = "__image", "__path"  # a row's encoded image, else its file; never written
BLOCK_ROWS, BLOCK_BYTES = 128, 32 << 20  # a block of rows ends at the first of these
TASK_ROWS = 32 * BLOCK_ROWS  # images of a folder that one task lists
UNIT_BITS = 32  # a row's number: the file's place in the order, then the row's place in the file
LISTERS = 32  # files looked into at a time


@dataclass(frozen=True)
class Unit:
    """A file of the input.

    Attributes:
        name: its path or URI.
        size: bytes.
        changed: time of its last change in ns; 0 where the store does not say.
        rows: how many rows it holds; -1 where only reading it says so.
    """

    name: str
    size: int
    changed: int
    rows: int = -1


@dataclass(frozen=True)
class Input:
    """All rows that a job reads.

    Attributes:
        kind: "images" (each unit is one row), "shards", "parquet" or "csv".
        units: the files, in the order that numbers the rows.
        column: of a table: its column of images or paths.
        columns: columns of a table that are carried into the output, with their Arrow types.
        caps: of a shard: how many rows of it are read, where a limit cuts it short.
    """

    kind: str
    units: list[Unit]
    column: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    caps: dict[int, int] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """How many rows there are; None where only reading them says so."""
        if self.kind == "images":
            return len(self.units)
        counts = [self.caps.get(place, unit.rows) for place, unit in enumerate(self.units)]
        return None if -1 in counts else sum(counts)

    def key(self) -> str:
        """Return SHA-256, in hexadecimal, of the files' names, sizes and times, and of what is read of them."""
        digest = hashlib.sha256(
            repr((self.kind, self.column, sorted(self.columns), sorted(self.caps.items()))).encode()
        )
        for unit in self.units:
            digest.update(f"{unit.name}\0{unit.size}\0{unit.changed}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def tasks(self) -> list[tuple[Any, int, int]]:
        """Return the pieces to read as (function that yields tables, rows or -1, bytes)."""
        if self.kind == "images":
            starts = range(0, len(self.units), TASK_ROWS)
            parts = [(start, self.units[start : start + TASK_ROWS]) for start in starts]
            return [(partial(_list_images, start, [u.name for u in part]), len(part), 0) for start, part in parts]
        pieces: list[tuple[Any, int, int]] = []
        for place, unit in enumerate(self.units):
            cap = self.caps.get(place, -1)
            if self.kind == "parquet":
                pieces += self._row_groups(place, unit, cap)
            elif cap != 0:
                read = partial(_read_shard, place, unit, cap)
                if self.kind == "csv":
                    read = partial(_read_csv, place, unit, cap, self.column, list(self.columns))
                pieces.append((read, cap if cap >= 0 else unit.rows, unit.size))
        return pieces

    def _row_groups(self, place: int, unit: Unit, cap: int) -> Iterator[tuple[Any, int, int]]:
        metadata = _parquet(unit.name).metadata
        start = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            wanted = rows if cap < 0 else min(rows, cap - start)
            if wanted > 0:
                read = partial(_read_parquet, place, unit, group, start, wanted, self.column, list(self.columns))
                yield read, wanted, metadata.row_group(group).total_byte_size
            start += rows


def open_input(
    names: Sequence[str], *, column: str | None = None, columns: Sequence[str] = (), limit: int | None = None
) -> Input:
    """Find what the names hold. Nothing but listings, footers and the ends of shards is read.

    Args:
        names: folders, patterns, images, text files that list images (one a line), WebDataset shards, Parquet or CSV
            files; all of one kind; local or as URIs.
        column: a table's column of encoded images, or of paths, which count from the table's folder. None: the first
            of COLUMNS that it has.
        columns: a table's columns to carry along.
        limit: read the first so many rows; None reads all.

    Raises:
        UserError: there is nothing to read, the files are of several kinds, one is damaged or cut short, or a table
            lacks a column.
    """
    kinds: dict[str, list[Unit]] = {}
    for name in names:
        kind, units = _find(str(name))
        kinds.setdefault(kind, []).extend(units)
    if len(kinds) != 1:
        raise UserError(f"the input mixes {' and '.join(sorted(kinds))}: score them one after the other")
    ((kind, units),) = kinds.items()
    units = sorted({unit.name: unit for unit in units}.values(), key=lambda unit: unit.name)
    if (columns or column) and kind in ("images", "shards"):
        raise UserError(f"{names[0]}: only a table has columns, and this holds {kind}")
    if kind == "images":
        return Input(kind, units[:limit])
    with ThreadPoolExecutor(LISTERS) as pool:
        if kind == "shards":
            list(pool.map(_check_shard, units))
            return Input(kind, units, caps=_shard_caps(units, limit))
        look = _look_into_parquet if kind == "parquet" else _look_into_csv
        tables = list(pool.map(lambda unit: look(unit, column, columns), units))
    used, types = tables[0][1], tables[0][2]
    for unit, other, carried in tables:
        if (other, carried) != (used, types):
            raise UserError(f"{unit.name}: has other columns than {units[0].name}")
    units = [unit for unit, _, _ in tables]
    if not sum(unit.rows for unit in units):
        raise UserError(f"{names[0]}: holds no rows")
    caps = {}
    for place, unit in enumerate(units):
        if limit is not None:
            caps[place] = min(unit.rows, limit)
            limit -= caps[place]
    return Input(kind, units, used, types, caps)


def _find(name: str) -> tuple[str, list[Unit]]:
    """Return the kind and the files that one name stands for."""
    if name.lower().startswith("file://"):
        name = "/" + name[7:].lstrip("/")
    try:
        if name.endswith(".txt"):
            return "images", _listed(name)
        if any(sign in name for sign in "{[*?") and (is_uri(name) or not os.path.exists(name)):
            found = [unit for pattern in expand(name) for unit in _matching(pattern)]
        else:
            found = _below(name)
    except UserError:
        raise
    except Exception as error:  # stores raise many types
        raise UserError(f"{name}: cannot be read ({first_line(error)})") from None
    for kind, suffixes in KINDS.items():
        units = [unit for unit in found if unit.name.lower().endswith(suffixes)]
        if units:
            return kind, units
    endings = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
    raise UserError(f"{name}: holds no {endings} files")


def _below(name: str) -> list[Unit]:
    if not is_uri(name):
        return _below_here(os.path.abspath(name))
    from pyarrow import fs

    system, path = resolve(name)
    prefix = name[: name.index("://") + 3]
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{name}: no such file or folder")
    infos = [info] if info.type == fs.FileType.File else system.get_file_info(fs.FileSelector(path, recursive=True))
    return [
        Unit(prefix + each.path, each.size, each.mtime_ns or 0)
        for each in infos
        if each.type == fs.FileType.File and (each is info or not _hidden(each.path[len(path) :]))
    ]


def _below_here(path: str) -> list[Unit]:
    """Do as `_below` does for a local path, whose names may hold bytes that are no UTF-8."""
    if os.path.isdir(path):
        walk = os.walk(path, onerror=_raise)  # a folder that cannot be listed must not be passed over
        names = [os.path.join(parent, file) for parent, _, files in walk for file in files]
        names = [name for name in names if not _hidden(name[len(path) :])]
    elif os.path.exists(path):
        names = [path]
    else:
        raise UserError(f"{path}: no such file or folder")
    stats = [(name, os.stat(name)) for name in names if os.path.isfile(name)]
    return [Unit(name, found.st_size, found.st_mtime_ns) for name, found in stats]


def _raise(error: OSError) -> None:
    raise error


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _matching(pattern: str) -> list[Unit]:
    """Return the files that a pattern matches; one without wildcards must exist."""
    if not glob.has_magic(pattern):
        return _below(pattern)
    if not is_uri(pattern):
        names = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        if not names:
            raise UserError(f"{pattern}: matches no file")
        return [unit for name in names for unit in _below(name)]
    fixed = pattern[: min(pattern.index(sign) for sign in "*?[" if sign in pattern)].rpartition("/")[0]
    units = [unit for unit in _below(fixed) if fnmatch.fnmatch(unit.name, pattern)]
    if not units:
        raise UserError(f"{pattern}: matches no file")
    return units


def _listed(name: str) -> list[Unit]:
    """Return the images that a text file lists, one a line; the list's own time stands for them all."""
    (listing,) = _below(name)
    system, path = resolve(name)
    with system.open_input_stream(path) as file:
        lines = file.read().decode("utf-8", "surrogateescape").splitlines()
    base = posixpath.dirname(listing.name)
    names = [join(base, line.strip()) for line in lines if line.strip()]
    if not names:
        raise UserError(f"{name}: lists no image")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(one for one in names if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise UserError(f"{name}: lists {twice} twice")
    return [Unit(one, listing.size, listing.changed) for one in names]


def _check_shard(unit: Unit) -> None:
    """Raise UserError for a tar file without its end marker: a download or a writer that was cut short."""
    try:
        system, path = resolve(unit.name)
        with system.open_input_file(path) as file:
            file.seek(max(unit.size - 512, 0))
            whole = unit.size % 512 == 0 and unit.size >= 1024 and file.read(512) == bytes(512)
    except OSError as error:
        raise UserError(f"{unit.name}: cannot be read ({first_line(error)})") from None
    if not whole:
        raise UserError(f"{unit.name}: is cut short or damaged (no end marker)")


def _shard_caps(units: Sequence[Unit], limit: int | None) -> dict[int, int]:
    caps = {}
    for place, unit in enumerate(units):
        if limit is not None:
            caps[place] = sum(1 for _ in _members(unit, limit)) if limit else 0
            limit -= caps[place]
    return caps


def _look_into_parquet(unit: Unit, column: str | None, columns: Sequence[str]) -> tuple[Unit, str, dict[str, Any]]:
    file = _parquet(unit.name)
    names = file.schema_arrow.names
    used = _column(unit.name, names, column, columns)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    leaf = next(
        (i for i in range(file.metadata.num_columns) if file.schema.column(i).path.partition(".")[0] == used), None
    )
    statistics = [group.column(leaf).statistics for group in groups] if leaf is not None else [None]
    if file.metadata.num_rows and all(s is not None and s.has_null_count and s.num_values == 0 for s in statistics):
        raise UserError(f"{unit.name}: column {used!r} holds only NULL")
    types = {name: file.schema_arrow.field(name).type for name in columns}
    return Unit(unit.name, unit.size, unit.changed, file.metadata.num_rows), used, types


def _look_into_csv(unit: Unit, column: str | None, columns: Sequence[str]) -> tuple[Unit, str, dict[str, Any]]:
    import pyarrow as pa

    try:
        with _text(unit) as file:
            reader = csv.DictReader(file, delimiter="\t" if unit.name.lower().endswith(".tsv") else ",", strict=True)
            used = _column(unit.name, list(reader.fieldnames or ()), column, columns)
            rows = sum(1 for _ in reader)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{unit.name}: cannot be read as UTF-8 CSV ({first_line(error)})") from None
    return Unit(unit.name, unit.size, unit.changed, rows), used, {name: pa.string() for name in columns}


def _column(where: str, names: Sequence[str], column: str | None, columns: Sequence[str]) -> str:
    used = column or next((name for name in COLUMNS if name in names), None)
    if used is None:
        raise UserError(f"{where}: has none of the columns {', '.join(COLUMNS)}; name its column of images or paths")
    for name in (used, *columns):
        if name not in names:
            raise UserError(f"{where}: has no column {name!r}, only {', '.join(map(repr, names[:8])) or 'none'}")
    return used


def _parquet(name: str) -> Any:
    from pyarrow import parquet

    system, path = resolve(name)
    try:
        return parquet.ParquetFile(path, filesystem=system)
    except Exception as error:  # Arrow raises many types on damaged files; the user gets one message for all
        raise UserError(f"{name}: cannot be read as Parquet ({first_line(error)})") from None


def _text(unit: Unit) -> io.TextIOWrapper:
    system, path = resolve(unit.name)
    return io.TextIOWrapper(system.open_input_stream(path), encoding="utf-8-sig", newline="")


def row_id(place: int, row: int) -> int:
    """Return the number of a row: unique in the input, and the same in every run over it."""
    return place << UNIT_BITS | row


def place_of(ids: np.ndarray) -> list[int]:
    """Return a number for each row id (N,) that counts up by one from row to row of a file, or of a folder."""
    places: list[int] = ((ids >> UNIT_BITS) + (ids & ((1 << UNIT_BITS) - 1))).tolist()
    return places


def _list_images(start: int, names: Sequence[str]) -> Iterator[pa.Table]:
    for first in range(0, len(names), BLOCK_ROWS):
        some = [without_surrogates(name) for name in names[first : first + BLOCK_ROWS]]
        numbers = [row_id(start + first + i, 0) for i in range(len(some))]
        yield _block(numbers, some, path=list(names[first : first + BLOCK_ROWS]))


def _members(unit: Unit, cap: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield the name and the bytes of each image of a shard. An image has the name STEM.jpg, STEM without a dot."""
    count = 0
    try:
        system, path = resolve(unit.name)
        with system.open_input_file(path) as raw:
            file: Any = io.BufferedReader(raw, 4 << 20)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                    base = member.name.rpartition("/")[2]
                    stem, _, extension = base.partition(".")
                    plain = member.isreg() and member.sparse is None and stem
                    if not plain or f".{extension.lower()}" not in SUFFIXES:
                        continue
                    if count == cap:
                        return
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                    if len(data) != member.size:
                        raise UserError(f"{unit.name}: is cut short within {without_surrogates(member.name)}")
                    yield without_surrogates(member.name), data
                    count += 1
                # tarfile takes a damaged header for the end of the file. The true end is a block of zeros.
                file.seek(tar.offset)
                if file.read(512) != bytes(512):
                    raise UserError(f"{unit.name}: is damaged after {tar.offset} bytes (no end marker)")
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise UserError(f"{unit.name}: cannot be read as a plain tar file ({first_line(error)})") from None


def _read_shard(place: int, unit: Unit, cap: int) -> Iterator[pa.Table]:
    numbers: list[int] = []
    sources: list[str] = []
    images: list[bytes | None] = []
    held = 0
    for row, (name, data) in enumerate(_members(unit, cap)):
        numbers.append(row_id(place, row))
        sources.append(f"{without_surrogates(unit.name)}: {name}")
        images.append(data)
        held += len(data or b"")
        if len(numbers) == BLOCK_ROWS or held >= BLOCK_BYTES:
            yield _block(numbers, sources, image=images)
            numbers, sources, images, held = [], [], [], 0
    if numbers:
        yield _block(numbers, sources, image=images)


def _read_parquet(
    place: int, unit: Unit, group: int, start: int, rows: int, column: str, columns: Sequence[str]
) -> Iterator[pa.Table]:
    import pyarrow as pa

    file = _parquet(unit.name)
    base = posixpath.dirname(unit.name)
    done = 0
    try:
        wanted = list(dict.fromkeys([column, *columns]))
        for batch in file.iter_batches(BLOCK_ROWS, row_groups=[group], columns=wanted):
            batch = batch.slice(0, rows - done)
            if not len(batch):
                break
            cells = batch.column(column)
            if pa.types.is_struct(cells.type):  # the layout of Hugging Face: {bytes, path}
                cells = cells.field("bytes")
            numbers = [row_id(place, start + done + i) for i in range(len(batch))]
            kept = {name: batch.column(name) for name in columns}
            if pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type):
                sources = [f"{without_surrogates(unit.name)}: row {start + done + i + 1}" for i in range(len(batch))]
                yield _block(numbers, sources, kept, image=cells)
            elif pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
                yield _paths(numbers, cells.to_pylist(), base, kept)
            else:
                raise UserError(f"{unit.name}: column {column!r} holds {cells.type}, not paths or encoded images")
            done += len(batch)
    except UserError:
        raise
    except Exception as error:  # Arrow raises many types on damaged files
        raise UserError(f"{unit.name}: cannot be read as Parquet ({first_line(error)})") from None


def _read_csv(place: int, unit: Unit, cap: int, column: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    import pyarrow as pa

    base = posixpath.dirname(unit.name)
    with _text(unit) as file:
        reader = csv.DictReader(file, delimiter="\t" if unit.name.lower().endswith(".tsv") else ",", strict=True)
        rows: list[dict[str, str]] = []
        done = 0

        def block() -> pa.Table:
            numbers = [row_id(place, done + i) for i in range(len(rows))]
            kept = {name: pa.array([row[name] for row in rows], pa.string()) for name in columns}
            return _paths(numbers, [row[column] for row in rows], base, kept)

        for row in reader:
            if cap >= 0 and done + len(rows) == cap:
                break
            rows.append(row)
            if len(rows) == BLOCK_ROWS:
                yield block()
                done, rows = done + len(rows), []
        if rows:
            yield block()


def _paths(numbers: Sequence[int], cells: Sequence[str | None], base: str, kept: dict[str, Any]) -> pa.Table:
    paths = [join(base, cell) if cell and cell.strip() else None for cell in cells]
    return _block(numbers, [path and without_surrogates(path) for path in paths], kept, path=paths)


def _block(
    numbers: Iterable[int], sources: Iterable[str | None], kept: dict[str, Any] | None = None, **content: Any
) -> pa.Table:
    """Return rows with their number, the name for people, the columns carried along, and IMAGE or PATH."""
    import pyarrow as pa

    ((name, cells),) = content.items()
    columns = {"row_id": pa.array(numbers, pa.int64()), "source": pa.array(sources, pa.string()), **(kept or {})}
    if name == "path":  # a file's name may hold bytes that are no UTF-8
        columns[PATH] = pa.array([cell and cell.encode("utf-8", "surrogateescape") for cell in cells], pa.binary())
    else:
        columns[IMAGE] = (
            cells.cast(pa.large_binary()) if isinstance(cells, pa.Array) else pa.array(cells, pa.large_binary())
        )
    return pa.table(columns)
