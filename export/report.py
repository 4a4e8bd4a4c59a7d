"""The parity report: parity.json for programs, parity.md and parity.png for people."""

from __future__ import annotations

import hashlib
import io
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from vilu import __version__
from vilu.checkpoint import Checkpoint
from vilu.export.job import Job
from vilu.export.measure import Measured
from vilu.export.parity import Answers
from vilu.export.precision import BUDGETS, HEAD_BUDGET, MAX_BATCH_EFFECT, needs
from vilu.outlier import about_outlier
from vilu.serving.backends.onnxruntime import session


def write(root: Path, report: Mapping[str, Any], measured: Measured) -> None:
    """Write parity.json, parity.md and parity.png into a repository."""
    (root / "parity.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
    (root / "parity.md").write_text(markdown(report), "utf-8")
    (root / "parity.png").write_bytes(picture(measured.answers, measured.eager, report["precision"]))


def build(job: Job, figures: dict[str, Any]) -> dict[str, Any]:
    """What parity.json holds, the list "over_budget" still empty."""
    runtime = job.runtime
    notes = []
    if runtime.device == "gpu":
        notes.append(
            "These figures were measured without a GPU. ONNX Runtime's CPU provider rounds float16 as a GPU does, but "
            "sums in float32; the fused head was measured in the folded form that it is compiled from."
        )
    if runtime.provider == "openvino":
        notes.append(
            "vilu_full holds strings, which OpenVINO cannot run, so all of it runs on ONNX Runtime's CPU provider."
        )
    lacking = needs(runtime.precision, session.cpu_flags()) if runtime.device == "cpu" else ""
    if runtime.precision == "int8" and lacking:
        notes.append(
            f"int8 is not faster here: this processor lacks {lacking}. float32 answers better at least as fast."
        )
    return about(job.checkpoint, runtime.precision) | {
        "device": runtime.device,
        "provider": runtime.provider,
        "preprocess": job.preprocess,
        "clip": vars(job.clip.spec),
        "images": {"measured": len(job.sample.pixels), "calibrated": len(job.sample.calibration)},
        **figures,
        "notes": notes,
        "versions": libraries(),
    }


def about(checkpoint: Checkpoint, precision: str) -> dict[str, Any]:
    """What parity.json says of a checkpoint and a precision, the list "over_budget" still empty."""
    return {
        "tolerance": HEAD_BUDGET.error,
        "precision": precision,
        "budget": BUDGETS[precision].as_dict(),
        "over_budget": [],
        "threshold": checkpoint.threshold,
        "calibration": checkpoint.meta.get("calibration"),
        "head": digest(checkpoint),
        **({} if checkpoint.outlier is None else {"outlier": about_outlier(checkpoint.outlier)}),
    }


def libraries() -> dict[str, str]:
    """The versions of what wrote a repository."""
    return {
        "vilu": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256, in hexadecimal, of the head, class set, threshold and outlier score that a repository serves."""
    digest = hashlib.sha256(repr((checkpoint.head.config(), checkpoint.threshold)).encode())
    for tensor in checkpoint.head.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    if checkpoint.class_set is not None:
        digest.update(repr((checkpoint.class_set.names, checkpoint.class_set.templates)).encode())
        digest.update(checkpoint.class_set.text_embeddings.contiguous().numpy().tobytes())
    if checkpoint.outlier is not None:
        score = checkpoint.outlier
        digest.update(repr(score.threshold).encode())
        for tensor in (score.mean, score.factor, score.prototypes):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def markdown(report: Mapping[str, Any]) -> str:
    """The text of parity.md: the report for people."""
    budget = ", ".join(f"{name} {value:g}" for name, value in report["budget"].items())
    over = report["over_budget"]
    verdict = "Every figure is within the budget."
    if over:
        verdict = "These figures are over the budget; the export was kept by --allow-loss:\n\n" + _bullets(over)
    lines = [
        f"# Parity of this repository: {report['precision']}, {report['device']}, {report['provider']}",
        f"The exported graphs are compared with the eager float32 model. The budget is: {budget}. {verdict}",
        "## Answers of the tower and the head, run as the server runs them",
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
        *(_ranking_line(provider, row["ranking"]) for provider, row in report["answers"].items()),
        *(
            _outlier_line(provider, row["outlier_score_error"])
            for provider, row in report["answers"].items()
            if "outlier_score_error" in row
        ),
        "![distribution of the errors](parity.png)",
        "## Does an answer depend on the batch size?",
        *(_batch_line(provider, row) for provider, row in report["batches"].items()),
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
        *_tried(report.get("tried", ())),
        *report["notes"],
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _tried(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    table = []
    for row in rows:
        speed = row["images_per_second"]
        table.append((row["precision"], row["provider"], f"{speed:.1f}" if speed else "", row["verdict"]))
    return [
        "## Why this precision",
        "The image tower was timed on the machine that exported it, in every way that exists there.",
        _table(("precision", "provider", "images a second", "verdict"), table),
    ]


def _ranking_line(provider: str, ranking: dict[str, Any] | str | None) -> str:
    if not isinstance(ranking, dict):
        return f"AUC and FPR95 ({provider}): {ranking or 'no labels were given'}."
    changes = ", ".join(
        f"{name} {100 * ranking['eager'][name]:.2f} → {100 * ranking['exported'][name]:.2f} ({100 * change:+.2f})"
        for name, change in ranking["change"].items()
    )
    return f"On the {ranking['images']} labelled images ({provider}): {changes}."


def _outlier_line(provider: str, error: Mapping[str, float]) -> str:
    return f"The outlier score ({provider}) differs by {error['max']:.1e} at most, {error['mean']:.1e} on average."


def _batch_line(provider: str, row: Mapping[str, Any]) -> str:
    sizes = ", ".join(map(str, row["sizes"]))
    effect = (
        f"P(failure) changes by at most {row['failure_probability_moves']:.1e}, "
        f"and the class changes {row['argmax_changes']} times"
    )
    verdict = "This counts as none" if row["independent"] else "This is **over** what counts as none"
    limit = f"at most {MAX_BATCH_EFFECT:.0e}, and the same class"
    return f"With {provider}, in batches of {sizes}, {effect}. {verdict} ({limit})."


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    table = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)


def picture(answers: Mapping[str, Answers], reference: Answers, precision: str) -> bytes:
    """The PNG of parity.png: the distribution of P(failure)'s errors and of embeddings' cosines, by provider."""
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
