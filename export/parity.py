"""How far answers are from the eager model's: the figures of parity.json, and what is over a precision's budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vilu.evaluation import metrics
from vilu.export.precision import BUDGETS, HEAD_BUDGET, MAX_BATCH_EFFECT, Budget

NOT_FINITE = "holds a value that is not finite"  # no budget allows that
Arrays = Mapping[str, np.ndarray]


class Session(Protocol):
    """What `open_session` gives."""

    outputs: list[str]

    def run(self, names: Sequence[str], feed: Arrays) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Reference:
    """A graph's inputs and what the eager model answers.

    Attributes:
        input_name: the graph's input.
        feed: (N, ...) inputs.
        outputs: name -> (N, ...) eager outputs.
        predict: embeddings (N, D) -> class indices (N,), for graphs that give no CLASS_INDEX of their own.
    """

    input_name: str
    feed: np.ndarray
    outputs: Arrays
    predict: Callable[[np.ndarray], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.feed)

    def first(self, count: int) -> Reference:
        """The same, of the first `count` inputs."""
        outputs = {name: value[:count] for name, value in self.outputs.items()}
        return Reference(self.input_name, self.feed[:count], outputs, self.predict)


@dataclass(frozen=True)
class Answers:
    """Answers for N images.

    Attributes:
        embedding: (N, D).
        class_index: (N,) integers.
        failure_probability: (N,), from 0 to 1.
        outlier_score: (N,), from 0 to 2; None without such a score.
    """

    embedding: np.ndarray
    class_index: np.ndarray
    failure_probability: np.ndarray
    outlier_score: np.ndarray | None = None

    def first(self, count: int) -> Answers:
        """The same, of the first `count` images."""
        return self._part(slice(count))

    def last(self, count: int) -> Answers:
        """The same, of the last `count` images; at least one."""
        return self._part(slice(-count, None))

    def _part(self, rows: slice) -> Answers:
        outlier = None if self.outlier_score is None else self.outlier_score[rows]
        return Answers(self.embedding[rows], self.class_index[rows], self.failure_probability[rows], outlier)


def run_batches(session: Session, input_name: str, feed: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Run a graph over the whole feed (N, ...), `batch` rows at a time: output name -> (N, ...)."""
    starts = range(0, len(feed), batch)
    parts = [session.run(session.outputs, {input_name: feed[i : i + batch]}) for i in starts]
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(session.outputs)}


def run_folded_head(
    head: torch.nn.Module, labels: Sequence[str], feed: np.ndarray, batch: int
) -> dict[str, np.ndarray]:
    """Run the folded module that a fused kernel is compiled from, as `run_batches` runs a graph."""
    with torch.no_grad():
        parts = [head(chunk) for chunk in torch.from_numpy(feed).split(batch)]
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    outputs = dict(zip(("CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT"), columns, strict=True))
    return outputs | {"LABEL": np.array(labels, dtype=object)[outputs["CLASS_INDEX"]]}


def compare_outputs(outputs: Arrays, reference: Reference) -> dict[str, Any]:
    """Errors of a graph's outputs, for parity.json; a value that is not finite counts as an infinite error."""
    largest, mean, agreement = {}, {}, []
    row: dict[str, Any] = {"inputs": len(reference)}
    for name, expected in reference.outputs.items():
        actual = outputs[name]
        if expected.dtype.kind == "f":
            error = np.abs(actual.astype(np.float64) - expected)
            finite = bool(np.isfinite(error).all())
            largest[name] = float(error.max()) if finite else float("inf")
            mean[name] = float(error.mean()) if finite else float("inf")
        else:
            agreement.append((actual == expected).reshape(len(expected), -1).all(axis=1))
        if reference.predict is not None:
            agreement.append(reference.predict(actual) == reference.predict(expected))
            row["cosine"] = cosines(actual, expected)
    row |= {"max_abs_error": largest, "mean_abs_error": mean}
    row["argmax_agreement"] = float(np.mean(np.logical_and.reduce(agreement)))
    return row


