"""The input of an offline job: what is in it, in a fixed order, so that every row has a number that stays its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vilu.errors import UserError
from vilu.serving.offline.blocks import BLOCK_ROWS, check_shard, check_texts, list_images, members, read_shard
from vilu.serving.offline.listing import Unit, find
from vilu.serving.offline.tables import look_into_csv, look_into_parquet, read_csv, read_parquet, text_columns

TASK_ROWS = 32 * BLOCK_ROWS  # images of a folder that one task lists
LISTERS = 32  # files looked into at a time


@dataclass(frozen=True)
class Input:
    """All rows that a job reads.

    Attributes:
        kind: "images" (each unit is one row), "shards", "parquet" or "csv".
        units: the files, in the order that numbers the rows.
        column: of a table: its column of images or paths.
        columns: columns that are carried into the output, with their Arrow types.
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
            return [(partial(list_images, start, [u.name for u in part]), len(part), 0) for start, part in parts]
        pieces: list[tuple[Any, int, int]] = []
        for place, unit in enumerate(self.units):
            cap = self.caps.get(place, -1)
            if self.kind == "parquet":
                pieces += self._row_groups(place, unit, cap)
            elif cap != 0:
                read = partial(read_shard, place, unit, cap, list(self.columns))
                if self.kind == "csv":
                    read = partial(read_csv, place, unit, cap, self.column, list(self.columns))
                pieces.append((read, cap if cap >= 0 else unit.rows, unit.size))
        return pieces

    def _row_groups(self, place: int, unit: Unit, cap: int) -> Iterator[tuple[Any, int, int]]:
        start = 0
        for group, (rows, size) in enumerate(unit.groups):
            wanted = rows if cap < 0 else min(rows, cap - start)
            if wanted > 0:
                read = partial(read_parquet, place, unit, group, start, wanted, self.column, list(self.columns))
                yield read, wanted, size
            start += rows


def open_input(
    names: Sequence[str],
    *,
    column: str | None = None,
    columns: Sequence[str] = (),
    limit: int | None = None,
    without: str | None = None,
) -> Input:
    """Find what the names hold. Only listings, footers and the ends of shards are read, and CSV files are counted.

    Args:
        names: folders, patterns, images, text files that list images (one a line), WebDataset shards, Parquet or CSV
            files; all of one kind; local or as URIs.
        column: a table's column of encoded images, or of paths, which count from the table's folder. None: the first
            of `tables.COLUMNS` that it has.
        columns: a table's columns to carry along; of shards, the extensions of texts beside the images, such as txt.
        limit: read the first so many rows; None reads all.
        without: folder or URI whose files are left out: a job's output, which may lie in the input's folder.

    Raises:
        UserError: there is nothing to read, the files are of several kinds, one is damaged or cut short, or a table
            lacks a column.
    """
    kinds: dict[str, list[Unit]] = {}
    for name in names:
        kind, units = find(str(name), without)
        kinds.setdefault(kind, []).extend(units)
    if len(kinds) != 1:
        raise UserError(f"the input mixes {' and '.join(sorted(kinds))}: score them one after the other")
    ((kind, units),) = kinds.items()
    units = sorted({unit.name: unit for unit in units}.values(), key=lambda unit: unit.name)
    if (kind == "images" and (column or columns)) or (kind == "shards" and column):
        raise UserError(f"{names[0]}: only a table has columns, and this holds {kind}")
    if kind == "images":
        return Input(kind, units[:limit])
    with ThreadPoolExecutor(LISTERS) as pool:
        if kind == "shards":
            list(pool.map(check_shard, units))
            if columns:
                check_texts(units[0], columns)
            return Input(kind, units, "", text_columns(columns), _shard_caps(units, limit))
        look = look_into_parquet if kind == "parquet" else look_into_csv
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


def _shard_caps(units: Sequence[Unit], limit: int | None) -> dict[int, int]:
    caps = {}
    for place, unit in enumerate(units):
        if limit is not None:
            caps[place] = sum(1 for _ in members(unit, limit)) if limit else 0
            limit -= caps[place]
    return caps
