"""Answers in a file: JSON lines, CSV or Parquet, written as they come."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from vilu.answers import Answer
from vilu.errors import UserError

T = TypeVar("T")
FORMATS = (".jsonl", ".csv", ".parquet")
FIELDS = ("source", "label", "class_index", "confidence", "failure_probability", "accept", "error")
OUTLIER = ("outlier_score",)  # only where it was asked for, or the checkpoint has one
IDS = ("id",)  # what feedback names; only where it was asked for
STAGES = ("stage", "escalation_failed")  # of a cascade's answers
DETAILS = ("class_set", "top", "entropy", "doctor", "concepts")  # only where they were asked for
ROWS = 1024  # answers held at once for a Parquet file


def row(answer: Answer, columns: Sequence[str] = FIELDS) -> dict[str, Any]:
    """An answer as JSON's types: the fields in `columns`; of an answer with an error only its source and the error."""
    if answer.error is not None:
        return {"source": answer.source, "error": answer.error}
    return {name: getattr(answer, name) for name in columns}


class AnswerFile:
    """A file that takes answers one by one."""

    def __init__(self, columns: Sequence[str], file: IO[bytes]) -> None:
        self.columns, self.file = columns, file

    def add(self, answer: Answer) -> None:
        """Write one answer."""
        self.add_row(row(answer, self.columns))

    def add_row(self, cells: dict[str, Any]) -> None:
        """Write the fields of one answer."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left. Call it once; the file under it stays open."""


@contextlib.contextmanager
def open_answer_file(
    path: Path, columns: Sequence[str] = FIELDS, suffix: str | None = None, earlier: Sequence[dict[str, Any]] = ()
) -> Iterator[AnswerFile]:
    """A file to add answers to. It appears under its name when it is whole. A pipe or a device takes them at once.

    Where the answers stop with a UserError or an interrupt, those until then stay in NAME.part.SUFFIX beside it, and
    the error says so.

    Args:
        path: the file.
        columns: fields of `Answer` to write.
        suffix: one of FORMATS, the format to write; None: the name's ending says it.
        earlier: rows to begin with, as `read_part` returns them. What holds them stays until they are written again.

    Raises:
        UserError: the ending is unknown, the file cannot be written, or the answers were interrupted.
    """
    kind, part = _choose(path, suffix, _WRITERS), _part(path)
    new = part.with_name(f".{part.name}") if earlier else part
    try:
        if path.exists() and not path.is_file():  # a pipe or a device such as /dev/stdout, which stays what it is
            with path.open("wb") as under, contextlib.closing(kind(columns, under)) as file:
                yield file
            return
        with new.open("wb") as under:
            file = kind(columns, under)
            try:
                for cells in earlier:
                    file.add_row(cells)
                under.flush()
                if new.suffix != ".parquet":  # which no program can read before its end is written
                    os.replace(new, part)
                yield file
            except (UserError, KeyboardInterrupt) as error:
                file.close()
                with contextlib.suppress(FileNotFoundError):
                    os.replace(new, part)
                why = "interrupted" if isinstance(error, KeyboardInterrupt) else error
                raise type(error)(
                    f"{why}; the answers until then are in {part}, and --resume goes on from there"
                ) from None
            file.close()
        os.replace(new if new.exists() else part, os.path.realpath(path))
        part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if new != part:
            new.unlink(missing_ok=True)


@contextlib.contextmanager
def write_answers(under: IO[bytes], columns: Sequence[str], suffix: str) -> Iterator[AnswerFile]:
    """Answers written to an open file, such as standard output, as they come; `suffix` is one of FORMATS."""
    file = _choose(Path(), suffix, _WRITERS)(columns, under)
    try:
        yield file
    finally:
        file.close()


def read_part(path: Path, columns: Sequence[str], suffix: str | None = None) -> list[dict[str, Any]]:
    """Read the answers that an interrupted run left beside `path`, or those in `path` where it ended.

    The arguments are those of `open_answer_file`.

    Returns:
        Rows as the file has them. Empty where there is no file.

    Raises:
        UserError: the file cannot be read, or holds other columns.
    """
    read = _choose(path, suffix, {".jsonl": _read_lines, ".csv": _read_csv, ".parquet": _read_parquet})
    found = next((file for file in (_part(path), path) if file.exists()), None)
    if found is None:
        return []
    try:
        names, rows = read(found)
    except (OSError, ValueError, csv.Error) as error:
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{found}: cannot be read to go on with ({reason[0]}); move it away to begin again") from None
    if names and names != set(columns):
        raise UserError(f"{found}: holds {', '.join(sorted(names))}, not {', '.join(sorted(columns))}")
    return rows


