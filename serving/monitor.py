"""What a record says about the promise of a calibration: coverage, risk, drift and alarms, by class set and version.

It is read in bounded memory: the feedback is held, but of the answers only the latest that wait for theirs.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vilu.errors import UserError
from vilu.evaluation.reference import distance_bins, failure_bins
from vilu.evaluation.sequential import Drift, RiskBound
from vilu.serving.record.feedback import is_right
from vilu.serving.record.table import Feedback, Record

STREAM = ("class_set", "class_set_version", "model_version", "checkpoint")
MATCHED = (*STREAM, "id", "time", "label", "failure_probability", "accept", "label_probability", "chosen")
COLUMNS = (*MATCHED, "class_index", "stage", "escalation_failed", "embedding")
ENOUGH = 20  # right and wrong answers with labels, from which AUC and FPR95 are shown
WAITING = 100_000  # answers without feedback that are kept in memory; others are looked up in the record
LATEST = 20  # rejected answers that are shown
DEFAULT = "default"  # the exported class set, which the calibration was made on


Verdict = tuple[bool | None, str | None]  # of Feedback: right, label


@dataclass(frozen=True)
class Window:
    """One stretch of time. Times are in seconds since 1970; shares and risks are fractions, NaN where unknown.

    escalated: share of the answers of a cascade that a later stage gave or was to give; NaN without a cascade.
    """

    start: float
    answers: int
    coverage: float
    expected_risk: float
    labelled: int
    risk: float
    low: float
    high: float
    escalated: float


@dataclass(frozen=True)
class Watched:
    """A class set's version, as one checkpoint answered from it.

    Attributes:
        class_set, class_set_version, model_version, checkpoint: what the answers came from.
        answers, accepted: how many there are.
        labelled: accepted answers that were chosen to be labelled and have feedback.
        risk, low, high: error rate among the accepted, and its bounds at all times at once.
        expected_risk: mean P(failure) of the accepted answers: their error rate if P(failure) is calibrated.
        target_risk: what was promised; None where nothing was.
        auc, fpr95: of P(failure), over all labelled answers, weighted; None where the labels are too few.
        drift: by statistic, the natural logarithm of the evidence that the answers differ from the calibration data.
        alarms: "risk", "drift", both or none.
        windows: the same over time.
        rejected: the latest rejected answers.
        stages: stage of a cascade, as text -> how many answers it gave; empty without a cascade.
        escalation_failed: answers that a later stage was to give and could not.
    """

    class_set: str
    class_set_version: int
    model_version: int
    checkpoint: str
    answers: int
    accepted: int
    labelled: int
    risk: float
    low: float
    high: float
    expected_risk: float
    target_risk: float | None
    auc: float | None
    fpr95: float | None
    drift: dict[str, float]
    alarms: tuple[str, ...]
    windows: tuple[Window, ...]
    rejected: tuple[dict[str, Any], ...]
    stages: dict[str, int]
    escalation_failed: int


@dataclass(frozen=True)
class Report:
    """What `watch` found.

    Attributes:
        watched: one for each class set, version and checkpoint, the latest last.
        feedback: how many answers have feedback that counts ("used"), have it though they were not chosen ("unasked":
            it is left out, as people report wrong answers more often than right ones), have it twice with another
            verdict ("changed": the later one counts), and how many ids the record does not have ("unknown").
    """

    watched: tuple[Watched, ...]
    feedback: dict[str, int]

    @property
    def alarm(self) -> bool:
        return any(one.alarms for one in self.watched)


def watch(record: Record, *, target_risk: float | None = None, level: float = 0.05, window: float = 86400.0) -> Report:
    """Read a record once. See `Watcher`."""
    return Watcher(record, target_risk=target_risk, level=level, window=window).read()


class Watcher:
    """Reads a record again and again; each time only what came since.

    Rows that are removed from the record after they were read (`--keep-days`) stay in the figures: a sequential test
    that started anew whenever old rows go would not keep its level.

    Args:
        target_risk: the promise, where the calibration made none or another one is to be watched.
        level: highest probability, over all time, of a false alarm for the risk, and of one for drift, for each of
            Report.watched.
        window: seconds of a window.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self, record: Record, *, target_risk: float | None = None, level: float = 0.05, window: float = 86400.0
    ) -> None:
        if not 0 < level < 1 or not (target_risk is None or 0 < target_risk < 1) or not window > 0:
            raise UserError("level and target_risk must be in (0, 1), window above 0")
        self.record, self.target_risk, self.level, self.window = record, target_risk, level, window
        self._forget()

    def _forget(self) -> None:
        self.done: dict[str, int] = {}  # what has been read, see Record.batches
        self.streams: dict[tuple[str, int, int, str], _Stream] = {}
        self.said: dict[str, Verdict] = {}
        self.used: dict[str, tuple[_Answer, bool]] = {}  # by id: what was drawn and has feedback, and whether wrong
        self.unasked: set[str] = set()  # ids with feedback whose answers were not drawn
        self.waiting: dict[str, _Answer] = {}  # drawn, without feedback yet: the latest WAITING of them

    def read(self) -> Report:
        """Read what came since the last call.

        Raises:
            UserError: the record cannot be read; the next call reads all of it again.
        """
        try:
            again = bool(self.done)
            changed, new = self._hear()
            for table in self.record.batches(COLUMNS, self.done):
                for stream, mine in self._by_stream(table):
                    stream.add(mine)
                    self._match(stream, mine)
            others = new - self.used.keys() - self.unasked
            if again and others:  # they are about answers that came earlier, and were not drawn or are long ago
                for table in self.record.find(others, MATCHED):
                    for stream, mine in self._by_stream(table):
                        self._match(stream, mine)
        except BaseException:
            self._forget()
            raise
        feedback = {"used": len(self.used), "unasked": len(self.unasked), "changed": changed}
        feedback["unknown"] = len(self.said) - len(self.used) - len(self.unasked)
        watched = sorted(self.streams.values(), key=lambda one: one.last)
        return Report(tuple(one.found(self.target_risk, self.level) for one in watched), feedback)

    def _hear(self) -> tuple[int, set[str]]:
        """Take the feedback about answers that have been read: how many verdicts were changed, and the new ids."""
        said, changed = _latest(self.record.feedback())
        new = said.keys() - self.said.keys()
        self.said = said
        self.unasked &= said.keys()
        for name, (answer, before) in list(self.used.items()):
            if name not in said:  # removed, as it is old
                del self.used[name]
            elif (wrong := answer.wrong(said[name])) != before:
                answer.add_verdict(before, -1)
                answer.add_verdict(wrong, 1)
                self.used[name] = answer, wrong
        for name in new & self.waiting.keys():
            self._use(name, self.waiting.pop(name))
        return changed, new

    def _by_stream(self, table: pa.Table) -> Iterator[tuple[_Stream, pa.Table]]:
        keys = list(zip(*(table[name].to_pylist() for name in STREAM), strict=True))
        for key in dict.fromkeys(keys):
            if key not in self.streams:
                self.streams[key] = _Stream(key, self.record.reference(key[3]), self.window)
            yield self.streams[key], table if len(set(keys)) == 1 else table.filter([one == key for one in keys])

    def _match(self, stream: _Stream, table: pa.Table) -> None:
        """Bring answers and feedback together. Of several answers with one id, the first that was drawn counts."""
        names, chosen = table["id"].to_pylist(), table["chosen"].to_pylist()
        rows = [row for row, name in enumerate(names) if chosen[row] or name in self.said]
        for row, answer in zip(rows, stream.answers(table.take(pa.array(rows, pa.int64()))), strict=True):
            name = names[row]
            if name in self.used:
                continue
            if not chosen[row]:
                self.unasked.add(name)
            elif name in self.said:
                self._use(name, answer)
            elif name not in self.waiting:
                self.waiting[name] = answer
                if len(self.waiting) > WAITING:
                    del self.waiting[next(iter(self.waiting))]

    def _use(self, name: str, answer: _Answer) -> None:
        wrong = answer.wrong(self.said[name])
        self.unasked.discard(name)
        self.used[name] = answer, wrong
        answer.add_verdict(wrong, 1)


