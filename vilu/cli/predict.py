"""`vilu predict` answers for images from a checkpoint, without a server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output as said
from vilu.cli.ask import find_images, unasked
from vilu.cli.command import Command
from vilu.cli.options import (
    PATH,
    FloatRange,
    clip_options,
    details_option,
    labels_option,
    resume_option,
    template_option,
)
from vilu.cli.progress import progress_bar
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.answers import Answer

FORMATS = ("table", "tsv", "jsonl", "csv", "parquet")


@click.command("predict", cls=Command, extra="train")
@click.argument("images", nargs=-1, required=True)
@click.option("--ckpt", type=PATH, required=True, help="Checkpoint of a ViLU head.")
@labels_option
@click.option("--classes", type=PATH, help="File with other class names, one per line.")
@template_option
@clip_options
@click.option(
    "--threshold",
    type=FloatRange(0, 1),
    help="Failure probability below which an answer is accepted.  [default: the checkpoint's]",
)
@details_option
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Number of images per CLIP run."
)
@click.option("--device", help="Device to run on: cpu, cuda or cuda:N.  [default: a GPU where there is one]")
@click.option("--output", type=PATH, help="File to write the answers to, or - for standard output.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="Format of the answers.  [default: as --output ends; a table in a terminal, tab-separated lines elsewhere]",
)
@resume_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with one object per image.")
def predict_command(
    images: tuple[str, ...],
    ckpt: Path,
    labels: tuple[str, ...],
    classes: Path | None,
    templates: tuple[str, ...],
    clip_name: str | None,
    pretrained: str | None,
    threshold: float | None,
    details: bool,
    batch_size: int,
    device: str | None,
    output: Path | None,
    kind: str | None,
    resume: bool,
    as_json: bool,
) -> int:
    """Say what is in each image, without a server.

    CLIP answers, and the head of the checkpoint says how likely the answer is wrong and whether to accept it. The
    answers are those of `vilu ask`.

    IMAGES are files, folders (all images below them), patterns ("photos/*.jpg", ** for any depth), or - to read names
    from standard input, one per line. A tab-separated line holds file, label, confidence, P(failure), verdict and, if
    the checkpoint has one, the outlier score. The exit code is 0 when every image was answered, and 1 when one was not.
    """
    from vilu.class_set import read_names
    from vilu.predictor import Predictor
    from vilu.serving.answer_file import DETAILS, FIELDS, OUTLIER, read_part

    if as_json and (output is not None or kind is not None):
        raise UserError("--json takes the place of --output and --format")
    if resume and (output is None or str(output) == "-"):
        raise UserError("--resume needs the --output to go on with")
    if labels and classes is not None:
        raise UserError("--label and --classes: give one or the other")
    names = list(find_images(images))
    predictor = Predictor(
        ckpt,
        clip=clip_name,
        pretrained=pretrained,
        classes=read_names(classes) if classes is not None else labels or None,
        templates=templates or None,
        threshold=threshold,
        device=device,
        batch_size=batch_size,
    )
    columns = (*FIELDS, *(name for name in DETAILS if details and name != "class_set"))
    columns += OUTLIER if predictor.checkpoint.outlier is not None else ()
    earlier = read_part(output, columns, kind and f".{kind}") if output is not None and resume else []
    total, bad = len(names), sum(answer.get("error") is not None for answer in earlier)
    if earlier:
        names = unasked(names, earlier)
        said.note(f"{len(earlier)} answers are there, {len(names)} images are left to answer")
    with progress_bar() as bar, _written(output, "json" if as_json else kind, columns, earlier) as add:
        for done, answer in enumerate(predictor.stream(names, details=details), 1):
            add(answer)
            if answer.error is not None:
                bad += 1
                said.warn(said.printable(f"{answer.source}: {answer.error}"))
            bar("answering", done, len(names))
    if output is not None and str(output) != "-":
        said.result(f"{output}: {total} images, {bad} without an answer")
    return 1 if bad else 0


@contextlib.contextmanager
def _written(
    output: Path | None, kind: str | None, columns: Sequence[str], earlier: Sequence[dict[str, Any]]
) -> Iterator[Callable[[Answer], None]]:
    """Yield a function that takes the answers one by one, and writes them where and as the options say."""
    from vilu.serving.answer_file import open_answer_file, row, write_answers

    if output is not None and str(output) != "-":
        if kind in ("table", "tsv"):
            raise UserError(f"--format {kind} is for standard output; a file is .jsonl, .csv or .parquet")
        with open_answer_file(output, columns, kind and f".{kind}", earlier) as file:
            yield file.add
        return
    terminal = sys.stdout.isatty()
    kind = kind or ("table" if terminal else "tsv")
    if kind == "parquet" and terminal:
        raise UserError("Parquet is not for a terminal: give --output FILE")
    answers: list[Answer] = []
    if kind == "json":
        yield answers.append
        said.document([row(answer, columns) for answer in answers])
    elif kind == "table":
        yield answers.append
        if good := [answer for answer in answers if answer.error is None]:
            from vilu.cli.tables import print_answers

            print_answers(good)
    elif kind == "tsv":
        from vilu.cli.tables import answer_cells

        def add(answer: Answer) -> None:
            if answer.error is None:
                said.result("\t".join(map(said.printable, answer_cells(answer, "concepts" in columns))))

        yield add
    else:
        with write_answers(sys.stdout.buffer, columns, f".{kind}") as file:
            yield file.add
