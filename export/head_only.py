"""`export_head`: a model repository for a head whose embeddings another program makes: no CLIP, no images.

It holds the models `vilu_embeddings`, which answers, and `class_sets`. Both are as in a repository with CLIP.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vilu import atomic
from vilu.checkpoint import Checkpoint, load_checkpoint
from vilu.embeddings import EmbeddedSet
from vilu.errors import UserError
from vilu.export import checks, measure, parity, report, repository, versions
from vilu.export.details import write_details
from vilu.export.graphs import write_outlier
from vilu.export.job import Progress, Ticker
from vilu.export.limits import Limits
from vilu.export.open_vocabulary import write_open_vocabulary
from vilu.export.outlier import FILE as OUTLIER
from vilu.export.outlier import OutlierGraph
from vilu.export.parity import Answers, Reference
from vilu.export.sample import MIN_INPUTS
from vilu.head import ViLUHead
from vilu.kernels import fold
from vilu.serving.backends.onnxruntime import session

README = repository.TEMPLATES / "README.head.md"
MODEL = "vilu_embeddings"
FAILURE = "FAILURE_PROBABILITY"


def export_head(
    checkpoint: Checkpoint | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    embeddings: EmbeddedSet | None = None,
    max_batch_size: int = 32,
    version: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model repository for a head alone, whole and within its parity budget, or not at all.

    Args:
        checkpoint: a Checkpoint with its class_set, or a path to one. It need not name a CLIP.
        output: the repository's folder; replaced whole, by renaming, once every graph is within the budget.
        embeddings: embeddings to measure parity on; None: 256 that are drawn around those of the classes.
        max_batch_size: the largest batch the server forms.
        version: keep what the folder holds and add this export beside it, as in `export`. None: replace the folder.
        limits: what the server refuses.
        progress: called with (what, steps done, steps in all).

    Returns:
        What parity.json holds; "clip" is None.

    Raises:
        UserError: the checkpoint holds no class set, the embeddings have another width, the output folder is no model
            repository or cannot be written, the version exists, or a graph is over the parity budget. The old
            repository is then untouched.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    output, limits = Path(output), limits or Limits()
    checks.check_output(output, version)
    checks.check_options("exact", max_batch_size)
    class_set = checkpoint.class_set
    if class_set is None:
        raise UserError("this checkpoint holds no class set, so it cannot be served; give the classes' embeddings")
    head, t = checkpoint.head, class_set.text_embeddings
    v, labels = _sample(t, embeddings)
    for what, rows in (("the embeddings", v), ("the class set", t)):
        if rows.shape[1] != head.dim:
            raise UserError(f"the head reads embeddings {head.dim} wide, {what} has {rows.shape[1]}")
    tick = Ticker(progress, 4 + len(parity.batch_sizes(max_batch_size)))
    outlier = checkpoint.outlier
    served = repository.Served(class_set, checkpoint.threshold, "", max_batch_size, limits, outlier=outlier)
    with atomic.folder(output) as staging:
        repository.write_embeddings(staging / MODEL, served, labels=False)
        repository.write_class_sets(staging / "class_sets", served)
        repository.write_labels(staging / "labels.txt", class_set.names)
        shutil.copyfile(README, staging / "README.md")
        scale = clip_scale(checkpoint)
        plain = fold(head, t, logit_scale=scale, layout="plain")
        write_open_vocabulary(plain, checkpoint.threshold, staging / MODEL / "1" / "ragged.onnx")
        tick("writing the head")
        write_details(plain, staging / MODEL / "1" / "details.onnx")
        if outlier is not None:
            write_outlier(OutlierGraph(outlier), staging / MODEL / "1" / OUTLIER)
        tick("writing the details")
        figures, answers, eager = _measure(head, t, scale, v, labels, staging, max_batch_size, tick)
        if outlier is not None:
            row = measure.measure_outlier(staging / MODEL / "1" / OUTLIER, outlier, v.numpy())
            figures["graphs"][f"{MODEL} (outlier score)"] = {"cpu": {str(max_batch_size): row}}
        summary = report.about(checkpoint, "float32") | {
            "device": "cpu",
            "provider": "cpu",
            "preprocess": None,
            "clip": None,
            "images": {"measured": len(v), "calibrated": 0},
            **figures,
            "notes": [] if embeddings is not None else ["The embeddings were drawn around those of the classes."],
            "versions": report.libraries(),
        }
        summary["over_budget"] = checks.check_parity(summary, allow_loss=False)
        report.write(staging, summary, measure.Measured(figures, {"cpu": answers}, eager))
        if version is not None:
            versions.add(staging, output, version)
        versions.keep_class_sets(output, staging)
    return summary


def clip_scale(checkpoint: Checkpoint) -> float:
    """The model's factor on v · t: the head's own where it has the prior, else what the training noted, if it did."""
    head, noted = checkpoint.head, checkpoint.meta.get("logit_scale")
    if head.logit_scale is None and isinstance(noted, int | float) and 0 < noted < math.inf:
        return float(noted)
    return head.clip_scale


def _sample(t: Tensor, embeddings: EmbeddedSet | None) -> tuple[Tensor, np.ndarray | None]:
    """Return image embeddings (N, D) float32 to measure on, and their labels (N,) where they are known."""
    if embeddings is not None:
        chosen = np.sort(np.random.default_rng(0).permutation(len(embeddings))[:MIN_INPUTS])
        rows = torch.from_numpy(chosen)
        known = None if embeddings.labels is None else embeddings.labels[rows].numpy()
        if known is not None and len(embeddings.text) != len(t):
            known = None  # the labels are those of other classes
        return embeddings.image.normalised[rows].float(), known
    generator = torch.Generator().manual_seed(0)
    near = t[torch.arange(MIN_INPUTS) % len(t)].float()
    noise = torch.randn(MIN_INPUTS, t.shape[1], generator=generator) / t.shape[1] ** 0.5
    return F.normalize(near + noise, dim=1), None


def _measure(
    head: ViLUHead,
    t: Tensor,
    scale: float,
    v: Tensor,
    labels: np.ndarray | None,
    root: Path,
    batch: int,
    tick: Ticker,
) -> tuple[dict[str, Any], Answers, Answers]:
    """Compare the written graphs with the eager head: figures as in parity.json, the graphs' answers, the head's."""
    with torch.no_grad():
        similarity = v @ t.T
        expected = {
            "CLASS_INDEX": similarity.argmax(dim=-1).int()[:, None].numpy(),
            "CONFIDENCE": torch.softmax(scale * similarity, dim=-1).amax(dim=-1)[:, None].numpy(),
            FAILURE: head.failure_probability(v, t)[:, None].numpy(),
        }
    feed = v.numpy()
    opened = session.open_session(root / MODEL / "1" / "ragged.onnx", threads=1)

    def answer(rows: np.ndarray, size: int) -> Answers:
        parts = [measure.run_open_vocabulary(opened, rows[i : i + size], t.numpy()) for i in range(0, len(rows), size)]
        index, failure = (np.concatenate([part[name] for part in parts]) for name in ("CLASS_INDEX", FAILURE))
        return Answers(rows, index[:, 0], failure[:, 0])

    eager = Answers(feed, expected["CLASS_INDEX"][:, 0], expected[FAILURE][:, 0])
    found = answer(feed, batch)
    outputs = measure.run_open_vocabulary(opened, feed, t.numpy())
    row = parity.compare_outputs(outputs, Reference("IMAGE_EMBEDDING", feed, expected))
    tick("checking the head")
    details = measure.measure_details(root / MODEL / "1" / "details.onnx", head, scale, t, feed, 1)
    tick("checking the details")
    base = found.first(batch)
    effect = parity.batch_effect(
        answer, feed, base, parity.batch_sizes(len(base.class_index)), lambda: tick("checking batch sizes")
    )
    figures = {
        "answers": {"cpu": parity.compare_answers(found, eager, labels)},
        "batches": {"cpu": effect},
        "graphs": {MODEL: {"cpu": {str(batch): row}}, f"{MODEL} (details)": {"cpu": {str(batch): details}}},
    }
    return figures, found, eager
