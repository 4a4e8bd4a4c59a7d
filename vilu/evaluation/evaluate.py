"""All scores side by side on one or several data sets, with bootstrap intervals and paired tests.

    evaluation = evaluate([Case(test, train, head)])
    evaluation.results[0].rows                              # one row a method
    report.tables.write(evaluation, Path("evaluation"))     # HTML, JSON, CSV and figures

A method that cannot be computed becomes a row with the reason; no number in a result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings import BLOCK, EmbeddedSet, Embeddings
from vilu.errors import UserError
from vilu.evaluation.bootstrap import comparison, interval, metric_values, resampled_metrics
from vilu.evaluation.chance import accuracy
from vilu.evaluation.columns import COLUMNS, INDEX
from vilu.evaluation.metrics import Bools, Floats, one_sided
from vilu.evaluation.results import (
    COMPARED,
    OURS,
    Case,
    Evaluation,
    Result,
    Row,
    failure_probabilities,
    too_few,
)
from vilu.scores import SCORES, Score

CANDIDATES = (128, 256, 512, 1024, 2048, 4096, 8192)
PUBLISHED_CANDIDATES = 1024  # of the published caption tables: the K nearest to it is the headline
CLASS_BOUND = ("Rel-U", "TrustVLM", "class bias")  # what they learn belongs to the classes they were fitted on
Progress = Callable[[str, int, int], None]


def correct(test: EmbeddedSet, candidates: int | None = None) -> Bools:
    """Whether CLIP's zero-shot answer is right, for each image.

    In a closed set the answer is right where argmax_j v · t_j is the label. Captions are ranked in consecutive groups
    of `candidates` images with their captions: the answer is right where no caption of the group is nearer than the
    image's own, so a tie counts as right.

    Args:
        test: N images.
        candidates: number K of captions in a group, captions only; images after the last full group are left out.

    Returns:
        (N,) bool, or (N // K · K,) for captions.

    Raises:
        UserError: captions without a K in 2 .. N.

    Source: ViLU (arXiv 2507.07620), section 4, for both protocols.
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
    """The confidence of each score, for the images and the candidates of `correct`.

    Args:
        scores: by name, scores that are ready to use.
        test: N images.
        candidates: number K of captions in a group, captions only.

    Returns:
        by name, (N,) float64, or (N // K · K,) for captions.

    Raises:
        UserError: captions without a K in 2 .. N, or embeddings that a score refuses.
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
    """Evaluate every method on every case, with p-values of ViLU against each other method.

    All cases use the same seed, so cases over the same images share their bootstrap resamples.

    Args:
        cases: at least one. The baselines are fitted once on training data that several cases share.
        methods: names in `factories`, in the order of the rows.
        candidates: captions only: the group sizes K to evaluate. Sizes above the number of images are left out; where
            none is left, all images are one group.
        resamples: number of bootstrap resamples.
        level: level of the intervals, in (0, 1).
        seed: seed of the bootstrap.
        factories: by method name, how its score is built: "ViLU" from the head, the others without arguments.
        progress: called with (what is done now, steps done, steps in all).

    Raises:
        UserError: no case or method, an unknown method, a test set of one class, or embeddings of different widths.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> def unit(*shape):
        ...     return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=1)
        >>> labels = torch.arange(200) % 4
        >>> test = EmbeddedSet("random images", Embeddings(unit(200, 8)), Embeddings(unit(4, 8)), labels)
        >>> evaluation = evaluate([Case(test)], ["MCM", "Entropy"], resamples=20)
        >>> [row.method for row in evaluation.results[0].rows]
        ['MCM', 'Entropy']
        >>> auc = evaluation.results[0].rows[0].cells["auc"]
        >>> auc.low <= auc.value <= auc.high
        True
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
    report_progress: Progress = progress or (lambda what, done, total: None)
    fitted: dict[tuple[str, int], Score | str] = {}
    results, sweeps = [], {}
    for case, name in zip(cases, unique_names(cases), strict=True):
        scores: dict[str, Score | str] = {}
        for i, method in enumerate(methods):
            report_progress(f"{name}: fitting {method}", i, len(methods))
            scores[method] = _score(method, case, factories, fitted)
        sizes = group_sizes(case.test, candidates)
        swept = tuple(_result(name, case, scores, k, resamples, level, seed, report_progress) for k in sizes)
        results.append(swept[sizes.index(headline(sizes))])
        if case.test.captions:
            sweeps[name] = swept
    mean = _mean(results, methods, level) if len(results) > 1 else None
    return Evaluation(tuple(results), methods, sweeps, mean, resamples, level, seed)


def group_sizes(test: EmbeddedSet, candidates: Sequence[int] = CANDIDATES) -> list[int | None]:
    """The group sizes K that a set of captions allows; [None] for a closed set."""
    if not test.captions:
        return [None]
    return [*sorted({k for k in candidates if k <= len(test)})] or [len(test)]


def headline(sizes: Sequence[int | None]) -> int | None:
    """The K whose results the table shows: the one nearest by ratio to the published K."""
    return min(sizes, key=lambda k: abs(math.log((k or 1) / PUBLISHED_CANDIDATES)))


