"""All scores side by side on one or several data sets, with bootstrap intervals and paired tests.

    evaluation = evaluate([Case(test, train, head)])
    evaluation.results[0].rows      # one row a method
    report.write(evaluation, Path("evaluation"))

A method that cannot be computed is a row with the reason; no number in a result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings import BLOCK, EmbeddedSet, Embeddings
from vilu.errors import UserError
from vilu.evaluation.bootstrap import COLUMNS, INDEX, comparison, draws, interval, one_sided, values
from vilu.evaluation.metrics import Bools, Comparison, Floats, Interval
from vilu.scores import SCORES, Score

if TYPE_CHECKING:
    from vilu.evaluation.learning_curve import LearningCurve
    from vilu.head import ViLUHead

# Methods whose confidence is a probability that the answer is right, so that ECE and Brier mean something.
PROBABILITIES = ("MCM", "LVU-BCE", "LVU-MSE", "ConfidNet", "BayesVLM", "ViLU")
OURS = "ViLU"
COMPARED = ("auc", "fpr95")
CANDIDATES = (128, 256, 512, 1024, 2048, 4096, 8192)
PUBLISHED_CANDIDATES = 1024  # of the published caption tables: the K nearest to it is the headline
CLASS_BOUND = ("Rel-U",)  # what they learn belongs to the classes they were fitted on
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Case:
    """One line of work: a test set, what the baselines are fitted on, and the head under test.

    train: None leaves the methods that need fitting as rows with the reason. Another data set than the test's
        makes a cross-dataset evaluation; the classes are always the test's.
    head: None leaves ViLU out in the same way.
    """

    test: EmbeddedSet
    train: EmbeddedSet | None = None
    head: ViLUHead | None = None


@dataclass(frozen=True)
class Row:
    """One method on one data set.

    reason: why there is no number, "" where there are. cells: by column key, where the column is defined.
    against: ViLU minus this method on the same draws, for the columns of COMPARED; empty for ViLU itself.
    """

    method: str
    reason: str = ""
    cells: Mapping[str, Interval] = field(default_factory=dict)
    against: Mapping[str, Comparison] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """All methods on one data set, or their mean over several.

    samples: images scored; dropped: images of a last incomplete group of captions. candidates: classes, or
    captions in a group. note: what is not defined here and why, "" where all is. correct, confidences and
    draws are what the rows were computed from; those of a mean hold draws only.
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
    correct: Bools = field(default_factory=lambda: np.empty(0, bool), repr=False, compare=False)
    confidences: Mapping[str, Floats] = field(default_factory=dict, repr=False, compare=False)
    draws: Mapping[str, Floats] = field(default_factory=dict, repr=False, compare=False)

    @property
    def probabilities(self) -> dict[str, Floats]:
        """P(failure) of the methods that state one."""
        return _failure(self.confidences)


@dataclass(frozen=True)
class Evaluation:
    """results: one a case, captions at the headline K. sweeps: by case name, the results over K. mean: over the
    results, None for one. curves: by case name, where learning curves were asked for."""

    results: tuple[Result, ...]
    methods: tuple[str, ...]
    sweeps: Mapping[str, tuple[Result, ...]]
    mean: Result | None
    resamples: int
    level: float
    seed: int
    curves: Mapping[str, LearningCurve] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


def correct(test: EmbeddedSet, candidates: int | None = None) -> Bools:
    """Whether CLIP's answer is right.

    Args:
        test: closed set: argmax_j v · t_j is the label. Captions: consecutive groups of `candidates` images with
            their captions; no caption of the group is nearer than the image's own, a tie counting as right.
        candidates: K, captions only; the images after the last full group are left out.

    Returns:
        (N,), or (N // K · K,) for captions.

    Raises:
        UserError: captions without a K of 2 .. N.
    """
    parts = []
    for image, text, labels in _groups(test, candidates):
        for i in range(0, len(image), BLOCK):
            similarity = image.normalised[i : i + BLOCK].float() @ text.normalised.float().T
            if labels is None:
                own = similarity.gather(1, torch.arange(i, i + len(similarity), device=similarity.device)[:, None])
                parts.append(own.squeeze(1) >= similarity.amax(dim=1))
            else:
                parts.append(similarity.argmax(dim=1) == labels[i : i + BLOCK].to(similarity.device))
    return torch.cat(parts).cpu().numpy()


def confidences(scores: Mapping[str, Score], test: EmbeddedSet, candidates: int | None = None) -> dict[str, Floats]:
    """Each score's confidence, float64, for the images and the candidates of `correct`.

    Raises:
        UserError: as `correct`, or what a score raises.
    """
    return {
        name: np.concatenate(
            [
                score.confidence(image, text, test.logit_scale).double().cpu().numpy()
                for image, text, _ in _groups(test, candidates)
            ]
        )
        for name, score in scores.items()
    }


