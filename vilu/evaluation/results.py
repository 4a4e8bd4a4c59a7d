"""What an evaluation gives: its cases, rows and learning curves as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vilu.embeddings import EmbeddedSet
from vilu.evaluation.bootstrap import Comparison, Interval
from vilu.evaluation.metrics import Bools, Floats
from vilu.head import ViLUHead

# Methods whose confidence is a probability that the answer is right, so that ECE and Brier mean something.
PROBABILITIES = ("MCM", "class bias", "LVU-BCE", "LVU-MSE", "ConfidNet", "BayesVLM", "ViLU")
OURS = "ViLU"
COMPARED = ("auc", "fpr95")  # the metrics in which ViLU is compared with every other method
SIGNIFICANCE = 0.05
FEW = 50  # with fewer failures, or fewer right answers, nothing is claimed about which method is better


def too_few(failures: int, samples: int) -> str:
    """Say that there are too few failures, or too few right answers, to compare methods; "" where there are enough.

    A bootstrap of a handful of failures cannot see how other failures would differ, so its p-values are far too small.
    """
    right = samples - failures
    if min(failures, right) >= FEW:
        return ""
    count, kind = (failures, "failure") if failures <= right else (right, "right answer")
    return f"{count} {kind}{'s' * (count != 1)} among {samples:,} answers, fewer than {FEW}"


@dataclass(frozen=True)
class Case:
    """A test set, the data that the baselines are fitted on, and the head to evaluate.

    test: the images that are scored.
    train: the data that the baselines are fitted on; None: the methods that need fitting become rows with a reason.
        A data set other than the test set's own makes a cross-dataset evaluation; the classes are always the test's.
    head: the ViLU head; None: the ViLU row has a reason instead of numbers.
    known: number of test images that the head or a baseline was trained on; methods are compared only where it is 0.
    """

    test: EmbeddedSet
    train: EmbeddedSet | None = None
    head: ViLUHead | None = None
    known: int = 0


@dataclass(frozen=True)
class Row:
    """One method on one data set.

    method: name of the score.
    reason: why there are no numbers; "" where there are.
    cells: by metric key, the metric and its interval, where the metric is defined.
    against: by metric key of COMPARED, ViLU minus this method on the same resamples; empty for ViLU itself, and where
        there are too few failures or right answers to compare.
    """

    method: str
    reason: str = ""
    cells: Mapping[str, Interval] = field(default_factory=dict)
    against: Mapping[str, Comparison] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """All methods on one data set, or their mean over several data sets.

    name: name of the test set.
    trained_on: name of the data that the baselines were fitted on; "" where there is none.
    captions: whether each image comes with its own text rather than with a label.
    candidates: number of classes, or of captions in a group; 0 for a mean.
    samples: number of images scored.
    dropped: number of images left out, in a last incomplete group of captions.
    failures: number of wrong answers.
    accuracy: share of right answers.
    known: number of images that the head or a baseline was trained on; where it is not 0, no method is compared.
    rows: one row a method.
    note: what is not defined on this data set and why; "" where everything is defined.
    correct: (samples,) whether each answer is right; empty for a mean.
    confidences: by method, (samples,) its confidence; empty for a mean.
    draws: by method, (resamples, metrics) every metric on every bootstrap resample.
    chance: accuracy of answers that do not look at the image; 0 for a mean.
    chance_rule: how `chance` is answered, in words.
    """

    name: str
    trained_on: str
    captions: bool
    candidates: int
    samples: int
    dropped: int
    failures: int
    accuracy: float
    rows: tuple[Row, ...]
    note: str = ""
    known: int = 0
    correct: Bools = field(default_factory=lambda: np.empty(0, bool), repr=False, compare=False)
    confidences: Mapping[str, Floats] = field(default_factory=dict, repr=False, compare=False)
    draws: Mapping[str, Floats] = field(default_factory=dict, repr=False, compare=False)
    chance: float = 0.0
    chance_rule: str = ""

    @property
    def failure_probabilities(self) -> dict[str, Floats]:
        """By method, P(failure) (samples,), for the methods that give a probability."""
        return failure_probabilities(self.confidences)


@dataclass(frozen=True)
class Point:
    """The heads trained on one number of training images.

    size: number of training images.
    aucs: AUC of the head of each seed that could be trained.
    mean: mean AUC over the seeds; None where no head could be trained.
    low: lower end of Student's 95% interval over the seeds; None with fewer than two seeds.
    high: upper end of that interval.
    difference: mean AUC minus MCM's AUC.
    p_value: two-sided p-value of no difference, over both seeds and test images.
    reason: why a seed could not be trained; "" where all could.
    """

    size: int
    aucs: tuple[float, ...]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    p_value: float | None = None
    reason: str = ""

    @property
    def better(self) -> bool:
        """Whether the heads are significantly better than MCM."""
        return self.p_value is not None and self.p_value < SIGNIFICANCE and (self.difference or 0) > 0


@dataclass(frozen=True)
class NeededImages:
    """How many training images a head needs to beat MCM.

    kind: "reached" (the head was seen to beat MCM), "extrapolated" (it should, with more images) or "unknown".
    text: the answer in words.
    size: number of images; None if unknown.
    low: "reached": the next smaller size that was tried; "extrapolated": lower end of the 95% interval.
    high: "reached": as `size`; "extrapolated": upper end of the interval, None where the data do not bound it.
    """

    kind: str
    text: str
    size: int | None = None
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class LearningCurve:
    """AUC of heads trained on more and more images.

    test: name of the test set.
    samples: number of test images scored.
    seeds: seeds of the heads at each size.
    mcm: AUC of MCM, which needs no training.
    points: one a size, in increasing order.
    needed: how many training images a head needs to beat MCM.
    power_law: (a, b, c) of AUC ≈ a − b · size^−c; None where it could not be fitted.
    """

    test: str
    samples: int
    seeds: tuple[int, ...]
    mcm: Interval
    points: tuple[Point, ...]
    needed: NeededImages
    power_law: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """All methods on all cases.

    results: one a case; captions at the headline number of candidates.
    methods: names of the scores, in the order of the rows.
    sweeps: by case name, the results over the number of candidates K (captions only).
    mean: mean over the results; None for a single one.
    resamples: number of bootstrap resamples.
    level: level of the intervals.
    seed: seed of the bootstrap.
    curves: by case name, its learning curve, where one was asked for.
    settings: what the report should list, as text by name.
    """

    results: tuple[Result, ...]
    methods: tuple[str, ...]
    sweeps: Mapping[str, tuple[Result, ...]]
    mean: Result | None
    resamples: int
    level: float
    seed: int
    curves: Mapping[str, LearningCurve] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


def failure_probabilities(confidences: Mapping[str, Floats]) -> dict[str, Floats]:
    """1 − confidence, for the methods whose confidence is a probability."""
    # A softmax in float32 may sum to a little over 1.
    return {name: np.clip(1 - confidences[name], 0, 1) for name in confidences if name in PROBABILITIES}
