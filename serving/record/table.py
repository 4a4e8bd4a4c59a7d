"""The columns of a record, and its rows from a server's reply."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from tritonclient.grpc import service_pb2 as pb

from vilu.serving.answers import answer_ids

# An answer. class_set and its version: "" and 0 for candidates of the request's own. label_probability: the chance with
# which the answer was chosen to be labelled by a person; chosen: whether it was. part: which write of its writer's.
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
        ("embedding", pa.list_(pa.float16())),
    ]
)
ANSWER = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")
_NUMPY = {"BOOL": "?", "INT32": "<i4", "FP32": "<f4"}
Row = dict[str, Any]


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

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows, whole or not at all. Raises UserError."""

    def tidy(self, keep_days: float | None) -> None:
        """Bring the record in order now and then, and remove what is older. Raises UserError."""

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows in about the order of their time, at most some 10,000 at once."""

    def known(self, ids: Iterable[str]) -> set[str]:
        """Those ids that the record has answers of."""

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


def rows_of(
    reply: pb.ModelInferResponse, request_id: str, time: datetime, checkpoint: str, class_set: str | None = None
) -> list[Row]:
    """The rows of a reply that has at least the outputs ANSWER, without label_probability and chosen.

    Args:
        class_set: "default", which has the model's version; "" for candidates of the request's own; None: as the
            reply's CLASS_SET says.
    """
    columns = {
        output.name: _column(output, reply.raw_output_contents[i])
        for i, output in enumerate(reply.outputs)
        if output.name in (*ANSWER, "CLASS_SET", "ENTROPY", "IMAGE_EMBEDDING")
    }
    version = int(reply.model_version or 0)
    rows = []
    for i, answer_id in enumerate(answer_ids(request_id, len(columns["LABEL"]))):
        name, _, number = (columns["CLASS_SET"][i] if class_set is None else f"{class_set}@{version}").partition("@")
        rows.append(
            {
                "id": answer_id,
                "time": time,
                "model": reply.model_name,
                "model_version": version,
                "checkpoint": checkpoint,
                "class_set": name,
                "class_set_version": int(number) if name else 0,
                "class_index": int(columns["CLASS_INDEX"][i]),
                "label": columns["LABEL"][i],
                "confidence": float(columns["CONFIDENCE"][i]),
                "failure_probability": float(columns["FAILURE_PROBABILITY"][i]),
                "accept": bool(columns["ACCEPT"][i]),
                "entropy": float(columns["ENTROPY"][i]) if "ENTROPY" in columns else None,
                "embedding": columns["IMAGE_EMBEDDING"][i].astype(np.float16) if "IMAGE_EMBEDDING" in columns else None,
            }
        )
    return rows


def _column(output: Any, raw: bytes) -> Any:
    if output.datatype == "BYTES":
        texts, at = [], 0
        while at < len(raw):
            (length,) = struct.unpack_from("<I", raw, at)
            texts.append(raw[at + 4 : at + 4 + length].decode("utf-8", "replace").replace("\0", "\ufffd"))
            at += 4 + length
        return texts
    values = np.frombuffer(raw, _NUMPY[output.datatype])
    return values.reshape(output.shape) if output.name == "IMAGE_EMBEDDING" else values