def _part(path: Path) -> Path:
    path = Path(os.path.realpath(path))  # a link stays a link
    return path.with_name(f"{path.stem}.part{path.suffix}")


def _choose(path: Path, suffix: str | None, kinds: dict[str, T]) -> T:
    try:
        return kinds[suffix or path.suffix.lower()]
    except KeyError:
        wrong = f"{path}: the name must end in" if suffix is None else f"{suffix}: the format must be one of"
        raise UserError(f"{wrong} {', '.join(FORMATS)}") from None


def _read_lines(path: Path) -> tuple[set[str], list[dict[str, Any]]]:
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # a kill may have cut the last line
    if not all(isinstance(cells, dict) and isinstance(cells.get("source"), str) for cells in rows):
        raise ValueError("not rows of answers")
    whole = [cells for cells in rows if "label" in cells]  # a row with an error has no other field
    return set(whole[0]) if whole else set(), rows


def _read_csv(path: Path) -> tuple[set[str], list[dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    table = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    rows = [{name: value or None for name, value in cells.items()} for cells in table]
    return set(table.fieldnames or ()), rows


def _read_parquet(path: Path) -> tuple[set[str], list[dict[str, Any]]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return set(table.column_names), table.to_pylist()


class _Lines(AnswerFile):
    def add_row(self, cells: dict[str, Any]) -> None:
        self.file.write((json.dumps(cells) + "\n").encode())


class _Csv(AnswerFile):
    def __init__(self, columns: Sequence[str], file: IO[bytes]) -> None:
        super().__init__(columns, file)
        self.table = csv.DictWriter(_Text(file), columns)
        self.table.writeheader()

    def add_row(self, cells: dict[str, Any]) -> None:
        self.table.writerow({k: json.dumps(v) if isinstance(v, tuple) else v for k, v in cells.items()})


class _Text:
    """What csv writes to: a file's name may hold bytes that are no UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def write(self, text: str) -> int:
        return self.file.write(text.encode("utf-8", "surrogateescape"))


class _Parquet(AnswerFile):
    def __init__(self, columns: Sequence[str], file: IO[bytes]) -> None:
        super().__init__(columns, file)
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError:
            raise UserError("Parquet needs a package: pip install 'vilu[parquet]'") from None
        kinds = dict.fromkeys(("class_index", "stage"), pa.int32())
        kinds |= dict.fromkeys(("accept", "escalation_failed"), pa.bool_())
        kinds |= dict.fromkeys(("confidence", "failure_probability", "entropy", "doctor", *OUTLIER), pa.float32())
        pairs = pa.list_(pa.struct([("label", pa.string()), ("weight", pa.float32())]))
        kinds |= dict.fromkeys(("top", "concepts"), pairs)
        self.pa = pa
        self.schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
        self.writer = pq.ParquetWriter(file, self.schema)
        self.rows: list[dict[str, Any]] = []

    def add(self, answer: Answer) -> None:
        cells = row(answer, self.columns)
        for name in {"top", "concepts"} & cells.keys():
            cells[name] = [{"label": label, "weight": weight} for label, weight in cells[name]]
        self.add_row(cells)

    def add_row(self, cells: dict[str, Any]) -> None:
        self.rows.append(cells)
        if len(self.rows) == ROWS:
            self._write()

    def _write(self) -> None:
        # A file's name may hold bytes that are no UTF-8; a missing field is null.
        rows = [{**r, "source": r["source"].encode("utf-8", "replace").decode()} for r in self.rows]
        self.writer.write_table(self.pa.Table.from_pylist(rows, self.schema))
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._write()
        self.writer.close()


_WRITERS: dict[str, Callable[[Sequence[str], IO[bytes]], AnswerFile]] = {
    ".jsonl": _Lines,
    ".csv": _Csv,
    ".parquet": _Parquet,
}
