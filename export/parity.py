"""How far the written graphs are from the eager model, measured with the code that serves them, and who may pass."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vilu.evaluation import metrics
from vilu.export.precision import BATCH_MOVE, BUDGETS, HEAD, Budget

NOT_FINITE = "holds a value that is not finite"  # no budget allows that
Arrays = Mapping[str, np.ndarray]


class Session(Protocol):
    """What `open_session` gives."""

    provider: str
    outputs: list[str]

    def run(self, names: Sequence[str], feed: Arrays) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Reference:
    """A graph's inputs and what the eager model answers.

    feed: (N, ...) inputs; outputs: name -> (N, ...) eager outputs; predict: IMAGE/TEXT embeddings (N, D) to the
    class index, for graphs that give no CLASS_INDEX of their own.
    """

    input_name: str
    feed: np.ndarray
    outputs: Arrays
    predict: Callable[[np.ndarray], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.feed)

    def head(self, count: int) -> Reference:
        """The first `count` inputs alone."""
        outputs = {name: value[:count] for name, value in self.outputs.items()}
        return Reference(self.input_name, self.feed[:count], outputs, self.predict)


@dataclass(frozen=True)
class Answers:
    """What an image is answered: embedding (N, D), class_index (N,), failure_probability (N,)."""

    embedding: np.ndarray
    class_index: np.ndarray
    failure_probability: np.ndarray


def run(session: Session, input_name: str, feed: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """All outputs over the whole feed, `batch` rows at a time."""
    starts = range(0, len(feed), batch)
    parts = [session.run(session.outputs, {input_name: feed[i : i + batch]}) for i in starts]
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(session.outputs)}


def run_head(head: torch.nn.Module, labels: Sequence[str], feed: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """The same of a head that is served by the fused kernel: of the folded module it is compiled from."""
    with torch.no_grad():
        parts = [head(chunk) for chunk in torch.from_numpy(feed).split(batch)]
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    outputs = dict(zip(("CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT"), columns, strict=True))
    return outputs | {"LABEL": np.array(labels, dtype=object)[outputs["CLASS_INDEX"]]}


def compare(outputs: Arrays, reference: Reference) -> dict[str, Any]:
    """Errors of one run; a value that is not finite counts as an infinite error."""
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
    """Mean and least cosine of rows (N, D); 0 for a row that is not finite or has no direction."""
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(actual.astype(np.float64), axis=1) * np.linalg.norm(expected.astype(np.float64), axis=1)
        cosine = np.sum(actual * expected, axis=1, dtype=np.float64) / norms
    cosine = np.where(np.isfinite(cosine), cosine, 0.0)
    return {"mean": float(cosine.mean()), "min": float(cosine.min())}


def cost(answers: Answers, reference: Answers, labels: np.ndarray | None) -> dict[str, Any]:
    """What the user sees of a precision: embeddings, answers, P(failure), and the ranking where labels are known.

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
    known = np.zeros(len(error), bool) if labels is None else labels >= 0
    if labels is None or not known.any():
        return row
    try:
        before, after = (_ranked(a, labels, known) for a in (reference, answers))
    except metrics.OneSidedError as reason:
        return row | {"ranking": str(reason)}
    change = {name: after[name] - before[name] for name in before}
    ranking = {"images": int(known.sum()), "eager": before, "exported": after, "change": change}
    return row | {"ranking": ranking}