def unique_names(cases: Sequence[Case]) -> list[str]:
    """The names of the test sets; a name that repeats gets a number."""
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


def _score(
    method: str,
    case: Case,
    factories: Mapping[str, Callable[..., Score]],
    fitted: dict[tuple[str, int], Score | str],
) -> Score | str:
    """A score that is ready to use, or the reason why there is none. `fitted` keeps what several cases share."""
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
    report_progress: Progress,
) -> Result:
    test = case.test
    right = correct(test, candidates)
    found: dict[str, Floats] = {}
    reasons: dict[str, str] = {}
    at = f"{name}, K = {candidates}" if candidates else name
    for i, (method, score) in enumerate(scores.items()):
        report_progress(f"{at}: {method}", i, len(scores))
        try:
            if isinstance(score, str):
                raise UserError(score)
            confidence = confidences({method: score}, test, candidates)[method]
            if not np.isfinite(confidence).all():
                raise UserError(f"{method} is not finite on image {int(np.flatnonzero(~np.isfinite(confidence))[0])}")
            found[method] = confidence
        except (ValueError, torch.linalg.LinAlgError) as error:
            reasons[method] = one_line(error)
    failure = failure_probabilities(found)
    whole = {method: metric_values(confidence, failure.get(method), right) for method, confidence in found.items()}
    resampled = resampled_metrics(
        found,
        failure,
        right,
        resamples=resamples,
        seed=seed,
        progress=lambda done, total: report_progress(f"{at}: bootstrap", done, total),
    )
    clip = accuracy(right, None if test.labels is None else test.labels.numpy(), candidates or len(test.text))
    few = too_few(len(right) - clip.right, len(right))
    notes = []
    if one_sided(right):
        side = "right" if right.all() else "wrong"
        titles = ", ".join(column.title for column in COLUMNS if column.two_sided)
        notes.append(f"all {len(right)} answers are {side}: {titles} are not defined")
    elif few:
        notes.append(f"{few}: too few to say which method is better")
    if "at chance" in clip.warning and not one_sided(right):
        notes.append(clip.warning)
    if case.known:
        notes.append(f"the head or a baseline was trained on {case.known} of these images, so no method is compared")
    return Result(
        name=name,
        trained_on=case.train.name if case.train is not None else "",
        captions=test.captions,
        candidates=candidates or len(test.text),
        samples=len(right),
        dropped=len(test) - len(right),
        failures=len(right) - clip.right,
        accuracy=clip.share,
        rows=_rows(scores, whole, resampled, reasons, level, compare=not few and not case.known),
        note="; ".join(notes),
        known=case.known,
        correct=right,
        confidences=found,
        draws=resampled,
        chance=clip.chance,
        chance_rule=clip.rule,
    )


def _rows(
    methods: Sequence[str] | Mapping[str, object],
    whole: Mapping[str, Floats],
    resampled: Mapping[str, Floats],
    reasons: Mapping[str, str],
    level: float,
    *,
    compare: bool,
) -> tuple[Row, ...]:
    rows = []
    for method in methods:
        if method not in whole:
            rows.append(Row(method, reasons[method]))
            continue
        cells, against = {}, {}
        for column in COLUMNS:
            i = INDEX[column.key]
            cell = interval(whole[method][i], resampled[method][:, i], level)
            if cell is not None:
                cells[column.key] = cell
            if compare and column.key in COMPARED and method != OURS and OURS in whole:
                pair = comparison(
                    whole[OURS][i] - whole[method][i], resampled[OURS][:, i] - resampled[method][:, i], level
                )
                if pair is not None:
                    against[column.key] = pair
        rows.append(Row(method, "", cells, against))
    return tuple(rows)


def _mean(results: Sequence[Result], methods: Sequence[str], level: float) -> Result:
    """The mean over data sets; a resample of the mean is the mean of one resample from each."""
    whole, resampled, reasons = {}, {}, {}
    for method in methods:
        absent = [result.name for result in results if method not in result.draws]
        if absent:
            reasons[method] = f"not computed on {', '.join(absent)}"
            continue
        rows = [next(row for row in result.rows if row.method == method) for result in results]
        whole[method] = np.array(
            [np.mean([row.cells[c.key].value if c.key in row.cells else math.nan for row in rows]) for c in COLUMNS]
        )
        resampled[method] = np.mean([result.draws[method] for result in results], axis=0)
    compare = not any(result.known or too_few(result.failures, result.samples) for result in results)
    return Result(
        name=f"mean of {len(results)} data sets",
        trained_on="",
        captions=False,
        candidates=0,
        samples=sum(result.samples for result in results),
        dropped=sum(result.dropped for result in results),
        failures=sum(result.failures for result in results),
        accuracy=float(np.mean([result.accuracy for result in results])),
        rows=_rows(methods, whole, resampled, reasons, level, compare=compare),
        note="; ".join(f"{result.name}: {result.note}" for result in results if result.note),
        draws=resampled,
        known=sum(result.known for result in results),
    )


def one_line(error: Exception) -> str:
    """The text of an exception as one line."""
    return " ".join(str(error).split()) or type(error).__name__
