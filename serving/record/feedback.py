"""What people say about answers: read from CSV or JSON lines, and given to a record."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from vilu.errors import UserError
from vilu.preprocess.class_names import cleaned
from vilu.serving.record.table import Feedback, Record

LONGEST = 4096  # characters of an id or a label
VERDICTS = {"right": True, "wrong": False}


@dataclass(frozen=True)
class Taken:
    """What became of feedback.

    Attributes:
        taken: new, and about answers that the record has.
        repeated: said before in the same way; not kept twice.
        changed: about an answer that other feedback was about; the later one counts.
        unknown: about ids that the record does not have. It is kept, and counts if the answer comes later.
    """

    taken: int = 0
    repeated: int = 0
    changed: int = 0
    unknown: int = 0


def read_feedback(text: str, source: str = "feedback") -> list[Feedback]:
    """Feedback from CSV with the columns id, feedback and label, or from JSON lines with these fields.

    `feedback` is "right" or "wrong"; `label` is the true label. Each row has one of them.

    Raises:
        UserError: what is wrong, with the line; nothing of the rest is used then either.

    Example:
        >>> [(one.id, one.right, one.label) for one in read_feedback("id,feedback\\na,right\\nb,wrong\\n")]
        [('a', True, None), ('b', False, None)]
    """
    now, text = datetime.now(timezone.utc), text.removeprefix("\ufeff")
    rows = _json_rows(text, source) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text, source)
    return [_feedback(row, f"{source}, line {number}", now) for number, row in rows]


def _json_rows(text: str, source: str) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{source}: is not JSON") from None
        yield from enumerate(given, 1)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{source}, line {number}: is not JSON") from None


def _csv_rows(text: str, source: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        columns = set(reader.fieldnames or ())
        if "id" not in columns or not columns & {"feedback", "label"}:
            raise UserError(f"{source}: needs a line of column names with id, and feedback or label (or both)")
        for row in reader:
            if None in row:
                raise UserError(
                    f"{source}, line {reader.line_num}: has more fields than the header; a cell with a comma needs "
                    "double quotes around it"
                )
            if any(row.values()):
                yield reader.line_num, {name: row[name] for name in ("id", "feedback", "label") if row.get(name)}
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: {error}") from None


def _feedback(row: Any, where: str, now: datetime) -> Feedback:
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with id, and feedback or label")
    given = {name: row.get(name) for name in ("id", "feedback", "label")}
    for name, value in given.items():
        if value is not None and not (isinstance(value, str) and 0 < len(value) <= LONGEST and _is_text(value)):
            raise UserError(f"{where}: {name} must be text of 1 to {LONGEST} characters")
    if given["id"] is None:
        raise UserError(f"{where}: id is missing")
    verdict, label = given["feedback"], given["label"]
    if (verdict is None) == (label is None):
        raise UserError(f"{where}: give either feedback (right or wrong) or label (the true one)")
    if verdict is not None and verdict not in VERDICTS:
        raise UserError(f"{where}: feedback must be right or wrong, not {verdict[:64]!r}")
    return Feedback(given["id"], None if verdict is None else VERDICTS[verdict], label, now)


def is_right(answered: str, right: bool | None, label: str | None) -> bool:
    """Whether an answer was right, by what was said of it; a label is the answer where CLIP reads them alike.

    Example:
        >>> is_right("red star", None, "Red star"), is_right("red star", False, None)
        (True, False)
    """
    return cleaned(answered) == cleaned(label or "") if right is None else right


def _is_text(value: str) -> bool:
    """Whether files and databases can keep it: no NUL, no half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= one <= "\udfff" for one in value)


def give_feedback(record: Record, feedback: Iterable[Feedback]) -> Taken:
    """Add feedback to a record.

    Example::

        record = open_record("record")
        give_feedback(record, read_feedback("id,label\\n3f2a,cat\\n"))

    Raises:
        UserError: the record cannot be read or written; nothing is kept then.
    """
    given = list(feedback)
    ids = {one.id for one in given}
    latest = {one.id: (one.right, one.label) for one in record.feedback() if one.id in ids}
    there = {name for table in record.find(ids, ["id"]) for name in table["id"].to_pylist()}
    counts = {"taken": 0, "repeated": 0, "changed": 0, "unknown": 0}
    kept = []
    for one in given:
        said = one.right, one.label
        if latest.get(one.id) == said:
            counts["repeated"] += 1
            continue
        counts["changed" if one.id in latest else "taken" if one.id in there else "unknown"] += 1
        latest[one.id] = said
        kept.append(one)
    if kept:
        record.give(kept)
    return Taken(**counts)


def to_label(record: Record) -> Iterator[dict[str, Any]]:
    """The answers that were chosen to be labelled and have no feedback yet: id, time, class_set, label, accept."""
    known = {one.id for one in record.feedback()}
    columns: Sequence[str] = ("id", "time", "class_set", "label", "failure_probability", "accept", "chosen")
    for table in record.batches(columns):
        for row in table.filter(table["chosen"]).drop_columns("chosen").to_pylist():
            if row["id"] not in known:
                yield row
