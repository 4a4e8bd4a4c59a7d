"""Tables of image paths and captions: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vilu.data.image_files import SUFFIXES
from vilu.data.source import FileSource, inside, refuse_url
from vilu.data.splits import no_split, split_named
from vilu.errors import UserError

TABLES = (".csv", ".tsv", ".parquet")

Row = tuple[str, Mapping[str, Any]]  # its place, for messages, and its cells by column


def open_table(path: Path, image_column: str, caption_column: str, split: str) -> FileSource:
    """Open a table of image paths and captions: CSV with commas, .tsv with tabs, or Parquet.

    A CSV or .tsv file is UTF-8 and starts with a header. In a CSV file, a cell with a comma stands in double quotes. A
    .tsv file has no quotes, as CC3M's has none: every line is one row. Paths are absolute, or relative to the table's
    folder. Where the table has a column "split", only the rows of the split are taken.

    Args:
        path: the table.
        image_column: name of the column of paths.
        caption_column: name of the column of captions.
        split: "train", "val" or "test".

    Raises:
        UserError: the table cannot be read, lacks a column, has no rows, a row with another number of cells, an empty
            caption or an unknown split, or a path leaves its folder or is a URL.
    """
    suffix = path.suffix.lower()
    wanted = (image_column, caption_column)
    rows = {".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}[suffix](path, wanted)
    paths: list[str] = []
    captions: list[str] = []
    there: set[str] = set()
    for where, row in rows:
        own = {_split(where, row[column]) for column in row if _is_split(column, wanted)}
        there |= own
        if own and own != {split}:
            continue
        image, caption = row[image_column], row[caption_column]
        if not isinstance(image, str | None) or not isinstance(caption, str | None):
            raise UserError(f"{path}: columns {image_column!r} and {caption_column!r} must hold text")
        if not caption or not caption.strip():
            raise UserError(f"{where}: empty caption")
        refuse_url(image or "", where)
        absolute = os.path.isabs(image or "") and "\0" not in (image or "")
        paths.append(os.path.normpath(image or "") if absolute else inside(path.parent, image or "", where))
        captions.append(caption.strip())
    if not paths:
        raise no_split(path, split, there) if there else UserError(f"{path}: holds no rows")
    return FileSource(name=path.stem, root=path.parent, paths=paths, captions=captions)


def _is_split(column: str, wanted: Sequence[str]) -> bool:
    return column.lower() == "split" and column not in wanted


def _split(where: str, value: object) -> str:
    split = split_named(value) if isinstance(value, str) else None
    if split is None:
        raise UserError(
            f"{where}: its split is {value!r}, which is neither train, val nor test; rename the column if it means "
            "something else"
        )
    return split


def _csv(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}: line {start}: cannot be read as CSV ({error})") from None
        if cells is None:
            break
        if header is None:
            header = _header(path, [cell.strip() for cell in cells], wanted)
        elif cells:
            where = f"{path}: line {start}"
            _fits(where, cells, header, "a cell with a comma needs double quotes around it")
            row = dict(zip(header, cells, strict=True))
            _one_row(where, row, header, wanted[0])
            yield where, row
    if header is None:
        _header(path, [], wanted)


def _one_row(where: str, row: Mapping[str, str], header: Sequence[str], image_column: str) -> None:
    """Refuse a cell that has swallowed later rows, because a double quote opened it and none closed it in time."""
    for cell in row.values():
        for line in cell.splitlines()[1:]:
            cells = next(csv.reader([line]), [])
            if len(cells) == len(header) and cells[header.index(image_column)].lower().endswith(SUFFIXES):
                raise UserError(
                    f"{where}: a double quote opens here and closes lines later, after the row of {cells[0]!r}; write "
                    'a quote within a quoted cell twice ("")'
                )


def _tsv(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    header: list[str] | None = None
    for number, line in enumerate(_lines(path), 1):
        cells = line.rstrip("\r\n").split("\t")
        if header is None:
            header = _header(path, [cell.strip() for cell in cells], wanted)
        elif line.strip():
            where = f"{path}: line {number}"
            _fits(where, cells, header, "a cell holds no tab")
            yield where, dict(zip(header, cells, strict=True))
    if header is None:
        _header(path, [], wanted)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, with their ends. A byte order mark is left out."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file, 1):
                if not line.isascii() and any("\ud800" <= letter <= "\udfff" for letter in line):
                    raise UserError(f"{path}: line {number}: is not UTF-8")
                yield line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    file = open_parquet(path)
    columns = _header(path, file.schema_arrow.names, wanted)
    try:
        number = 0
        for batch in file.iter_batches(columns=[name for name in columns if name in wanted or _is_split(name, wanted)]):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except UserError:
        raise
    except Exception as error:  # Arrow raises many types on damaged files; the user gets one message for all
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None


def open_parquet(path: Path) -> Any:
    """Open pyarrow's ParquetFile. Raises UserError without pyarrow, or for a file that is not Parquet."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'vilu[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # as in `_parquet`
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type where the message is empty."""
    return next(islice(str(error).splitlines(), 1), "") or type(error).__name__


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which neither UTF-8, nor a terminal, nor a tokenizer accepts."""
    return text.encode("utf-8", "replace").decode()


def _header(path: Path, cells: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the names of the columns. Raises UserError where a wanted one is missing or there twice."""
    names = list(cells)
    for column in wanted:
        if column not in names:
            only = ", ".join(map(repr, filter(None, names[:8]))) or "none"
            raise UserError(f"{path}: has no column {column!r}, only {only}; {_hint(path, names)}")
        if names.count(column) > 1:
            raise UserError(f"{path}: has {names.count(column)} columns {column!r}")
    return names


def _hint(path: Path, names: Sequence[str]) -> str:
    """Say what may be wrong with a header that lacks a column."""
    mark = next((mark for mark in ";\t,|" if len(names) == 1 and mark in names[0]), None)
    if mark is not None:
        kind = "a tab" if path.suffix.lower() == ".tsv" else "a comma"
        return f"{kind} must stand between columns, not {mark!r}"
    if any(name.lower().endswith(SUFFIXES) for name in names):
        return "the first line must name the columns"
    return "--image-column and --caption-column name others"


def _fits(where: str, cells: Sequence[str], header: Sequence[str], hint: str) -> None:
    if len(cells) != len(header):
        fields = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
        raise UserError(f"{where}: has {fields}, the header has {len(header)}; {hint}")
