"""The columns of a record, and its rows from a server's replies."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
import pyarrow as pa
from tritonclient.grpc import service_pb2 as pb

from vilu.serving.answers import STAGE, answer_ids

# An answer. class_set and its version: "" and 0 for candidates of the request's own. label_probability: the chance with
# which the answer was chosen to be labelled by a person; chosen: whether it was. part: which write of its writer's.
# stage: of a cascade, the stage that answered, from 1; escalation_failed: whether a later one was to answer and could
# not; both are null without a cascade, and in records of before there were any.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("time", pa.timestamp("us", "UTC")),
        ("model", pa.string()),
        ("model_version", pa.int32()),
        ("checkpoint", pa.string()),
        ("class_set", pa.string()),
        ("class_set_version", pa.int32()),
        ("class_index", pa.int32()),
        ("label", pa.string()),
        ("confidence", pa.float32()),
        ("failure_probability", pa.float32()),
        ("accept", pa.bool_()),
        ("entropy", pa.float32()),
        ("label_probability", pa.float32()),
        ("chosen", pa.bool_()),
        ("stage", pa.int32()),
        ("escalation_failed", pa.bool_()),
        ("embedding", pa.list_(pa.float16())),
    ]
)
ANSWER = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")
_NUMBERS = {"CLASS_INDEX": "<i4", "CONFIDENCE": "<f4", "FAILURE_PROBABILITY": "<f4", "ACCEPT": "?"}
# A reply that waits to be written: its bytes, the id of its answers, microseconds since 1970, the checkpoint's digest,
# and the class set: "default", which has the model's version; "" for candidates of the request's own; None: as the
# reply's CLASS_SET says. A plain tuple without containers costs the garbage collector nothing.
Reply = tuple[bytes, str, int, str, str | None]


@dataclass(frozen=True)
class Feedback:
    """What a person said about one answer.

    Attributes:
        id: the answer's.
        right: whether it was right; None where `label` says it.
        label: the true label; the answer is right where it has this label.
        time: when it was given.
    """

    id: str
    right: bool | None
    label: str | None
    time: datetime


class Record(Protocol):
    """Where answers and feedback are kept."""

    def append(self, rows: pa.Table) -> None:
        """Add rows of SCHEMA, all of them or none. Raises UserError."""

    def tidy(self, keep_days: float | None) -> None:
        """Bring the record in order now and then, and remove what is older. Raises UserError."""

    def batches(self, columns: Sequence[str], done: dict[str, int] | None = None) -> Iterator[pa.Table]:
        """The rows in about the order of their time, at most some 10,000 at once.

        Args:
            done: by writer, its last write that has been read; rows up to there are left out, and it is brought up to
                date, by the end at the latest.
        """

    def find(self, ids: Iterable[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows that have these ids, in about the order of their time."""

    def put_reference(self, checkpoint: str, reference: str) -> None:
        """Keep what a checkpoint's answers are compared with: `vilu.evaluation.reference` in JSON. Raises UserError."""

    def reference(self, checkpoint: str) -> str | None:
        """What `put_reference` kept of this checkpoint."""

    def give(self, feedback: Sequence[Feedback]) -> None:
        """Add feedback, whole or not at all. Raises UserError."""

    def feedback(self) -> Iterator[Feedback]:
        """All feedback, in the order in which it was given."""

    def close(self) -> None:
        """Close what is open."""


def table_of(
    replies: Iterable[Reply], random: np.random.Generator, label_accepted: float = 1.0, label_rejected: float = 1.0
) -> pa.Table:
    """The rows of replies that have at least the outputs ANSWER, column by column: a row costs a few microseconds.

    Args:
        random: draws which answers are to be labelled.
        label_accepted, label_rejected: the probability of that.
    """
    raw: dict[str, list[bytes]] = {name: [] for name in (*_NUMBERS, "ENTROPY", *STAGE, "IMAGE_EMBEDDING")}
    # (id, ..., class_set_version, label, whether there is an entropy, whether there is a stage, width)
    rows: list[tuple[object, ...]] = []
    for data, request_id, time, checkpoint, class_set in replies:
        reply = pb.ModelInferResponse.FromString(data)
        given = dict(zip([output.name for output in reply.outputs], reply.raw_output_contents, strict=True))
        labels = _strings(given["LABEL"])
        model, version, number = reply.model_name, int(reply.model_version or 0), len(labels)
        for name in _NUMBERS:
            raw[name].append(given[name])
        entropy, embedding = given.get("ENTROPY"), given.get("IMAGE_EMBEDDING")
        raw["ENTROPY"].append(bytes(4 * number) if entropy is None else entropy)
        staged = given.keys() >= set(STAGE)
        raw["STAGE"].append(given["STAGE"] if staged else bytes(4 * number))
        raw["ESCALATION_FAILED"].append(given["ESCALATION_FAILED"] if staged else bytes(number))
        raw["IMAGE_EMBEDDING"].append(embedding or b"")
        width = -1 if embedding is None else len(embedding) // (4 * number)
        sets = (
            [(class_set, version if class_set else 0)] * number
            if class_set is not None
            else [_named(text) for text in _strings(given["CLASS_SET"])]
        )
        for answer_id, of, label in zip(answer_ids(request_id, number), sets, labels, strict=True):
            rows.append((answer_id, time, model, version, checkpoint, *of, label, entropy is not None, staged, width))
    if not rows:
        return SCHEMA.empty_table()
    *columns, labelled, known, by_stage, widths = zip(*rows, strict=True)
    numbers = {name: np.frombuffer(b"".join(raw[name]), kind) for name, kind in _NUMBERS.items()}
    dims = np.array(widths)
    vectors = np.frombuffer(b"".join(raw["IMAGE_EMBEDDING"]), "<f4").astype(np.float16)
    ends = np.concatenate([[0], np.cumsum(np.maximum(dims, 0))]).astype(np.int32)
    chance = np.where(numbers["ACCEPT"], label_accepted, label_rejected)
    return pa.table(
        [
            *columns,
            numbers["CLASS_INDEX"],
            labelled,
            numbers["CONFIDENCE"],
            numbers["FAILURE_PROBABILITY"],
            numbers["ACCEPT"],
            pa.array(np.frombuffer(b"".join(raw["ENTROPY"]), "<f4"), mask=~np.array(known)),
            chance.astype(np.float32),
            random.random(len(rows)) < chance,
            pa.array(np.frombuffer(b"".join(raw["STAGE"]), "<i4"), mask=~np.array(by_stage)),
            pa.array(np.frombuffer(b"".join(raw["ESCALATION_FAILED"]), "?"), mask=~np.array(by_stage)),
            pa.ListArray.from_arrays(ends, pa.array(vectors), mask=pa.array(dims < 0)),
        ],
        schema=SCHEMA,
    )


def with_all(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """The table with these columns of SCHEMA: nulls where an older version of vilu wrote none."""
    for name in columns:
        if name not in table.column_names:
            table = table.append_column(SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))
    return table


def _strings(raw: bytes) -> list[str]:
    """The strings of a BYTES tensor. A NUL, which PostgreSQL cannot keep, becomes U+FFFD."""
    texts, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        texts.append(raw[at + 4 : at + 4 + length].decode("utf-8", "replace").replace("\0", "\ufffd"))
        at += 4 + length
    return texts


def _named(text: str) -> tuple[str, int]:
    """The name and the version of a class set, from CLASS_SET's NAME@VERSION; ("", 0) where it names none."""
    name, _, number = text.rpartition("@")
    return (name, int(number)) if name else ("", 0)
