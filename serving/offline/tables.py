"""Parquet and CSV files as the input of an offline job: what is in them, and their rows as blocks."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vilu.data.tables import first_line, without_surrogates
from vilu.errors import UserError
from vilu.serving.offline.blocks import BLOCK_ROWS, block, row_id
from vilu.serving.offline.files import join, resolve
from vilu.serving.offline.listing import Unit

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("image", "bytes", "path", "uri", "image_path", "file_name")  # columns tried where none is named
PARTS = ("bytes", "path")  # of a column of images as Hugging Face stores them

Look = tuple[Unit, str, dict[str, Any]]  # a table with its number of rows, its column of images, the columns kept


def look_into_parquet(unit: Unit, column: str | None, columns: Sequence[str]) -> Look:
    """Read a Parquet file's footer: its rows, its column of images or paths, and the types of the columns to keep.

    Raises:
        UserError: it is damaged, lacks a column, or its column holds only NULL, or neither images nor paths.
    """
    file = _open_parquet(unit.name)
    schema, metadata = file.schema_arrow, file.metadata
    used = _column(unit.name, schema.names, column, columns)
    kind = schema.field(used).type
    leaves = [i for i in range(metadata.num_columns) if file.schema.column(i).path.partition(".")[0] == used]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = tuple((group.num_rows, group.total_byte_size) for group in groups)
    statistics = [group.column(leaf).statistics for group in groups for leaf in leaves]
    if metadata.num_rows and all(s is not None and s.has_null_count and s.num_values == 0 for s in statistics):
        raise UserError(f"{unit.name}: column {used!r} holds only NULL")
    if not _is_images(kind) and not _is_text(kind) and not _parts(kind):
        raise UserError(f"{unit.name}: column {used!r} holds {kind}, not paths or encoded images")
    types = {name: schema.field(name).type for name in columns}
    return replace(unit, rows=metadata.num_rows, groups=sizes), used, types


def look_into_csv(unit: Unit, column: str | None, columns: Sequence[str]) -> Look:
    """Read a CSV or .tsv file: how many rows it has, and its column of paths. All that is kept is text.

    Raises:
        UserError: it is no UTF-8 CSV, or lacks a column.
    """
    try:
        with _text(unit) as file:
            reader = _rows(unit, file)
            used = _column(unit.name, list(reader.fieldnames or ()), column, columns)
            rows = sum(1 for _ in reader)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{unit.name}: cannot be read as UTF-8 CSV ({first_line(error)})") from None
    return replace(unit, rows=rows), used, text_columns(columns)


def text_columns(names: Sequence[str]) -> dict[str, Any]:
    """Return the Arrow type of columns that hold text."""
    import pyarrow as pa

    return {name: pa.string() for name in names}


def _column(where: str, names: Sequence[str], column: str | None, columns: Sequence[str]) -> str:
    used = column or next((name for name in COLUMNS if name in names), None)
    if used is None:
        raise UserError(f"{where}: has none of the columns {', '.join(COLUMNS)}; name its column of images or paths")
    for name in (used, *columns):
        if name not in names:
            raise UserError(f"{where}: has no column {name!r}, only {', '.join(map(repr, names[:8])) or 'none'}")
        if names.count(name) > 1:
            raise UserError(f"{where}: has several columns {name!r}")
    return used


def _open_parquet(name: str) -> Any:
    """Open a Parquet file. Raises UserError where it cannot be read."""
    from pyarrow import parquet

    system, path = resolve(name)
    try:
        return parquet.ParquetFile(path, filesystem=system)
    except Exception as error:  # Arrow raises many types on damaged files; the user gets one message for all
        raise UserError(f"{name}: cannot be read as Parquet ({first_line(error)})") from None


def _is_images(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view")


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view")


def _parts(kind: Any) -> list[str]:
    """Return the parts of a column of {bytes, path}, as Hugging Face stores images; none for another type."""
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return []
    names = [kind.field(i).name for i in range(kind.num_fields)]
    right = {"bytes": _is_images, "path": _is_text}
    return [name for name in PARTS if name in names and right[name](kind.field(name).type)]


def read_parquet(
    place: int, unit: Unit, group: int, start: int, rows: int, column: str, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield blocks of the first `rows` rows of a row group, whose first row is row `start` of the file."""
    import pyarrow.compute as pc

    file = _open_parquet(unit.name)
    base = posixpath.dirname(unit.name)
    done = 0
    try:
        wanted = list(dict.fromkeys([column, *columns]))
        for batch in file.iter_batches(BLOCK_ROWS, row_groups=[group], columns=wanted):
            batch = batch.slice(0, rows - done)
            if not len(batch):
                break
            cells = batch.column(column)
            parts = _parts(cells.type)
            images = pc.struct_field(cells, "bytes") if "bytes" in parts else cells if _is_images(cells.type) else None
            names = pc.struct_field(cells, "path") if "path" in parts else cells if _is_text(cells.type) else None
            paths = None if names is None else _paths(base, names.to_pylist())
            here = range(start + done, start + done + len(batch))
            if images is None:
                sources = _printable(paths or ())
            else:
                sources = [f"{without_surrogates(unit.name)}: row {row + 1}" for row in here]
            numbers = [row_id(place, row) for row in here]
            kept = {name: batch.column(name) for name in columns}
            yield block(numbers, sources, kept, images=images, paths=paths)
            done += len(batch)
    except UserError:
        raise
    except Exception as error:  # Arrow raises many types on damaged files
        raise UserError(f"{unit.name}: cannot be read as Parquet ({first_line(error)})") from None


def read_csv(place: int, unit: Unit, cap: int, column: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield blocks of the first `cap` rows of a CSV or .tsv file; a negative cap is none."""
    import pyarrow as pa

    base = posixpath.dirname(unit.name)
    with _text(unit) as file:
        rows: list[dict[str, str]] = []
        done = 0

        def made() -> pa.Table:
            numbers = [row_id(place, done + i) for i in range(len(rows))]
            kept = {name: pa.array([row[name] for row in rows], pa.string()) for name in columns}
            paths = _paths(base, [row[column] for row in rows])
            return block(numbers, _printable(paths), kept, paths=paths)

        for row in _rows(unit, file):
            if done + len(rows) == cap:
                break
            rows.append(row)
            if len(rows) == BLOCK_ROWS:
                yield made()
                done, rows = done + len(rows), []
        if rows:
            yield made()


def _text(unit: Unit) -> io.TextIOWrapper:
    system, path = resolve(unit.name)
    return io.TextIOWrapper(system.open_input_stream(path), encoding="utf-8-sig", newline="")


def _rows(unit: Unit, file: io.TextIOWrapper) -> csv.DictReader[str]:
    if unit.name.lower().endswith(".tsv"):  # has no quotes: every line is a row
        return csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.DictReader(file, strict=True)


def _paths(base: str, cells: Sequence[str | None]) -> list[str | None]:
    return [join(base, cell) if cell and cell.strip() else None for cell in cells]


def _printable(paths: Sequence[str | None]) -> list[str | None]:
    return [path and without_surrogates(path) for path in paths]
