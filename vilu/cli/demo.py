"""`vilu demo` trains a head on embedded data, evaluates, exports and serves it, and checks the served answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vilu.cli import output as said
from vilu.cli.command import Command
from vilu.cli.options import PATH, REPOSITORY
from vilu.cli.progress import progress_bar
from vilu.errors import FailedError, UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

SERVED_TOLERANCE = 1e-4
NEXT = (
    "your own images, in a folder with one sub-folder per class (docs/tutorial.md says more):",
    "  vilu train --clip ViT-B-32 --pretrained openai --data photos/train --output pets.safetensors",
    "  vilu export --ckpt pets.safetensors, then vilu serve, then vilu ask photos/new",
)


@click.command("demo", cls=Command, extra="export,server")
@click.option(
    "--output",
    type=PATH,
    default=Path("demo"),
    show_default=True,
    help="Folder to write the checkpoint, the images and the picture to.",
)
@click.option(
    "--model-repository", type=PATH, default=REPOSITORY, show_default=True, help="Model repository to write and serve."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the training.")
def demo_command(output: Path, model_repository: Path, seed: int) -> None:
    """Train, evaluate, export and serve on embedded data.

    The demo compares the head with MCM, asks the real server, checks its answers against the eager model and draws a
    picture. Then it records a stream of images that become darker, raises the alarm and rolls out a new threshold. A
    second run reuses the checkpoint and the model repository of the first.
    """
    from rich.console import Console

    from vilu.cli.demo_monitor import TARGET, promise
    from vilu.cli.tables import print_answers
    from vilu.clip import load_clip
    from vilu.export import export
    from vilu.export.report import digest
    from vilu.serving import Client, Server
    from vilu.tiny.demo import checkpoint_of, draw, eager_answer, evaluate, held_out_jpegs

    console = Console()
    try:
        (output / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    clip = load_clip()
    with progress_bar() as bar:
        checkpoint = checkpoint_of(clip, output / f"vilu-tiny-{seed}.safetensors", seed, bar)
        scores = evaluate(clip, checkpoint, bar)
    console.print(_table(scores, len(checkpoint.class_set.names) if checkpoint.class_set else 0))

    if _exported(model_repository) != digest(checkpoint):
        with progress_bar() as bar:
            export(checkpoint, model_repository, clip=clip, progress=bar)
    console.print(f"model repository: {model_repository}")

    files = held_out_jpegs(output / "images")
    with Server(model_repository, log=output / "tritonserver.log") as server:
        console.print(f"tritonserver answers on {server.grpc_url}")
        with Client(server.grpc_url) as client:
            answers = [answer.raise_for_error() for answer in client.ask(files)]
    print_answers(answers)

    eager = [eager_answer(clip, checkpoint, file.read_bytes()) for file in files]
    worst = max(abs(a.failure_probability - p) for a, (_, p) in zip(answers, eager, strict=True))
    same = sum(a.label == label for a, (label, _) in zip(answers, eager, strict=True))
    console.print(f"served against eager: {same} of {len(files)} labels equal, P(failure) within {worst:.1e}")
    if same < len(files) or worst > SERVED_TOLERANCE:
        raise FailedError(f"the served answers are not the eager model's; see {output / 'tritonserver.log'}")
    draw(output / "demo.png", files, answers, scores)
    console.print(f"picture: {output / 'demo.png'}")
    for line in NEXT:
        said.result(line)

    report, picture = promise(output / "monitor", model_repository, clip, checkpoint, click.echo)
    console.print(f"picture: {picture}")
    if report.watched[-1].low > TARGET:
        raise UserError(f"the risk is still above the target; see {picture}")


def _table(scores: dict[str, dict[str, np.ndarray]], classes: int) -> Table:
    from rich.table import Table

    from vilu.evaluation import metrics
    from vilu.evaluation.chance import accuracy

    table = Table(
        "held-out", "images", "CLIP accuracy", "chance", "score", "AUC", "FPR95", title="Predicting CLIP's failures"
    )
    for name, columns in scores.items():
        correct = columns["correct"]
        clip = accuracy(correct, columns["labels"], classes)
        for score in ("MCM", "ViLU"):
            auc, fpr = metrics.auroc(columns[score], correct), metrics.fpr_at_tpr(columns[score], correct)
            table.add_row(
                name, str(len(correct)), f"{clip.share:.1%}", f"{clip.chance:.1%}", score, f"{auc:.1%}", f"{fpr:.1%}"
            )
    return table


def _exported(repository: Path) -> str:
    """Return the digest of the head that a repository serves, or "" where there is no repository."""
    try:
        return str(json.loads((repository / "parity.json").read_text())["head"])
    except (OSError, ValueError, KeyError):
        return ""
