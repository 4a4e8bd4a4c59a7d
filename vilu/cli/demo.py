"""`vilu demo`: train a head on the embedded default, compare, export, serve, ask, and prove the served answers."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from vilu.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vilu.cli.progress import progress_bar
from vilu.clip import Clip, load_clip
from vilu.errors import UserError
from vilu.evaluation import metrics
from vilu.preprocess.image import decode, pixels
from vilu.tiny import data
from vilu.train import Recipe, train_head

TRAIN_SHAPES, TEST_SHAPES, ASKED = 10_000, 4_000, 24
SERVED_TOLERANCE = 1e-4
Progress = Callable[[str, int, int], None]


@click.command("demo")
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option(
    "--model-repository",
    type=click.Path(path_type=Path),
    default=Path("serving/model_repository"),
    show_default=True,
)
@click.option("--seed", type=int, default=0, show_default=True)
def demo_command(output: Path, model_repository: Path, seed: int) -> None:
    """The whole line on the embedded default: train, compare with MCM, export, serve, ask, check, draw.

    A second run reuses the checkpoint and the model repository of the first.
    """
    from vilu.export import export
    from vilu.export.report import digest
    from vilu.serving import Client, Server
    from vilu.serving.ask import print_answers

    console = Console()
    try:
        (output / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    clip = load_clip()
    with progress_bar() as bar:
        checkpoint = _checkpoint(clip, output / f"vilu-tiny-{seed}.safetensors", seed, bar)
        scores = _evaluate(clip, checkpoint, bar)
    console.print(_table(scores))

    if _exported(model_repository) != digest(checkpoint):
        with progress_bar() as bar:
            export(checkpoint, model_repository, clip=clip, progress=bar)
    console.print(f"model repository: {model_repository}")

    files = _held_out_jpegs(output / "images")
    with Server(model_repository, log=output / "tritonserver.log") as server:
        console.print(f"tritonserver answers on {server.grpc_url}")
        with Client(server.grpc_url) as client:
            answers = [answer.raise_for_error() for answer in client.ask(files)]
    print_answers(answers)

    eager = [_eager(clip, checkpoint, file.read_bytes()) for file in files]
    worst = max(abs(a.failure_probability - p) for a, (_, p) in zip(answers, eager, strict=True))
    same = sum(a.label == label for a, (label, _) in zip(answers, eager, strict=True))
    console.print(f"served against eager: {same} of {len(files)} labels equal, P(failure) within {worst:.1e}")
    if same < len(files) or worst > SERVED_TOLERANCE:
        raise UserError(f"the served answers are not the eager model's; see {output / 'tritonserver.log'}")
    _draw(output / "demo.png", files, answers, scores)
    console.print(f"picture: {output / 'demo.png'}")


def _embed(clip: Clip, images: np.ndarray, what: str, progress: Progress) -> torch.Tensor:
    rows = []
    for start in range(0, len(images), 256):
        batch = [pixels(Image.fromarray(image), clip.transform) for image in images[start : start + 256]]
        rows.append(clip.embed_images([np.stack(batch)]))
        progress(what, start + len(batch), len(images))
    return torch.cat(rows)


def _names() -> tuple[str, ...]:
    """One class set for both sources: the served model answers digits and shapes alike."""
    return (*data.digits("clip_val").names, *data.shapes("clip_val", 1).names)


def _sources(split: str, shapes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels (in the joint class set) of both sources."""
    digits, drawn = data.digits(split), data.shapes(split, shapes)
    return {"digits": (digits.images, digits.labels), "shapes": (drawn.images, drawn.labels + len(digits.names))}


def _checkpoint(clip: Clip, path: Path, seed: int, progress: Progress) -> Checkpoint:
    """The head of an earlier run when it fits this CLIP, else a new one."""
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
    checkpoint = Checkpoint(head, clip.spec, class_set, meta=meta)
    save_checkpoint(checkpoint, path)
    return checkpoint


def _evaluate(clip: Clip, checkpoint: Checkpoint, progress: Progress) -> dict[str, dict[str, np.ndarray]]:
    """Per source: whether CLIP is right, and the confidence of MCM and ViLU, on the test split."""
    assert checkpoint.class_set is not None
    t = checkpoint.class_set.text_embeddings
    scores = {}
    for name, (images, labels) in _sources("test", TEST_SHAPES).items():
        v = _embed(clip, images, f"test {name}", progress)
        similarity = v @ t.T
        scores[name] = {
            "correct": (similarity.argmax(dim=1) == torch.from_numpy(labels)).numpy(),
            "MCM": torch.softmax(clip.spec.logit_scale * similarity, dim=1).amax(dim=1).numpy(),
            "ViLU": 1 - checkpoint.head.failure_probability(v, t).numpy(),
        }
    return scores


def _table(scores: dict[str, dict[str, np.ndarray]]) -> Table:
    table = Table("held-out", "images", "CLIP accuracy", "score", "AUC", "FPR95", title="Predicting CLIP's failures")
    for name, columns in scores.items():
        correct = columns["correct"]
        for score in ("MCM", "ViLU"):
            auc, fpr = metrics.auroc(columns[score], correct), metrics.fpr_at_tpr(columns[score], correct)
            table.add_row(name, str(len(correct)), f"{correct.mean():.1%}", score, f"{auc:.1%}", f"{fpr:.1%}")
    return table


def _exported(repository: Path) -> str:
    """The digest of the head that a repository serves, "" where there is none."""
    try:
        return str(json.loads((repository / "parity.json").read_text())["head"])
    except (OSError, ValueError, KeyError):
        return ""


def _held_out_jpegs(folder: Path) -> list[Path]:
    """Half digits, half shapes of the test split as JPEG files named after their true class."""
    names, files = _names(), []
    for source, (images, labels) in _sources("test", ASKED // 2).items():
        step = len(images) // (ASKED // 2)
        for index in range(0, step * (ASKED // 2), step):
            buffer = io.BytesIO()
            Image.fromarray(images[index]).save(buffer, "JPEG", quality=92)
            files.append(folder / f"{source}-{index:04d}-{names[labels[index]].replace(' ', '-')}.jpg")
            files[-1].write_bytes(buffer.getvalue())
    return files


def _eager(clip: Clip, checkpoint: Checkpoint, image: bytes) -> tuple[str, float]:
    assert checkpoint.class_set is not None
    t = checkpoint.class_set.text_embeddings
    v = clip.embed_images([decode(image, clip.transform)[None]])
    return checkpoint.class_set.names[int((v @ t.T).argmax())], float(checkpoint.head.failure_probability(v, t))


def _draw(path: Path, files: list[Path], answers: list, scores: dict[str, dict[str, np.ndarray]]) -> None:
    """The asked images with their answers, and risk against coverage of MCM and ViLU."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 8
    rows = math.ceil(len(files) / columns)
    figure = plt.figure(figsize=(15, 2 * rows + 4.2), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[2 * rows, 4.2])
    top, bottom = panels
    top.suptitle("Held-out images through the server: label and P(failure); true class in the corner when it differs")
    for axis, file, answer in zip(top.subplots(rows, columns).flat, files, answers, strict=True):
        axis.imshow(Image.open(file))
        axis.set_xticks([])
        axis.set_yticks([])
        colour = "tab:green" if answer.accept else "tab:red"
        axis.set_title(f"{answer.label}\n{answer.failure_probability:.2f}", fontsize=8, color=colour)
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
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)
    temporary.replace(path)
