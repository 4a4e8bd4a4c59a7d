"""The door's side of a record: rows are queued as answers go out, and written by a thread of its own.

A slow or full disk, or a database that is away, costs rows, which are counted, and never an answer.
"""

from __future__ import annotations

import random
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from prometheus_client import CollectorRegistry, Counter
from tritonclient.grpc import service_pb2 as pb

from vilu.errors import UserError
from vilu.serving.answers import STAGE
from vilu.serving.record import open_record
from vilu.serving.record.table import ANSWER, SCHEMA, Reply, table_of
from vilu.serving.server import PROBE_IMAGE

MOST_REPLIES = 8192  # that wait to be written; more are dropped
MOST_BYTES = 128 << 20  # of them together
WRITE_SECONDS = 0.8  # between two writes; a kill loses a second at most
RETRY_SECONDS = 2.0  # until a record that failed is tried again; rows wait in the queue meanwhile
TIDY_SECONDS = 60.0
CLOSE_SECONDS = 5.0  # that the end waits for the last write
OWN_CANDIDATES = ("LABELS", "TEXT_EMBEDDINGS")
_ID = re.compile(r"[!-~]{1,256}")  # what a header can carry


@dataclass(frozen=True)
class RecordOptions:
    """What is recorded.

    Attributes:
        where: a folder, postgresql://... or @FILE that holds one of these.
        share: of the requests that is recorded, in (0, 1].
        embeddings: record the image embedding too, in float16, and the entropy.
        entropy: record the entropy.
        keep_days: remove rows that are older; None keeps all.
        label_accepted, label_rejected: share of the accepted and of the rejected answers that people are to label.

    Raises:
        UserError: a number out of range.
    """

    where: str
    share: float = 1.0
    embeddings: bool = False
    entropy: bool = False
    keep_days: float | None = None
    label_accepted: float = 0.02
    label_rejected: float = 1.0

    def __post_init__(self) -> None:
        for name in ("share", "label_accepted", "label_rejected"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"record: {name} must be in (0, 1], got {getattr(self, name)}")
        if self.keep_days is not None and not self.keep_days > 0:
            raise UserError(f"record: keep_days must be above 0, got {self.keep_days}")


