"""The metrics that every table of an evaluation shows, in their order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vilu.evaluation import metrics
from vilu.evaluation.metrics import Metric

COVERAGES = (0.8, 0.9, 0.95)
TPR, BINS = 0.95, 15


@dataclass(frozen=True)
class Column:
    """A metric as the tables show it.

    key: its name in JSON and CSV.
    title: its name in a table's head.
    higher: whether a higher value is better.
    definition: what it measures, in one or two sentences.
    function: computes it from a confidence (or P(failure), see `probability`) and `correct`.
    two_sided: it is not defined where every answer is right or every answer is wrong.
    probability: it is computed on P(failure), so only for scores that give a probability.
    """

    key: str
    title: str
    higher: bool
    definition: str
    function: Metric
    two_sided: bool = False
    probability: bool = False


COLUMNS = (
    Column(
        "auc",
        "AUC",
        True,
        "Area under the ROC curve: the probability that a right answer has more confidence than a wrong one "
        "(a tie counts 1/2).",
        metrics.auroc,
        two_sided=True,
    ),
    Column(
        "fpr95",
        "FPR95",
        False,
        "Share of the wrong answers that are accepted where 95% of the right answers are accepted. The ROC curve is "
        "interpolated linearly.",
        metrics.fpr_at_tpr,
        two_sided=True,
    ),
    Column(
        "aupr_error",
        "AUPR-err",
        True,
        "Average precision of finding the wrong answers by their low confidence. Chance gives the failure rate.",
        metrics.aupr_error,
        two_sided=True,
    ),
    Column(
        "aurc",
        "AURC",
        False,
        "Area under the risk-coverage curve: the error rate among the most confident answers, averaged over all "
        "coverages.",
        metrics.aurc,
    ),
    Column(
        "ece",
        "ECE",
        False,
        "Expected calibration error of P(failure): its mean distance from the failure rate, over "
        f"{BINS} bins of equal width.",
        partial(metrics.ece, bins=BINS),
        probability=True,
    ),
    Column(
        "brier",
        "Brier",
        False,
        "Brier score: the mean squared difference between P(failure) and the outcome (1 for a wrong answer, 0 for a "
        "right one).",
        metrics.brier,
        probability=True,
    ),
    *(
        Column(
            f"accuracy_at_{c * 100:.0f}",
            f"Acc@{c * 100:.0f}",
            True,
            f"Share of right answers among the {c:.0%} most confident.",
            partial(metrics.accuracy_at_coverage, coverage=c),
        )
        for c in COVERAGES
    ),
)
INDEX = {column.key: i for i, column in enumerate(COLUMNS)}  # a metric's place in every array of all metrics