def _latest(given: Iterable[Feedback]) -> tuple[dict[str, Verdict], int]:
    said: dict[str, Verdict] = {}
    changed = set()
    for one in given:
        if said.get(one.id, (one.right, one.label)) != (one.right, one.label):
            changed.add(one.id)
        said[one.id] = one.right, one.label
    return said, len(changed)


@dataclass
class _Sums:
    """Of one window. labels: (wrong, probability of being chosen) of accepted answers -> how many."""

    answers: int = 0
    accepted: int = 0
    expected: float = 0.0
    staged: int = 0
    escalated: int = 0
    labels: Counter[tuple[float, float]] = field(default_factory=Counter)


class _Answer(NamedTuple):
    """What feedback about an answer needs."""

    stream: _Stream
    window: int
    label: str
    failure_probability: float
    accept: bool
    chance: float

    def wrong(self, said: Verdict) -> bool:
        return not is_right(self.label, *said)

    def add_verdict(self, wrong: bool, times: int) -> None:
        self.stream.scored[self.failure_probability, float(wrong), 1 / self.chance] += times
        if self.accept:
            self.stream.least = min(self.stream.least, self.chance)
            self.stream.windows.setdefault(self.window, _Sums()).labels[float(wrong), self.chance] += times


class _Stream:
    def __init__(self, key: tuple[str, int, int, str], reference: str | None, window: float) -> None:
        self.key, self.window = key, window
        self.windows: dict[int, _Sums] = {}
        self.least = 1.0  # probability with which an accepted answer was chosen
        self.last = 0.0
        self.rejected: deque[dict[str, Any]] = deque(maxlen=LATEST)
        self.stages: Counter[int] = Counter()
        self.failed = 0
        self.scored: Counter[tuple[float, float, float]] = Counter()  # (P(failure), wrong, weight) of what was labelled
        self.reference = json.loads(reference) if reference else {}
        self.drift: dict[str, Drift] = {}
        if self.reference and key[0] == DEFAULT:
            names = ("failure_probability", "classes")
            self.drift = {name: Drift(self.reference[name], seed) for seed, name in enumerate(names)}
            if "embedding" in self.reference:
                self.drift["embedding"] = Drift(self.reference["embedding"]["distance"], len(names))

    def add(self, table: pa.Table) -> None:
        failure = table["failure_probability"].to_numpy()
        accept = table["accept"].to_numpy(zero_copy_only=False)
        seconds = table["time"].cast(pa.int64()).to_numpy() / 1e6
        self.last = max(self.last, float(seconds.max()))
        at = (seconds // self.window).astype(np.int64)
        stage = table["stage"].fill_null(0).to_numpy()
        failed = table["escalation_failed"].fill_null(False).to_numpy()
        self.stages.update(stage[stage > 0].tolist())
        self.failed += int(failed.sum())
        if accept.any():
            self.least = min(self.least, float(_chances(table)[accept].min()))
        for number in np.unique(at).tolist():
            sums, here = self.windows.setdefault(number, _Sums()), at == number
            sums.answers += int(here.sum())
            sums.accepted += int((here & accept).sum())
            sums.expected += float(failure[here & accept].sum(dtype=np.float64))
            sums.staged += int((here & (stage > 0)).sum())
            sums.escalated += int((here & ((stage > 1) | failed)).sum())
        self._see_drift(table, failure)
        for row in np.flatnonzero(~accept)[-LATEST:].tolist():
            self.rejected.append(
                {
                    "id": table["id"][row].as_py(),
                    "time": float(seconds[row]),
                    "label": table["label"][row].as_py(),
                    "failure_probability": float(failure[row]),
                }
            )

    def answers(self, table: pa.Table) -> Iterator[_Answer]:
        """What is kept of each row until it has feedback, and after."""
        windows = (table["time"].cast(pa.int64()).to_numpy() / 1e6 // self.window).astype(np.int64).tolist()
        columns = (table[name].to_pylist() for name in ("label", "failure_probability", "accept"))
        for row in zip(windows, *columns, _chances(table).tolist(), strict=True):
            yield _Answer(self, *row)

    def _see_drift(self, table: pa.Table, failure: np.ndarray) -> None:
        if not self.drift:
            return
        self.drift["failure_probability"].add(failure_bins(failure))
        index = table["class_index"].to_numpy()
        if index.max() < len(self.reference["classes"]):
            self.drift["classes"].add(index)
        if "embedding" in self.drift:
            rows = table["embedding"].drop_null()
            known = self.reference["embedding"]
            if len(rows):
                flat = rows.combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
                if flat.shape[1] == len(known["mean"]):
                    self.drift["embedding"].add(distance_bins(flat, known["mean"], known["variance"]))

    def found(self, target: float | None, level: float) -> Watched:
        target = self.reference.get("target_risk") if target is None else target
        whole = RiskBound(self.least)
        windows, over = [], False
        for number, (at, sums) in enumerate(sorted(self.windows.items()), 1):
            bound = RiskBound(self.least)
            for one in (whole, bound):
                for (wrong, chance), times in (+sums.labels).items():
                    one.add(np.full(times, wrong), chance)
            low, high = bound.interval(level)
            # Half of the level is for all windows together, the k-th gets a share of 1 / (k (k + 1)) of it.
            strict = bound.interval(level / (number * (number + 1)))[0] if target is not None else 0.0
            over |= target is not None and strict > target
            windows.append(
                Window(
                    at * self.window,
                    sums.answers,
                    sums.accepted / sums.answers,
                    sums.expected / sums.accepted if sums.accepted else math.nan,
                    bound.labelled,
                    bound.estimate,
                    low,
                    high,
                    sums.escalated / sums.staged if sums.staged else math.nan,
                )
            )
        low, high = whole.interval(level)
        over |= target is not None and low > target
        evidence = {name: one.highest for name, one in self.drift.items()}
        drifted = bool(evidence) and max(evidence.values()) > math.log(len(evidence) / level)
        accepted = sum(sums.accepted for sums in self.windows.values())
        auc, fpr95 = _ranking(+self.scored)
        return Watched(
            *self.key,
            answers=sum(sums.answers for sums in self.windows.values()),
            accepted=accepted,
            labelled=whole.labelled,
            risk=whole.estimate,
            low=low,
            high=high,
            expected_risk=sum(s.expected for s in self.windows.values()) / accepted if accepted else math.nan,
            target_risk=target,
            auc=auc,
            fpr95=fpr95,
            drift=evidence,
            alarms=(*(("risk",) if over else ()), *(("drift",) if drifted else ())),
            windows=tuple(windows),
            rejected=tuple(self.rejected),
            stages={str(stage): number for stage, number in sorted(self.stages.items())},
            escalation_failed=self.failed,
        )


def _chances(table: pa.Table) -> np.ndarray:
    return table["label_probability"].to_numpy().astype(np.float64).round(9)


def _ranking(scored: Mapping[tuple[float, float, float], int]) -> tuple[float | None, float | None]:
    """AUC and FPR95 as `vilu.evaluation.metrics` defines them, each answer weighted by 1 / probability."""
    failure, wrong, weight = np.array(list(scored), np.float64).reshape(-1, 3).T
    times = np.array(list(scored.values()), np.float64)
    weight = weight * times
    if min(times @ wrong, times @ (1 - wrong)) < ENOUGH:
        return None, None
    from sklearn.metrics import auc, roc_curve

    fprs, tprs, _ = roc_curve(1 - wrong, -failure, sample_weight=weight)
    return float(auc(fprs, tprs)), float(np.interp(0.95, tprs, fprs))
