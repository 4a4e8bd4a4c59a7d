"""What a record says about the promise of a calibration: coverage, risk, drift and alarms, by class set and version.

`watch` reads a record once, in bounded memory: it holds the feedback, not the answers.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from vilu.errors import UserError
from vilu.evaluation.reference import distance_bins, failure_bins
from vilu.evaluation.sequential import Drift, RiskBound
from vilu.serving.record.feedback import is_right
from vilu.serving.record.table import Feedback, Record

COLUMNS = ("id", "time", "checkpoint", "model_version", "class_set", "class_set_version", "class_index", "label",
           "failure_probability", "accept", "label_probability", "chosen", "embedding")  # fmt: skip
ENOUGH = 20  # right and wrong answers with labels, from which AUC and FPR95 are shown
LATEST = 20  # rejected answers that are shown
DEFAULT = "default"  # the exported class set, which the calibration was made on


@dataclass(frozen=True)
class Window:
    """One stretch of time. Times are in seconds since 1970; shares and risks are fractions, NaN where unknown."""

    start: float
    answers: int
    coverage: float
    expected_risk: float
    labelled: int
    risk: float
    low: float
    high: float


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
    """Read a record.

    Args:
        target_risk: the promise, where the calibration made none or another one is to be watched.
        level: highest probability, over all time, of a false alarm for the risk, and of one for drift, for each of
            Report.watched.
        window: seconds of a window.

    Raises:
        UserError: a record that cannot be read, or a number out of range.
    """
    if not 0 < level < 1 or not (target_risk is None or 0 < target_risk < 1) or not window > 0:
        raise UserError("level and target_risk must be in (0, 1), window above 0")
    said, changed = _latest(record.feedback())
    streams: dict[tuple[str, int, int, str], _Stream] = {}
    counts = Counter(used=0, unasked=0, changed=changed, unknown=0)
    seen: set[str] = set()
    for table in record.batches(COLUMNS):
        keys = list(
            zip(*(table[n].to_pylist() for n in ("class_set", "class_set_version", "model_version", "checkpoint")),
                strict=True)
        )  # fmt: skip
        for key in dict.fromkeys(keys):
            if key not in streams:
                streams[key] = _Stream(key, record.reference(key[3]), window)
            mine = table if len(set(keys)) == 1 else table.filter(pa.array([one == key for one in keys]))
            streams[key].add(mine, said, seen, counts)
    counts["unknown"] = len(said) - len(seen)
    watched = sorted(streams.values(), key=lambda one: one.last)
    return Report(tuple(one.found(target_risk, level) for one in watched), dict(counts))


def _latest(given: Iterable[Feedback]) -> tuple[dict[str, tuple[bool | None, str | None]], int]:
    said: dict[str, tuple[bool | None, str | None]] = {}
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
    labels: Counter[tuple[float, float]] = field(default_factory=Counter)


class _Stream:
    def __init__(self, key: tuple[str, int, int, str], reference: str | None, window: float) -> None:
        self.key, self.window = key, window
        self.windows: dict[int, _Sums] = {}
        self.least = 1.0  # probability with which an accepted answer was chosen
        self.last = 0.0
        self.rejected: deque[dict[str, Any]] = deque(maxlen=LATEST)
        self.scored: list[tuple[float, float, float]] = []  # (P(failure), wrong, weight) of what was labelled
        self.reference = json.loads(reference) if reference else {}
        self.drift: dict[str, Drift] = {}
        if self.reference and key[0] == DEFAULT:
            names = ("failure_probability", "classes")
            self.drift = {name: Drift(self.reference[name], seed) for seed, name in enumerate(names)}
            if "embedding" in self.reference:
                self.drift["embedding"] = Drift(self.reference["embedding"]["distance"], len(names))

    def add(self, table: pa.Table, said: dict[str, Any], seen: set[str], counts: Counter[str]) -> None:
        failure = table["failure_probability"].to_numpy()
        accept = table["accept"].to_numpy(zero_copy_only=False)
        chance = table["label_probability"].to_numpy().astype(np.float64).round(9)
        seconds = table["time"].cast(pa.int64()).to_numpy() / 1e6
        self.last = max(self.last, float(seconds.max()))
        at = (seconds // self.window).astype(np.int64)
        if accept.any():
            self.least = min(self.least, float(chance[accept].min()))
        for number in np.unique(at).tolist():
            sums, here = self.windows.setdefault(number, _Sums()), at == number
            sums.answers += int(here.sum())
            sums.accepted += int((here & accept).sum())
            sums.expected += float(failure[here & accept].sum())
        self._see_drift(table, failure)
        names, labels = table["id"].to_pylist(), table["label"].to_pylist()
        chosen = table["chosen"].to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(~accept)[-LATEST:].tolist():
            self.rejected.append(
                {
                    "id": names[row],
                    "time": float(seconds[row]),
                    "label": labels[row],
                    "failure_probability": float(failure[row]),
                }
            )
        for row, name in enumerate(names):
            if name not in said or name in seen:  # of several answers with one id, the first counts
                continue
            seen.add(name)
            if not chosen[row]:
                counts["unasked"] += 1
                continue
            counts["used"] += 1
            right, label = said[name]
            wrong = float(not is_right(labels[row], right, label))
            self.scored.append((float(failure[row]), wrong, 1 / float(chance[row])))
            if accept[row]:
                self.windows[int(at[row])].labels[wrong, float(chance[row])] += 1

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
                for (wrong, chance), times in sums.labels.items():
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
                )
            )
        low, high = whole.interval(level)
        over |= target is not None and low > target
        evidence = {name: one.highest for name, one in self.drift.items()}
        drifted = bool(evidence) and max(evidence.values()) > math.log(len(evidence) / level)
        accepted = sum(sums.accepted for sums in self.windows.values())
        auc, fpr95 = _ranking(self.scored)
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
        )


def _ranking(scored: list[tuple[float, float, float]]) -> tuple[float | None, float | None]:
    """AUC and FPR95 as `vilu.evaluation.metrics` defines them, each answer weighted by 1 / probability."""
    failure, wrong, weight = np.array(scored, np.float64).reshape(-1, 3).T
    if min(wrong.sum(), (1 - wrong).sum()) < ENOUGH:
        return None, None
    from sklearn.metrics import auc, roc_curve

    fprs, tprs, _ = roc_curve(1 - wrong, -failure, sample_weight=weight)
    return float(auc(fprs, tprs)), float(np.interp(0.95, tprs, fprs))
