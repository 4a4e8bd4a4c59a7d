"""`vilu embed` writes the image embeddings of a labelled data set, for `vilu train --embeddings` and `vilu eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vilu.cli import output as said
from vilu.cli.command import Command
from vilu.cli.options import PATH, REPOSITORY
from vilu.cli.score import actors, job_options


@click.command("embed", cls=Command, extra="ray")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--model-repository", type=PATH, default=REPOSITORY, show_default=True, help="What `vilu export` wrote.")
@click.option("--output", required=True, type=PATH, help="Folder for the embeddings; an unfinished job there goes on.")
@click.option("--class-set", metavar="NAME", help="Class set that gives the classes.  [default: the exported]")
@click.option("--labels", type=PATH, help="File of class names, one a line, in place of a class set.")
@click.option(
    "--label-column",
    help="Column of a table with each image's class; cls for shards.  [default: the name of the image's folder]",
)
@job_options
def embed_command(
    inputs: tuple[str, ...],
    model_repository: Path,
    output: Path,
    class_set: str | None,
    labels: Path | None,
    label_column: str | None,
    workers: str | None,
    num_cpus: int,
    num_gpus: float,
    object_store_memory: int | None,
    **options: Any,
) -> None:
    """Embed the images of a labelled data set, for training.

    The exported image tower runs as in `vilu score`, and INPUT is what that reads. Then OUTPUT/embeddings is for
    `vilu train --embeddings` and `vilu eval --embeddings`, which map it from disk.
    """
    from vilu.class_set import read_names
    from vilu.serving.offline.embed import run_embed

    summary = run_embed(
        inputs,
        model_repository,
        output,
        class_set=class_set,
        labels=read_names(labels) if labels else None,
        label_column=label_column,
        workers=actors(workers, num_cpus, num_gpus),
        ray_options={"object_store_bytes": object_store_memory and object_store_memory << 20},
        progress=sys.stderr.isatty(),
        **options,
    )
    said.result(f"{output}/embeddings: {summary['answered']} images, {summary['bad_images']} bad images left out")
