"""Answers in a file: JSON lines, CSV or Parquet, written as they come."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vilu.errors import UserError
from vilu.serving.answers import Answer

FORMATS = (".jsonl", ".csv", ".parquet")
FIELDS = ("source", "label", "class_index", "confidence", "failure_probability", "accept", "error")
DETAILS = ("class_set", "top", "entropy", "doctor", "concepts")  # only where they were asked for
ROWS = 1024  # answers held at once for a Parquet file


def row(answer: Answer, columns: Sequence[str] = FIELDS) -> dict[str, Any]:
    """An answer as JSON's types: the fields in `columns`; of an answer with an error only its source and the error."""
    if answer.error is not None:
        return {"source": answer.source, "error": answer.error}
    return {name: getattr(answer, name) for name in columns}


class AnswerFile:
    """A file that takes answers one by one."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns

    def add(self, answer: Answer) -> None:
        """Write one answer."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left and close the file. Call it once."""
        raise NotImplementedError


@contextlib.contextmanager
def open_answer_file(path: Path, columns: Sequence[str] = FIELDS) -> Iterator[AnswerFile]:
    """A file to add answers to. It appears under its name when it is whole.

    Where the answers stop with a UserError, those until then stay in NAME.part.SUFFIX beside it, and the error says so.

    Args:
        path: the name's ending chooses the format, one of FORMATS.
        columns: fields of `Answer` to write.

    Raises:
        UserError: the ending is unknown, or the file cannot be written.
    """
    kinds: dict[str, Callable[[Sequence[str], Path], AnswerFile]] = {
        ".jsonl": _Lines,
        ".csv": _Csv,
        ".parquet": _Parquet,
    }
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: the name must end in {', '.join(FORMATS)}")
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        file = kind(columns, part)
        try:
            yield file
        except UserError as error:
            file.close()
            raise type(error)(f"{error}; the answers until then are in {part}") from None
        file.close()
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


class _Lines(AnswerFile):
    def __init__(self, columns: Sequence[str], path: Path) -> None:
        super().__init__(columns)
        self.file = path.open("w", encoding="utf-8", errors="surrogateescape")

    def add(self, answer: Answer) -> None:
        self.file.write(json.dumps(row(answer, self.columns)) + "\n")

    def close(self) -> None:
        self.file.close()


class _Csv(AnswerFile):
    def __init__(self, columns: Sequence[str], path: Path) -> None:
        super().__init__(columns)
        self.file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self.table = csv.DictWriter(self.file, columns)
        self.table.writeheader()

    def add(self, answer: Answer) -> None:
        cells = row(answer, self.columns).items()
        self.table.writerow({k: json.dumps(value) if isinstance(value, tuple) else value for k, value in cells})

    def close(self) -> None:
        self.file.close()


class _Parquet(AnswerFile):
    def __init__(self, columns: Sequence[str], path: Path) -> None:
        super().__init__(columns)
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError:
            raise UserError("Parquet needs a package: pip install 'vilu[parquet]'") from None
        kinds = {"class_index": pa.int32(), "accept": pa.bool_()}
        kinds |= dict.fromkeys(("confidence", "failure_probability", "entropy", "doctor"), pa.float32())
        pairs = pa.list_(pa.struct([("label", pa.string()), ("weight", pa.float32())]))
        kinds |= dict.fromkeys(("top", "concepts"), pairs)
        self.pa = pa
        self.schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
        self.file = pq.ParquetWriter(path, self.schema)
        self.rows: list[dict[str, Any]] = []

    def add(self, answer: Answer) -> None:
        cells = row(answer, self.columns)
        for name in {"top", "concepts"} & cells.keys():
            cells[name] = [{"label": label, "weight": weight} for label, weight in cells[name]]
        self.rows.append(cells)
        if len(self.rows) == ROWS:
            self._write()

    def _write(self) -> None:
        # A file's name may hold bytes that are no UTF-8; a missing field is null.
        rows = [{**r, "source": r["source"].encode("utf-8", "replace").decode()} for r in self.rows]
        self.file.write_table(self.pa.Table.from_pylist(rows, self.schema))
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._write()
        self.file.close()
