"""`vilu ask` sends images to a server and prints the answers or writes them to a file."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output as said
from vilu.cli.command import Command
from vilu.cli.options import PATH, SECONDS, connection_options, details_option, labels_option, resume_option
from vilu.cli.progress import progress_bar
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.serving import Answer, Client


@click.command("ask", cls=Command, extra="client")
@click.argument("images", nargs=-1)
@click.option(
    "--embeddings",
    type=PATH,
    help="Ask about the embeddings in this file instead of images: image_embedding (N, D) in .npz, .safetensors or "
    ".parquet.",
)
@connection_options
@click.option(
    "--model", default="vilu", show_default=True, help="Name of the served model; vilu_cascade asks a server's cascade."
)
@click.option("--stage", is_flag=True, help="Also give the stage that answered, where `vilu` is a cascade.")
@labels_option
@click.option("--class-set", metavar="NAME", help="Class set of the server to choose from (see `vilu classes list`).")
@details_option
@click.option(
    "--outlier-score",
    is_flag=True,
    help="Also give how unlike the training images each image is, where the server's checkpoint has such a score.",
)
@click.option("--ids", is_flag=True, help="Also give each answer's id, which `vilu feedback` names.")
@click.option("--timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds to wait for an answer.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Number of images per request."
)
@click.option("--in-flight", type=click.IntRange(1), default=4, show_default=True, help="Number of requests at a time.")
@click.option(
    "--output",
    type=PATH,
    help="File to write the answers to: .jsonl, .csv or .parquet, or - for JSON lines on standard output.",
)
@resume_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with one object per image.")
def ask_command(
    images: tuple[str, ...],
    embeddings: Path | None,
    url: str,
    token: str | None,
    model: str,
    stage: bool,
    labels: tuple[str, ...],
    class_set: str | None,
    details: bool,
    outlier_score: bool,
    ids: bool,
    timeout: float,
    batch_size: int,
    in_flight: int,
    output: Path | None,
    resume: bool,
    as_json: bool,
    **tls: Any,
) -> int:
    """Ask a running server what is in each image.

    The server also says how likely its answer is wrong, and whether to accept it.

    With --embeddings another program has embedded the images, and row I is named "row I" in the answers.

    IMAGES are files, folders (all images below them), patterns ("photos/*.jpg", ** for any depth), or - to read names
    from standard input, one per line. A terminal shows a table. Elsewhere each image is a line of tab-separated file,
    label, confidence, P(failure) and verdict. The exit code is 0 when every image was answered, and 1 when one was not.
    """
    from vilu.cli.tables import print_answers
    from vilu.serving import Client
    from vilu.serving.answer_file import DETAILS, FIELDS, IDS, OUTLIER, STAGES, open_answer_file, read_part, row
    from vilu.serving.async_client import CASCADE
    from vilu.serving.embedding_file import read_image_embeddings
    from vilu.serving.tokens import token_from

    if bool(images) == (embeddings is not None):
        raise click.UsageError(
            "Missing argument 'IMAGES...'." if not images else "give IMAGES or --embeddings, not both"
        )
    if output is not None and as_json:
        raise UserError("--json and --output: give one or the other")
    if resume and (output is None or str(output) == "-"):
        raise UserError("--resume needs the --output to go on with")
    if labels and class_set is not None:
        raise UserError("--label and --class-set: give one or the other")

    def print_line(answer: Answer) -> None:
        said.result(json.dumps(row(answer, columns)))

    stage |= model == CASCADE
    if stage and embeddings is not None:
        raise UserError("--embeddings: a cascade has an embedding of each stage; ask the model vilu")
    columns = (*FIELDS, *(STAGES if stage else ()))
    columns += DETAILS if details else ("class_set",) if class_set is not None else ()
    columns += (OUTLIER if outlier_score else ()) + (IDS if ids else ())
    if ids and output is None and not as_json:
        raise UserError("--ids: give --output or --json")
    rows: Any = [] if embeddings is None else read_image_embeddings(embeddings)
    names = list(find_images(images)) or [f"row {i}" for i in range(len(rows))]
    lines = output is not None and str(output) == "-"
    path = None if lines else output
    total = len(names)
    answers: list[Answer] = []  # filled only where answers are printed at the end
    earlier = read_part(path, columns) if path is not None and resume else []
    bad = sum(answer.get("error") is not None for answer in earlier)
    if earlier:
        names = unasked(names, earlier)
        said.note(
            f"{len(earlier)} answers are there, {len(names)} {'images' if images else 'embeddings'} are left to ask"
        )
    with (
        Client(
            url,
            model=model,
            timeout=timeout,
            batch_size=batch_size,
            in_flight=in_flight,
            token=token_from(token, "VILU_TOKEN"),
            **tls,
        ) as client,
        progress_bar() as bar,
        contextlib.nullcontext() if path is None else open_answer_file(path, columns, earlier=earlier) as file,
    ):
        add = print_line if lines else answers.append if file is None else file.add
        chosen: dict[str, Any] = {"labels": labels or None, "class_set": class_set, "details": details}
        chosen["outlier_score"] = outlier_score
        if embeddings is None:
            found = client.stream(names, **chosen, stage=stage)
        else:
            found = _about_rows(client, rows, names, chosen)
        for done, answer in enumerate(found, 1):
            add(answer)
            if answer.error is not None:
                bad += 1
                said.warn(said.printable(f"{answer.source}: {answer.error}"))
            bar("asking", done, len(names))
    if path is not None:
        said.result(f"{path}: {total} {'images' if images else 'embeddings'}, {bad} without an answer")
    elif as_json:
        said.document([row(answer, columns) for answer in answers])
    elif len(answers) > bad:  # none are kept where each was a line
        print_answers([answer for answer in answers if answer.error is None])
    return 1 if bad else 0


def unasked(names: list[str], earlier: list[dict[str, Any]]) -> list[str]:
    """Return the names without those that have an answer. A name that was given twice is answered twice."""
    left = Counter(answer["source"] for answer in earlier)
    rest = []
    for name in names:
        if left[name]:
            left[name] -= 1
        else:
            rest.append(name)
    return rest


def _about_rows(client: Client, rows: Any, names: list[str], chosen: dict[str, Any]) -> Iterator[Answer]:
    """Yield the answers for the rows of image embeddings (N, D) that are named "row I", some requests at a time.

    Raises:
        RequestRefused: the first row is refused though it is good, and so would be all others, such as for their width.
    """
    from dataclasses import replace

    import numpy as np

    from vilu.answers import RequestRefused

    rows = rows[[int(name.removeprefix("row ")) for name in names]]
    step = 1
    start = 0
    while start < len(rows):
        answers = client.ask_embeddings(rows[start : start + step], **chosen)
        if not start and answers[0].error is not None and np.isfinite(rows[0]).all() and rows[0].any():
            raise RequestRefused(f"{names[0]}: {answers[0].error}")
        for name, answer in zip(names[start:], answers, strict=False):
            yield replace(answer, source=name)
        start, step = start + step, 1024


def find_images(given: Iterable[str]) -> Iterator[str]:
    """Yield the image files that the user named. Raises UserError where a folder or a pattern has no image."""
    from vilu.data.image_files import CONVERT, OTHERS, SUFFIXES, walk

    def some(name: str, found: Iterable[str]) -> list[str]:
        files = [path for path in found if os.path.isfile(path)]
        if not files:
            raise UserError(f"{name}: no {', '.join(SUFFIXES)} files there")
        return files

    for name in given:
        if name == "-":
            yield from (line for line in sys.stdin.read().removeprefix("\ufeff").splitlines() if line)
        elif os.path.isdir(name):
            yield from some(name, map(str, sorted(Path(name) / path for path in walk(Path(name)))))
            if others := sorted(walk(Path(name), OTHERS)):
                more = f" ({len(others)} such files)" if len(others) > 1 else ""
                said.warn(said.printable(f"left out: {Path(name) / others[0]} {CONVERT}{more}"))
        elif not os.path.exists(name) and glob.has_magic(name):
            yield from some(name, sorted(glob.glob(name, recursive=True)))
        else:
            yield name