def _ranked(answers: Answers, labels: np.ndarray, known: np.ndarray) -> dict[str, float]:
    confidence, correct = 1 - answers.failure_probability[known], answers.class_index[known] == labels[known]
    return {"AUC": metrics.auroc(confidence, correct), "FPR95": metrics.fpr_at_tpr(confidence, correct)}


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The batches an image is sent through: every size to 8, then halves and ends, where a kernel's tiles differ."""
    ends = {max_batch_size // 2, max_batch_size - 1, max_batch_size}
    return tuple(sorted({size for size in {*range(1, 9), *ends} if 1 <= size <= max_batch_size}))


def batch_effect(
    answer: Callable[[np.ndarray, int], Answers],
    feed: np.ndarray,
    base: Answers,
    sizes: Sequence[int],
    tick: Callable[[], None],
) -> dict[str, Any]:
    """How much an image's answer depends on the batch it rode in: against `base`, the first images' in one batch."""
    moved, changed = 0.0, 0
    for size in sizes:
        one = answer(feed[:size], size)
        error = np.abs(one.failure_probability.astype(np.float64) - base.failure_probability[:size])
        moved = max(moved, float(np.where(np.isfinite(error), error, np.inf).max()))
        changed += int((one.class_index != base.class_index[:size]).sum())
        tick()
    return {
        "sizes": list(sizes),
        "failure_probability_moves": moved,
        "argmax_changes": changed,
        "independent": changed == 0 and moved <= BATCH_MOVE,
    }


def failures(report: Mapping[str, Any]) -> Iterator[str]:
    """One line for everything in a report that is over its budget."""
    precision = report["precision"]
    for graph, providers in report["graphs"].items():
        budget = BUDGETS[precision] if graph in ("clip_image", "clip_text") else HEAD
        for provider, by_batch in providers.items():
            for batch, row in by_batch.items():
                yield from _over(f"{graph} ({provider}, batch {batch})", row, budget)
    for provider, row in report["answers"].items():
        budget = BUDGETS[precision]
        yield from _over(f"answers ({provider})", row, budget)
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


def _over(where: str, row: Mapping[str, Any], budget: Budget) -> Iterator[str]:
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


def markdown(report: Mapping[str, Any]) -> str:
    """parity.md: the report for people."""
    budget = ", ".join(f"{name} {value:g}" for name, value in report["budget"].items())
    over = report["over_budget"]
    verdict = "Everything is within it." if not over else "Over it, and kept by --allow-loss:\n\n" + _bullets(over)
    lines = [
        f"# Parity of this repository: {report['precision']}, {report['device']}, {report['provider']}",
        f"Against the eager float32 model. Budget: {budget}. {verdict}",
        "## Answers, through the tower and the head as they are served",
        _table(
            ("provider", "images", "cosine mean", "min", "same class", "P(failure) error max", "mean"),
            [
                (
                    provider,
                    row["images"],
                    f"{row['cosine']['mean']:.6f}",
                    f"{row['cosine']['min']:.6f}",
                    f"{row['argmax_agreement']:.2%}",
                    f"{row['failure_probability_error']['max']:.1e}",
                    f"{row['failure_probability_error']['mean']:.1e}",
                )
                for provider, row in report["answers"].items()
            ],
        ),
        *(_ranking(provider, row["ranking"]) for provider, row in report["answers"].items()),
        "![distribution of the errors](parity.png)",
        "## The batch an image rides in",
        *(_batches(provider, row) for provider, row in report["batches"].items()),
        "## Graphs",
        _table(
            ("graph", "provider", "batch", "inputs", "largest error", "mean cosine", "same argmax"),
            [
                (
                    graph,
                    provider,
                    batch,
                    row["inputs"],
                    ", ".join(f"{name} {error:.1e}" for name, error in row["max_abs_error"].items()),
                    f"{row['cosine']['mean']:.6f}" if "cosine" in row else "",
                    f"{row['argmax_agreement']:.2%}",
                )
                for graph, providers in report["graphs"].items()
                for provider, by_batch in providers.items()
                for batch, row in by_batch.items()
            ],
        ),
        *report["notes"],
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _ranking(provider: str, ranking: dict[str, Any] | str | None) -> str:
    if not isinstance(ranking, dict):
        return f"AUC and FPR95 ({provider}): {ranking or 'no labels were given'}."
    told = ", ".join(
        f"{name} {100 * ranking['eager'][name]:.2f} → {100 * ranking['exported'][name]:.2f} ({100 * change:+.2f})"
        for name, change in ranking["change"].items()
    )
    return f"On the {ranking['images']} labelled images ({provider}): {told}."


def _batches(provider: str, row: Mapping[str, Any]) -> str:
    sizes = ", ".join(map(str, row["sizes"]))
    told = (
        f"moves by at most {row['failure_probability_moves']:.1e} and the class changes {row['argmax_changes']} times"
    )
    within = "within" if row["independent"] else "**over**"
    return f"{provider}, batches of {sizes}: P(failure) {told} ({within} the {BATCH_MOVE:.0e} that counts as none)."


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    table = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)


def picture(answers: Mapping[str, Answers], reference: Answers, precision: str) -> bytes:
    """parity.png: how the errors of P(failure) and the cosines of embeddings are distributed, by provider."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    floor = 1e-9  # equal floats have no logarithm
    for provider, answer in answers.items():
        error = np.abs(answer.failure_probability.astype(np.float64) - reference.failure_probability)
        angle = 1 - np.sum(answer.embedding.astype(np.float64) * reference.embedding, axis=1)
        share = np.arange(1, len(error) + 1) / len(error)
        for axis, values in ((left, error), (right, angle)):
            values = np.nan_to_num(values, nan=1.0, posinf=1.0)
            axis.step(np.sort(np.clip(values, floor, None)), share, where="post", label=provider)
    for axis, what in ((left, "|error of P(failure)|"), (right, "1 − cosine of the embedding")):
        axis.set(xscale="log", xlabel=what, ylabel="share of images", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    if BUDGETS[precision].error is not None:
        left.axvline(BUDGETS[precision].error, color="#d95f0e", linestyle="--", label="budget")
    left.legend(fontsize=8)
    figure.suptitle(f"{precision} against eager float32, {len(reference.class_index)} images", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