def cosines(actual: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Mean and least cosine between rows (N, D) of the two; 0 for a row that is not finite or all zeros."""
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(actual.astype(np.float64), axis=1) * np.linalg.norm(expected.astype(np.float64), axis=1)
        cosine = np.sum(actual * expected, axis=1, dtype=np.float64) / norms
    cosine = np.where(np.isfinite(cosine), cosine, 0.0)
    return {"mean": float(cosine.mean()), "min": float(cosine.min())}


def compare_answers(answers: Answers, reference: Answers, labels: np.ndarray | None) -> dict[str, Any]:
    """What a precision changes for the user: embeddings, classes, P(failure), and AUC and FPR95 where labels are known.

    Args:
        labels: (N,) class indices, -1 where unknown.
    """
    error = np.abs(answers.failure_probability.astype(np.float64) - reference.failure_probability)
    error = np.where(np.isfinite(error), error, np.inf)
    row: dict[str, Any] = {
        "images": len(error),
        "cosine": cosines(answers.embedding, reference.embedding),
        "argmax_agreement": float(np.mean(answers.class_index == reference.class_index)),
        "failure_probability_error": {"max": float(error.max()), "mean": float(error.mean())},
        "ranking": None,
    }
    if answers.outlier_score is not None and reference.outlier_score is not None:
        moved = np.abs(answers.outlier_score.astype(np.float64) - reference.outlier_score)
        moved = np.where(np.isfinite(moved), moved, np.inf)
        row["outlier_score_error"] = {"max": float(moved.max()), "mean": float(moved.mean())}
    known = np.zeros(len(error), bool) if labels is None else labels >= 0
    if labels is None or not known.any():
        return row
    try:
        before, after = (_ranking(a, labels, known) for a in (reference, answers))
    except metrics.OneSidedError as reason:
        return row | {"ranking": str(reason)}
    change = {name: after[name] - before[name] for name in before}
    ranking = {"images": int(known.sum()), "eager": before, "exported": after, "change": change}
    return row | {"ranking": ranking}


def _ranking(answers: Answers, labels: np.ndarray, known: np.ndarray) -> dict[str, float]:
    confidence, correct = 1 - answers.failure_probability[known], answers.class_index[known] == labels[known]
    return {"AUC": metrics.auroc(confidence, correct), "FPR95": metrics.fpr_at_tpr(confidence, correct)}


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The batch sizes to compare: every size to 8, then half and the largest two, where a kernel's tiles differ."""
    ends = {max_batch_size // 2, max_batch_size - 1, max_batch_size}
    return tuple(sorted({size for size in {*range(1, 9), *ends} if 1 <= size <= max_batch_size}))


def batch_effect(
    answer: Callable[[np.ndarray, int], Answers],
    feed: np.ndarray,
    base: Answers,
    sizes: Sequence[int],
    tick: Callable[[], None],
) -> dict[str, Any]:
    """How much an image's answer depends on the size of the batch that it is computed in.

    Args:
        answer: pixels (N, S, S, 3) and N -> their answers, computed in one batch.
        feed: the pixels.
        base: answers for the first images of the feed, computed in one batch.
        sizes: the batch sizes to compare with `base`.
        tick: called after each size.
    """
    moved, changed = 0.0, 0
    for size in sizes:
        answers = answer(feed[:size], size)
        error = np.abs(answers.failure_probability.astype(np.float64) - base.failure_probability[:size])
        moved = max(moved, float(np.where(np.isfinite(error), error, np.inf).max()))
        changed += int((answers.class_index != base.class_index[:size]).sum())
        tick()
    return {
        "sizes": list(sizes),
        "failure_probability_moves": moved,
        "argmax_changes": changed,
        "independent": changed == 0 and moved <= MAX_BATCH_EFFECT,
    }


def over_budget(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for everything in a report that is over its precision's budget."""
    precision = report["precision"]
    for graph, providers in report["graphs"].items():
        budget = BUDGETS[precision] if graph in ("clip_image", "clip_text") else HEAD_BUDGET
        for provider, by_batch in providers.items():
            for batch, row in by_batch.items():
                yield from _excesses(f"{graph} ({provider}, batch {batch})", row, budget)
    for provider, row in report["answers"].items():
        budget = BUDGETS[precision]
        yield from _excesses(f"answers ({provider})", row, budget)
        error = row["failure_probability_error"]["max"]
        if budget.error is not None and not error <= budget.error:
            yield f"answers ({provider}): P(failure) differs by {error:.2e}, the limit is {budget.error:.0e}"
        ranking = row["ranking"]
        if (
            budget.auc_loss is not None
            and isinstance(ranking, dict)
            and not -ranking["change"]["AUC"] <= budget.auc_loss
        ):
            lost = -100 * ranking["change"]["AUC"]
            where = f"answers ({provider}, {ranking['images']} labelled images)"
            yield f"{where}: AUC falls by {lost:.2f} points, the limit is {100 * budget.auc_loss:.1f}"


def _excesses(where: str, row: Mapping[str, Any], budget: Budget) -> Iterator[str]:
    for name, error in row.get("max_abs_error", {}).items():
        if not np.isfinite(error):
            yield f"{where}: {name} {NOT_FINITE}"
        elif budget.error is not None and not error <= budget.error:
            yield f"{where}: {name} differs by {error:.2e}, the limit is {budget.error:.0e}"
    if budget.cosine is not None and "cosine" in row and not row["cosine"]["mean"] >= budget.cosine:
        yield f"{where}: mean cosine {row['cosine']['mean']:.5f}, the limit is {budget.cosine}"
    if not row["argmax_agreement"] >= budget.agreement:
        lost = 1 - row["argmax_agreement"]
        yield f"{where}: {lost:.2%} of the answers differ, the limit is {1 - budget.agreement:.1%}"
