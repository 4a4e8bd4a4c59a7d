"""The answers of one checkpoint in a record, with the labels that people gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow.compute as pc

from vilu.errors import UserError
from vilu.serving.record.feedback import is_right
from vilu.serving.record.table import Record

COLUMNS = ("id", "time", "checkpoint", "class_set", "class_index", "label", "failure_probability",
           "label_probability", "chosen", "stage", "embedding")  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """N answers over the exported class set, M of which were chosen to be labelled and have feedback.

    Attributes:
        failure_probability: (N,).
        class_index: (N,) predicted classes.
        probability: (N,) with which each was to be chosen.
        embedding: (N, D) float32 image embeddings; None where not all were recorded.
        rows: (M,) which have feedback.
        correct: (M,) bool.
        labels: (M,) true labels; None where people only said that the answer was wrong.
    """

    failure_probability: np.ndarray
    class_index: np.ndarray
    probability: np.ndarray
    embedding: np.ndarray | None
    rows: np.ndarray
    correct: np.ndarray
    labels: Sequence[str | None]


def read_labelled(
    record: Record, checkpoint: str, since: datetime | None = None, *, embeddings: bool = False
) -> Labelled:
    """Read them.

    Args:
        checkpoint: the digest of the checkpoint whose answers are read.
        since: leave out answers that are older.
        embeddings: read the embeddings, too.

    Answers of a cascade are left out: a stage answers the images that it does not doubt, so what is recorded of one
    stage is no sample of the images that its checkpoint alone would answer.

    Raises:
        UserError: the record has no such answers, or none of them with feedback that counts.
    """
    said = {one.id: (one.right, one.label) for one in record.feedback()}
    failure: list[np.ndarray] = []
    index: list[np.ndarray] = []
    vectors: list[np.ndarray] | None = [] if embeddings else None
    rows: list[int] = []
    correct: list[bool] = []
    chance: list[np.ndarray] = []
    labels: list[str | None] = []
    total = cascaded = 0
    for table in record.batches(COLUMNS if embeddings else COLUMNS[:-1]):
        mine = table["stage"].is_null()
        cascaded += len(table) - pc.sum(mine).as_py()
        table = table.filter(mine)
        if not len(table):
            continue
        keep = [
            one == checkpoint and name == "default" and (since is None or time >= since)
            for one, name, time in zip(
                *(table[c].to_pylist() for c in ("checkpoint", "class_set", "time")), strict=True
            )
        ]
        table = table.filter(keep)
        if not len(table):
            continue
        failure.append(table["failure_probability"].to_numpy())
        index.append(table["class_index"].to_numpy())
        if vectors is not None:
            if table["embedding"].null_count:
                vectors = None
            else:
                flat = table["embedding"].combine_chunks().flatten().to_numpy()
                vectors.append(flat.reshape(len(table), -1).astype(np.float32))
        chance.append(table["label_probability"].to_numpy().astype(np.float64).round(9))
        columns = (table[c].to_pylist() for c in ("id", "label", "chosen"))
        for at, (name, label, chosen) in enumerate(zip(*columns, strict=True), total):
            if chosen and name in said:
                right, true = said.pop(name)
                rows.append(at)
                correct.append(is_right(label, right, true))
                labels.append(label if correct[-1] else true)
        total += len(table)
    if not total:
        more = (
            f"; it has {cascaded} of a cascade, whose threshold `vilu calibrate --cascade` chooses" if cascaded else ""
        )
        raise UserError(f"the record has no answers of this checkpoint over its own class set{more}")
    if not rows:
        raise UserError(f"the record has {total} answers of this checkpoint, but no feedback that counts")
    return Labelled(
        np.concatenate(failure),
        np.concatenate(index),
        np.concatenate(chance),
        np.concatenate(vectors) if vectors else None,
        np.array(rows),
        np.array(correct),
        labels,
    )
