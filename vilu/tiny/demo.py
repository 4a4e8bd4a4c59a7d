"""The steps of `vilu demo` that need neither an export nor a server. They use the embedded CLIP and its data."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vilu import atomic
from vilu.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vilu.clip import Clip
from vilu.evaluation import metrics
from vilu.fingerprints import remembered
from vilu.preprocess.image import decode, pixels
from vilu.tiny import data
from vilu.train import Recipe, train_head

TRAIN_SHAPES, TEST_SHAPES, ASKED = 10_000, 4_000, 24
Progress = Callable[[str, int, int], None]


def _embed(clip: Clip, images: np.ndarray, what: str, progress: Progress) -> torch.Tensor:
    rows = []
    for start in range(0, len(images), 256):
        batch = [pixels(Image.fromarray(image), clip.transform) for image in images[start : start + 256]]
        rows.append(clip.embed_images([np.stack(batch)]))
        progress(what, start + len(batch), len(images))
    return torch.cat(rows)


def _names() -> tuple[str, ...]:
    """Return the class names of both sources, so that one served model answers digits and shapes."""
    return (*data.digits("clip_val").names, *data.shapes("clip_val", 1).names)


def _sources(split: str, shapes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, by source, the images and their labels in the class set of `_names`."""
    digits, drawn = data.digits(split), data.shapes(split, shapes)
    return {"digits": (digits.images, digits.labels), "shapes": (drawn.images, drawn.labels + len(digits.names))}


def checkpoint_of(clip: Clip, path: Path, seed: int, progress: Progress) -> Checkpoint:
    """Return the checkpoint at `path` if its head was trained on this CLIP; else train a head and save it there.

    Args:
        clip: the CLIP to train on.
        path: file of the checkpoint.
        seed: seed of the training.
        progress: called with (what, done, total).

    Raises:
        UserError: the file at `path` is not a checkpoint, or the new one cannot be written.
    """
    if path.exists():
        checkpoint = load_checkpoint(path)
        if checkpoint.clip is not None and checkpoint.clip.fingerprint == clip.spec.fingerprint:
            return checkpoint
    sources = _sources("train", TRAIN_SHAPES)
    embedding = torch.cat([_embed(clip, images, f"embedding {n}", progress) for n, (images, _) in sources.items()])
    labels = torch.from_numpy(np.concatenate([labels for _, labels in sources.values()]))
    class_set = clip.class_set(_names())
    head = train_head(
        embedding,
        labels,
        class_set.text_embeddings,
        attention_scale=clip.spec.logit_scale,
        recipe=Recipe(seed=seed),
        progress=lambda done, total: progress("training the head", done, total),
    )
    meta = {"data": f"digits and {TRAIN_SHAPES} shapes, split train", "seed": seed}
    checkpoint = Checkpoint(head, clip.spec, class_set, meta=meta, samples=remembered(embedding))
    save_checkpoint(checkpoint, path)
    return checkpoint


def evaluate(clip: Clip, checkpoint: Checkpoint, progress: Progress) -> dict[str, dict[str, np.ndarray]]:
    """Score the test split.

    Returns:
        For each source, "correct" (N,) bool, which says where CLIP is right, "labels" (N,) int64 in the class set, and
        the confidences "MCM" and "ViLU" (N,).
    """
    assert checkpoint.class_set is not None
    t = checkpoint.class_set.text_embeddings
    scores = {}
    for name, (images, labels) in _sources("test", TEST_SHAPES).items():
        v = _embed(clip, images, f"test {name}", progress)
        similarity = v @ t.T
        scores[name] = {
            "labels": labels,
            "correct": (similarity.argmax(dim=1) == torch.from_numpy(labels)).numpy(),
            "MCM": torch.softmax(clip.spec.logit_scale * similarity, dim=1).amax(dim=1).numpy(),
            "ViLU": 1 - checkpoint.head.failure_probability(v, t).numpy(),
        }
    return scores


def held_out_jpegs(folder: Path) -> list[Path]:
    """Write images of the test split as JPEG files, half digits and half shapes. File names hold the true class."""
    names, files = _names(), []
    for source, (images, labels) in _sources("test", ASKED // 2).items():
        step = len(images) // (ASKED // 2)
        for index in range(0, step * (ASKED // 2), step):
            buffer = io.BytesIO()
            Image.fromarray(images[index]).save(buffer, "JPEG", quality=92)
            files.append(folder / f"{source}-{index:04d}-{names[labels[index]].replace(' ', '-')}.jpg")
            files[-1].write_bytes(buffer.getvalue())
    return files


def eager_answer(clip: Clip, checkpoint: Checkpoint, image: bytes) -> tuple[str, float]:
    """Return the label and the failure probability that the eager model gives an encoded image."""
    assert checkpoint.class_set is not None
    t = checkpoint.class_set.text_embeddings
    v = clip.embed_images([decode(image, clip.transform)[None]])
    return checkpoint.class_set.names[int((v @ t.T).argmax())], float(checkpoint.head.failure_probability(v, t))


def draw(path: Path, files: list[Path], answers: Sequence[Any], scores: dict[str, dict[str, np.ndarray]]) -> None:
    """Draw a PNG file with the images, their answers, and the risk-coverage curves of MCM and ViLU."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 8
    rows = math.ceil(len(files) / columns)
    figure = plt.figure(figsize=(15, 2 * rows + 4.2), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[2 * rows, 4.2])
    top, bottom = panels
    top.suptitle(
        "Held-out images through the server: green accepted, red rejected; true class in the corner where it differs"
    )
    for axis, file, answer in zip(top.subplots(rows, columns).flat, files, answers, strict=True):
        axis.imshow(Image.open(file))
        axis.set_xticks([])
        axis.set_yticks([])
        colour = "tab:green" if answer.accept else "tab:red"
        axis.set_title(f"{answer.label}\nP(failure) {answer.failure_probability:.2f}", fontsize=8, color=colour)
        for spine in axis.spines.values():
            spine.set_color(colour)
            spine.set_linewidth(2.5)
        truth = file.stem.split("-", 2)[2].replace("-", " ")
        if truth != answer.label:
            axis.text(0.03, 0.04, truth, transform=axis.transAxes, fontsize=7, color="white", backgroundcolor="black")
    for axis, (name, score) in zip(bottom.subplots(1, len(scores)), scores.items(), strict=True):
        for method, colour in (("MCM", "tab:gray"), ("ViLU", "tab:blue")):
            coverage, risk = metrics.risk_coverage(score[method], score["correct"])
            area = metrics.aurc(score[method], score["correct"])
            axis.plot(coverage, risk, color=colour, label=f"{method} (AURC {area:.3f})")
        axis.set(title=name, xlabel="coverage: share of answers kept", ylabel="risk: share of them wrong", xlim=(0, 1))
        axis.set_ylim(bottom=0)
        axis.legend()
        axis.grid(alpha=0.3)
    with atomic.file(path) as part:
        figure.savefig(part, dpi=90, format="png")
    plt.close(figure)