def evaluate(
    cases: Sequence[Case],
    methods: Sequence[str] = tuple(SCORES),
    *,
    candidates: Sequence[int] = CANDIDATES,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    factories: Mapping[str, Callable[..., Score]] = SCORES,
    progress: Progress | None = None,
) -> Evaluation:
    """Every method on every case; p-values of ViLU against each of the others.

    The same seed is used for every case, so that cases over the same images share their draws.

    Args:
        cases: at least one. A train set that several share is fitted on once.
        methods: names in `factories`, in the order of the rows.
        candidates: captions: the sizes K of a group; those above the number of images are left out, and where
            none is left all images are one group.
        resamples, level, seed: of the bootstrap.
        factories: by name, how a score is built: without arguments, "ViLU" from the head.
        progress: called with (what, done, total).

    Raises:
        UserError: no case or method, an unknown method, a test set of one class, or embeddings of other widths.
    """
    methods = tuple(dict.fromkeys(methods))
    if not cases or not methods:
        raise UserError(f"nothing to evaluate: {len(cases)} data sets, {len(methods)} methods")
    unknown = [name for name in methods if name not in factories]
    if unknown:
        raise UserError(f"unknown method {unknown[0]!r}; known: {', '.join(factories)}")
    if not 0 < level < 1:
        raise UserError(f"level must be in (0, 1), got {level}")
    if min(candidates, default=1) < 2:
        raise UserError(f"candidates must be at least 2 each, got {', '.join(map(str, candidates)) or 'none'}")
    for case in cases:
        _check(case)
    say: Progress = progress or (lambda what, done, total: None)
    fitted: dict[tuple[str, int], Score | str] = {}
    results, sweeps = [], {}
    for case, name in zip(cases, unique_names(cases), strict=True):
        scores: dict[str, Score | str] = {}
        for i, method in enumerate(methods):
            say(f"{name}: fitting {method}", i, len(methods))
            scores[method] = _score(method, case, factories, fitted)
        sizes = group_sizes(case.test, candidates)
        swept = tuple(_result(name, case, scores, k, resamples, level, seed, say) for k in sizes)
        results.append(swept[sizes.index(headline(sizes))])
        if case.test.captions:
            sweeps[name] = swept
    mean = _mean(results, methods, level) if len(results) > 1 else None
    return Evaluation(tuple(results), methods, sweeps, mean, resamples, level, seed)


def group_sizes(test: EmbeddedSet, candidates: Sequence[int] = CANDIDATES) -> list[int | None]:
    """The K that the captions of a set allow; [None] for a closed set."""
    if not test.captions:
        return [None]
    return [*sorted({k for k in candidates if k <= len(test)})] or [len(test)]


def headline(sizes: Sequence[int | None]) -> int | None:
    """The K whose results stand in the table: the nearest, by ratio, to the published one."""
    return min(sizes, key=lambda k: abs(math.log((k or 1) / PUBLISHED_CANDIDATES)))


def unique_names(cases: Sequence[Case]) -> list[str]:
    """The test sets' names, a repeated one numbered."""
    names: list[str] = []
    for case in cases:
        name, count = case.test.name, 1
        while name in names:
            count += 1
            name = f"{case.test.name} ({count})"
        names.append(name)
    return names


def _check(case: Case) -> None:
    test, width = case.test, case.test.image.normalised.shape[1]
    if len(test.text) < 2:
        raise UserError(f"{test.name}: one class only: no answer can be wrong, so there is nothing to evaluate")
    if case.head is not None and case.head.dim != width:
        raise UserError(f"{test.name}: embeddings are {width} wide, the checkpoint's head reads {case.head.dim}")
    if case.train is not None and case.train.image.normalised.shape[1] != width:
        raise UserError(
            f"{test.name}: embeddings are {width} wide, those to fit on ({case.train.name}) "
            f"{case.train.image.normalised.shape[1]}"
        )


def _groups(test: EmbeddedSet, candidates: int | None) -> Iterator[tuple[Embeddings, Embeddings, Tensor | None]]:
    """(images, candidate texts, labels or None) of the closed set, or of each full group of captions."""
    if test.labels is not None:
        yield test.image, test.text, test.labels
        return
    if candidates is None or not 2 <= candidates <= len(test):
        raise UserError(f"{test.name}: captions are ranked in groups of 2 to {len(test)}, got {candidates}")
    for i in range(0, len(test) - candidates + 1, candidates):
        rows = slice(i, i + candidates)
        yield test.image[rows], test.text[rows], None


def _failure(found: Mapping[str, Floats]) -> dict[str, Floats]:
    # A softmax in float32 may sum to a little over 1.
    return {name: np.clip(1 - found[name], 0, 1) for name in found if name in PROBABILITIES}


