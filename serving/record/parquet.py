"""A record in a folder: Parquet files of answers, and a file of feedback in JSON lines.

A writer (one server's) writes a small file about once a second, whole (see `vilu.atomic`), so a kill loses what came
after the last one and leaves no torn file. It merges MERGED small files into a larger one, and MERGED of these into a
larger one still. A file's name is answers-TIME-WRITER-FIRST-LAST.parquet: the time of its first row in milliseconds,
and the numbers of its first and last write. A file within another one of the same writer is a merge's leftover and is
passed over, so a kill during a merge neither loses nor doubles a row.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vilu import atomic
from vilu.errors import UserError
from vilu.serving.record.table import SCHEMA, Feedback, with_all

MERGED = 64
LEVELS = 2  # of merges: with a write about once a second, a file holds at most an hour
ROWS = 8192  # in one batch
FEEDBACK = "feedback.jsonl"
STORED = SCHEMA.append(pa.field("part", pa.int32()))
_NAME = re.compile(r"answers-(\d{13,15})-([0-9a-f]{16})-(\d{8})-(\d{8})\.parquet")


class _File(NamedTuple):
    time: int
    writer: str
    first: int
    last: int
    path: Path


class ParquetRecord:
    """See `Record`.

    Raises:
        UserError: the folder is missing, or cannot be written where `create` asks for it.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        self.folder = folder
        self.writer = secrets.token_hex(8)
        self.written = 0
        self.levels: list[list[_File]] = [[] for _ in range(LEVELS + 1)]  # of this writer
        if create:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
            probe = folder / f".probe-{self.writer}"
            atomic.write(probe, b"")
            probe.unlink()
        elif not folder.is_dir():
            raise UserError(f"{folder}: there is no record; `vilu serve --record {folder}` makes one")

    def append(self, rows: pa.Table) -> None:
        if not len(rows):
            return
        table = rows.append_column("part", [np.full(len(rows), self.written, np.int32)])
        first = rows["time"][0].value // 1000
        path = self._path(first, self.written, self.written)
        with atomic.file(path) as part:
            # A merge compresses; this is written twice a second.
            pq.write_table(table, part, compression="none", use_dictionary=False, write_statistics=False)
        self.levels[0].append(_File(first, self.writer, self.written, self.written, path))
        self.written += 1

    def tidy(self, keep_days: float | None) -> None:
        for level in range(LEVELS):
            while len(self.levels[level]) >= MERGED:
                self._merge(level, self.levels[level][:MERGED])
        if keep_days is None:
            return
        oldest = time.time() - keep_days * 86400
        for file in self._files():
            with contextlib.suppress(FileNotFoundError):
                if file.path.stat().st_mtime < oldest:  # a merge keeps the time of its newest rows
                    file.path.unlink()
        self._forget_feedback(oldest)

    def _merge(self, level: int, files: list[_File]) -> None:
        present = [file for file in files if file.path.exists()]  # others were too old
        if present:
            path = self._path(present[0].time, present[0].first, present[-1].last)
            newest = max(file.path.stat().st_mtime for file in present)
            with atomic.file(path) as part, pq.ParquetWriter(part, STORED, compression="zstd") as writer:
                for file in present:
                    for batch in pq.ParquetFile(file.path).iter_batches(ROWS):
                        writer.write_batch(batch)
            os.utime(path, (newest, newest))
            self.levels[level + 1].append(present[0]._replace(last=present[-1].last, path=path))
            for file in present:
                if file.path != path:
                    file.path.unlink(missing_ok=True)
        del self.levels[level][: len(files)]

    def _path(self, first_time: int, first: int, last: int) -> Path:
        return self.folder / f"answers-{first_time:013d}-{self.writer}-{first:08d}-{last:08d}.parquet"

    def _files(self) -> list[_File]:
        """The files in the order of their time, without leftovers of merges."""
        found = []
        for name in os.listdir(self.folder):
            if match := _NAME.fullmatch(name):
                found.append(_File(int(match[1]), match[2], int(match[3]), int(match[4]), self.folder / name))
        found.sort(key=lambda file: (file.writer, file.first, -file.last))
        kept: list[_File] = []
        for file in found:
            if not (kept and kept[-1].writer == file.writer and file.last <= kept[-1].last):
                kept.append(file)
        return sorted(kept)

    def batches(self, columns: Sequence[str] = SCHEMA.names, done: dict[str, int] | None = None) -> Iterator[pa.Table]:
        done = {} if done is None else done
        while True:
            for file in self._files():
                after = done.get(file.writer, -1)
                if file.last <= after:
                    continue
                try:
                    opened = pq.ParquetFile(file.path)
                except FileNotFoundError:  # merged or removed since
                    break
                except (OSError, pa.ArrowException) as error:
                    raise UserError(f"{file.path}: cannot be read ({str(error).splitlines()[0]})") from None
                there = [name for name in columns if name in opened.schema_arrow.names]
                for batch in opened.iter_batches(ROWS, columns=[*there, "part"]):
                    table = with_all(pa.Table.from_batches([batch]), columns)
                    if file.first <= after:
                        table = table.filter(pc.greater(table["part"], after))
                    if len(table):
                        yield table.drop_columns("part")
                done[file.writer] = file.last
            else:
                return

    def find(self, ids: Iterable[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        wanted = pa.array(set(ids), pa.string())
        for table in self.batches([*dict.fromkeys(["id", *columns])]):
            found = table.filter(pc.is_in(table["id"], value_set=wanted))
            if len(found):
                yield found.select(list(columns))

    def put_reference(self, checkpoint: str, reference: str) -> None:
        atomic.write(self.folder / f"reference-{_hash(checkpoint)}.json", reference)

    def reference(self, checkpoint: str) -> str | None:
        path = self.folder / f"reference-{_hash(checkpoint)}.json"
        return path.read_text("utf-8") if path.is_file() else None

    def give(self, feedback: Sequence[Feedback]) -> None:
        lines = b"".join(map(_line, feedback))
        try:
            with self._locked() as file:
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                    if file.read(1) != b"\n":  # a kill tore the last write
                        lines = b"\n" + lines
                try:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(file.fileno(), end)
                    raise
        except OSError as error:
            raise UserError(f"{self.folder / FEEDBACK}: cannot be written ({error.strerror})") from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file of feedback, which nobody else writes to or replaces meanwhile."""
        path = self.folder / FEEDBACK
        while True:
            with open(path, "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
                try:
                    same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
                except FileNotFoundError:
                    continue
                if same:  # else it was replaced since
                    yield file
                    return

    def feedback(self) -> Iterator[Feedback]:
        try:
            file = open(self.folder / FEEDBACK, encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        with file:
            for line in file:
                try:
                    given = json.loads(line)
                    yield Feedback(given["id"], given["right"], given["label"], datetime.fromisoformat(given["time"]))
                except (ValueError, KeyError, TypeError):
                    continue  # a torn line

    def _forget_feedback(self, oldest: float) -> None:
        """Remove feedback that is older than all answers may be."""
        limit = datetime.fromtimestamp(oldest, timezone.utc)
        first = next(self.feedback(), None)
        if first is not None and first.time < limit - timedelta(days=1):  # at most once a day
            with self._locked():
                kept = [_line(one) for one in self.feedback() if one.time > limit]
                atomic.write(self.folder / FEEDBACK, b"".join(kept))

    def close(self) -> None:
        pass


def _line(one: Feedback) -> bytes:
    said = {"id": one.id, "right": one.right, "label": one.label, "time": one.time.isoformat()}
    return json.dumps(said).encode() + b"\n"


def _hash(checkpoint: str) -> str:
    return checkpoint if re.fullmatch("[0-9a-f]{64}", checkpoint) else "unknown"