class Recorder:
    """Records replies.

    Args:
        registry: takes the metrics vilu_record_rows_total and vilu_record_rows_dropped_total.

    Raises:
        UserError: the record cannot be opened.
    """

    def __init__(self, options: RecordOptions, registry: CollectorRegistry) -> None:
        self.options = options
        self.record = open_record(options.where, create=True)
        self.rows = Counter("vilu_record_rows", "Rows that were recorded.", registry=registry)
        self.dropped = Counter(
            "vilu_record_rows_dropped", "Rows that were not recorded.", ("reason",), registry=registry
        )
        for reason in ("queue_full", "write_failed", "unreadable"):
            self.dropped.labels(reason)
        self.waiting: deque[Reply] = deque()
        self.put = self.taken = 0  # bytes, each counted by one thread
        self.references: dict[str, str] = {}
        self.kept: set[str] = set()  # the checkpoints whose reference is in the record
        self.ending = threading.Event()
        self.random = np.random.default_rng()
        self.failed = ""  # why the last write failed
        self.tidied = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="record", daemon=True)
        self.thread.start()

    def begin(
        self, request: pb.ModelInferRequest, raw: Sequence[bytes | memoryview], model: Mapping[str, Any]
    ) -> Recording | None:
        """How one request is recorded; None where it is not: outside the share, or the question of a health check.

        Args:
            request, raw: what `check.parsed_question` returned.
            model: what `check.tensors` made of the asked model's configuration.
        """
        if not model["outputs"].issuperset(ANSWER) or random.random() >= self.options.share:
            return None
        if len(raw) == 1 and len(raw[0]) == len(PROBE_IMAGE) + 4 and bytes(raw[0][4:]) == PROBE_IMAGE:
            return None
        # What can be known is not asked for: each output costs the server time.
        own = any(one.name in OWN_CANDIDATES for one in request.inputs)
        named = request.parameters["class_set"].string_param if "class_set" in request.parameters else ""
        class_set = "" if own else "default" if named in ("", "default") else None
        more = ["CLASS_SET"] if class_set is None else []
        if self.options.embeddings:
            more += ["IMAGE_EMBEDDING", "ENTROPY"]
        elif self.options.entropy:
            more += ["ENTROPY"]
        more += STAGE  # of a cascade
        asked = {output.name for output in request.outputs}
        missing = [name for name in (*ANSWER, *more) if name in model["outputs"] and name not in asked]
        given = request.id if _ID.fullmatch(request.id) else secrets.token_hex(16)
        return Recording(given, missing if asked else [], class_set)

    def add(self, data: bytes, recording: Recording, checkpoint: str, reference: str = "") -> None:
        """Queue a reply, as it came. It never waits. All calls come from one thread.

        Args:
            reference: what the checkpoint's answers are compared with, as JSON.
        """
        if reference and self.references.get(checkpoint) != reference:
            self.references[checkpoint] = reference
            self.kept.discard(checkpoint)
        if len(self.waiting) >= MOST_REPLIES or self.put - self.taken + len(data) > MOST_BYTES:
            self.dropped.labels("queue_full").inc(_rows(data))
            return
        self.put += len(data)
        self.waiting.append((data, recording.id, time.time_ns() // 1000, checkpoint, recording.class_set))

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        self.ending.set()
        self.thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        rows = SCHEMA.empty_table()
        while True:
            ending = self.ending.wait(RETRY_SECONDS if self.failed else WRITE_SECONDS)
            if not len(rows):
                rows = self._take()
            if len(rows) and self._write(rows):
                rows = SCHEMA.empty_table()
            if time.monotonic() - self.tidied > TIDY_SECONDS:
                self.tidied = time.monotonic()
                self._try(lambda: self.record.tidy(self.options.keep_days))
            if ending:
                break
        last = pa.concat_tables([rows, self._take()])
        if len(last):
            self._write(last)
        self.record.close()

    def _take(self) -> pa.Table:
        replies = [self.waiting.popleft() for _ in range(min(len(self.waiting), MOST_REPLIES))]
        self.taken += sum(len(reply[0]) for reply in replies)
        try:
            return table_of(replies, self.random, self.options.label_accepted, self.options.label_rejected)
        except Exception as error:  # a server behind that answers what no server of ours does; the thread goes on
            print(f"vilu: replies cannot be recorded: {error!r}", file=sys.stderr, flush=True)
            self.dropped.labels("unreadable").inc(sum(_rows(reply[0]) for reply in replies))
            return SCHEMA.empty_table()

    def _write(self, rows: pa.Table) -> bool:
        """Write rows; False where they are to be tried once more, as the queue has room for what comes meanwhile."""
        for checkpoint in set(self.references) - self.kept:
            if self._try(lambda: self.record.put_reference(checkpoint, self.references[checkpoint])):  # noqa: B023
                self.kept.add(checkpoint)
        if self._try(lambda: self.record.append(rows)):
            self.rows.inc(len(rows))
            return True
        if len(self.waiting) < MOST_REPLIES // 2 and not self.ending.is_set():
            return False
        self.dropped.labels("write_failed").inc(len(rows))
        return True

    def _try(self, work: Any) -> bool:
        try:
            work()
        except Exception as error:  # whatever a disk, a database or their libraries raise, the thread goes on
            if not self.failed:
                print(f"vilu: the record cannot be written: {error}", file=sys.stderr, flush=True)
            self.failed = str(error) or type(error).__name__
            return False
        self.failed = ""
        return True


def _rows(data: bytes) -> int:
    reply = pb.ModelInferResponse.FromString(data)
    return max(1, reply.outputs[0].shape[0] if reply.outputs else 1)


class Recording:
    """How one request is recorded.

    Attributes:
        id: of its answers (see `answer_ids`).
        missing: outputs that the record needs and the request does not name; they are taken out of the reply again.
        class_set: that of its answers; "" for candidates of its own; None where the reply's CLASS_SET says it.
    """

    __slots__ = ("class_set", "id", "missing")

    def __init__(self, request_id: str, missing: list[str], class_set: str | None = None) -> None:
        self.id, self.missing, self.class_set = request_id, missing, class_set

    @property
    def more(self) -> bytes:
        """What to append to the request's bytes: a message's repeated fields add up."""
        if not self.missing:
            return b""
        outputs = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in self.missing]
        return pb.ModelInferRequest(outputs=outputs).SerializeToString()

    def stripped(self, reply: pb.ModelInferResponse, data: bytes) -> bytes:
        """The reply's bytes without what the client did not ask for. data: the bytes that came."""
        if not self.missing:
            return data
        out = pb.ModelInferResponse()
        out.CopyFrom(reply)
        for i in range(len(reply.outputs) - 1, -1, -1):
            if reply.outputs[i].name in self.missing:
                del out.outputs[i]
                if reply.raw_output_contents:
                    del out.raw_output_contents[i]
        return out.SerializeToString()