def _score(
    method: str,
    case: Case,
    factories: Mapping[str, Callable[..., Score]],
    fitted: dict[tuple[str, int], Score | str],
) -> Score | str:
    """A score ready to use, or why there is none."""
    if method == OURS:
        return factories[method](case.head) if case.head is not None else "no checkpoint was given"
    train = case.train
    if method in CLASS_BOUND and train is not None and train.class_names != case.test.class_names:
        return f"{method} belongs to the classes it was fitted on, and {train.name} has others"
    key = (method, id(train))
    if key not in fitted:
        try:
            score = factories[method]()
            if score.needs_fit and train is None:
                fitted[key] = "needs training data to be fitted on"
            else:
                if score.needs_fit and train is not None:
                    score.fit(train.image, train.labels, train.text, train.logit_scale)
                fitted[key] = score
        except (ValueError, torch.linalg.LinAlgError) as error:  # UserError is a ValueError
            fitted[key] = one_line(error)
    return fitted[key]


def _result(
    name: str,
    case: Case,
    scores: Mapping[str, Score | str],
    candidates: int | None,
    resamples: int,
    level: float,
    seed: int,
    say: Progress,
) -> Result:
    test = case.test
    right = correct(test, candidates)
    found: dict[str, Floats] = {}
    reasons: dict[str, str] = {}
    at = f"{name}, K = {candidates}" if candidates else name
    for i, (method, score) in enumerate(scores.items()):
        say(f"{at}: {method}", i, len(scores))
        try:
            if isinstance(score, str):
                raise UserError(score)
            confidence = confidences({method: score}, test, candidates)[method]
            if not np.isfinite(confidence).all():
                raise UserError(f"{method} is not finite on image {int(np.flatnonzero(~np.isfinite(confidence))[0])}")
            found[method] = confidence
        except (ValueError, torch.linalg.LinAlgError) as error:
            reasons[method] = one_line(error)
    failure = _failure(found)
    whole = {method: values(confidence, failure.get(method), right) for method, confidence in found.items()}
    drawn = draws(
        found,
        failure,
        right,
        resamples=resamples,
        seed=seed,
        progress=lambda done, total: say(f"{at}: bootstrap", done, total),
    )
    note = ""
    if one_sided(right):
        side = "right" if right.all() else "wrong"
        titles = ", ".join(column.title for column in COLUMNS if column.two_sided)
        note = f"all {len(right)} answers are {side}: {titles} are not defined"
    return Result(
        name=name,
        trained_on=case.train.name if case.train is not None else "",
        captions=test.captions,
        candidates=candidates or len(test.text),
        samples=len(right),
        dropped=len(test) - len(right),
        failures=int((~right).sum()),
        accuracy=float(right.mean()),
        rows=_rows(scores, whole, drawn, reasons, level),
        note=note,
        correct=right,
        confidences=found,
        draws=drawn,
    )


def _rows(
    methods: Sequence[str] | Mapping[str, object],
    whole: Mapping[str, Floats],
    drawn: Mapping[str, Floats],
    reasons: Mapping[str, str],
    level: float,
) -> tuple[Row, ...]:
    rows = []
    for method in methods:
        if method not in whole:
            rows.append(Row(method, reasons[method]))
            continue
        cells, against = {}, {}
        for column in COLUMNS:
            i = INDEX[column.key]
            cell = interval(whole[method][i], drawn[method][:, i], level)
            if cell is not None:
                cells[column.key] = cell
            if column.key in COMPARED and method != OURS and OURS in whole:
                pair = comparison(whole[OURS][i] - whole[method][i], drawn[OURS][:, i] - drawn[method][:, i], level)
                if pair is not None:
                    against[column.key] = pair
        rows.append(Row(method, "", cells, against))
    return tuple(rows)


def _mean(results: Sequence[Result], methods: Sequence[str], level: float) -> Result:
    """The mean over data sets; a draw of it is the mean of one draw from each."""
    whole, drawn, reasons = {}, {}, {}
    for method in methods:
        absent = [result.name for result in results if method not in result.draws]
        if absent:
            reasons[method] = f"not computed on {', '.join(absent)}"
            continue
        rows = [next(row for row in result.rows if row.method == method) for result in results]
        whole[method] = np.array(
            [np.mean([row.cells[c.key].value if c.key in row.cells else math.nan for row in rows]) for c in COLUMNS]
        )
        drawn[method] = np.mean([result.draws[method] for result in results], axis=0)
    return Result(
        name=f"mean of {len(results)} data sets",
        trained_on="",
        captions=False,
        candidates=0,
        samples=sum(result.samples for result in results),
        dropped=sum(result.dropped for result in results),
        failures=sum(result.failures for result in results),
        accuracy=float(np.mean([result.accuracy for result in results])),
        rows=_rows(methods, whole, drawn, reasons, level),
        note="; ".join(f"{result.name}: {result.note}" for result in results if result.note),
        draws=drawn,
    )


def one_line(error: Exception) -> str:
    """An exception's text as one line."""
    return " ".join(str(error).split()) or type(error).__name__
