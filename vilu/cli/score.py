"""`vilu score` answers for a whole data set without a server, on this machine or on a Ray cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vilu.cli import output as said
from vilu.cli.command import Command
from vilu.cli.options import PATH, REPOSITORY, FloatRange, all_of

if TYPE_CHECKING:
    from vilu.serving.offline import Workers

# How a job runs; a command receives these as `address`, `workers`, `num_cpus`, `num_gpus`, `batch_size` and so on.
job_options = all_of(
    click.option("--address", help="Ray cluster to join: auto, or HOST:PORT.  [default: Ray starts on this machine]"),
    click.option(
        "--workers", metavar="N|MIN-MAX", help="Number of actors that answer.  [default: 1 to as many as there is room]"
    ),
    click.option("--num-cpus", type=click.IntRange(1), default=1, show_default=True, help="Cores of each actor."),
    click.option(
        "--num-gpus", type=FloatRange(0), default=0.0, help="GPUs of each actor; 0.5 puts two actors on a GPU."
    ),
    click.option(
        "--object-store-memory", type=click.IntRange(80), metavar="MB", help="Memory of a Ray that starts here."
    ),
    click.option("--column", help="Column of a table that holds the encoded images or their paths."),
    click.option("--limit", type=click.IntRange(1), help="Read only the first rows."),
    click.option(
        "--max-bad",
        type=FloatRange(0, 1),
        default=0.1,
        show_default=True,
        help="Share of bad images that stops the job.",
    ),
)


@click.command("score", cls=Command, extra="ray")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--model-repository", type=PATH, default=REPOSITORY, show_default=True, help="What `vilu export` wrote.")
@click.option("--output", required=True, help="Folder or URI for the answers; an unfinished job there goes on.")
@click.option("--class-set", metavar="NAME", help="Class set that was put while a server ran.  [default: the exported]")
@click.option("--labels", type=PATH, help="File of class names, one a line, to choose from instead of a class set.")
@click.option("--details", is_flag=True, help="Also write the likeliest labels, concepts and other confidence scores.")
@click.option("--embeddings", is_flag=True, help="Also write the image embeddings, in float16.")
@click.option(
    "--outlier-score", is_flag=True, help="Also write the outlier score, where the repository's checkpoint has one."
)
@click.option("--first-stage", is_flag=True, help="Answer with the first stage of a cascade alone.")
@click.option("--columns", default="", help="Columns to carry into the output, as a,b; of shards: txt, cls.")
@click.option("--accept-only", is_flag=True, help="Keep only the rows whose answer is accepted.")
@click.option(
    "--rows-per-file", type=click.IntRange(1), default=20_000, show_default=True, help="Rows of a file of the output."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@job_options
def score_command(
    inputs: tuple[str, ...],
    model_repository: Path,
    output: str,
    class_set: str | None,
    labels: Path | None,
    details: bool,
    embeddings: bool,
    outlier_score: bool,
    first_stage: bool,
    columns: str,
    accept_only: bool,
    rows_per_file: int,
    as_json: bool,
    address: str | None,
    workers: str | None,
    num_cpus: int,
    num_gpus: float,
    object_store_memory: int | None,
    column: str | None,
    limit: int | None,
    max_bad: float,
) -> None:
    """Answer for every image of a data set, without a server.

    The output holds each image's label, confidence and failure probability.

    INPUT is a folder of images, a pattern, a text file that lists images, WebDataset shards ('shards/{000..010}.tar'),
    or Parquet or CSV files with a column of paths or encoded images; local, or a URI such as s3://bucket/images.

    A repository of a cascade answers as the cascade does, and the column `stage` says which stage answered.

    The output is a Parquet data set in OUTPUT/data, and a summary. A job that was killed goes on with the same command.
    """
    from vilu.class_set import read_names
    from vilu.serving.offline import Answers, run_job
    from vilu.serving.offline.summary import stage_shares

    names = read_names(labels) if labels else None
    summary = run_job(
        inputs,
        model_repository,
        output,
        asked=Answers(class_set, names, details, embeddings, outlier_score, not first_stage),
        column=column,
        columns=[name.strip() for name in columns.split(",") if name.strip()],
        limit=limit,
        accept_only=accept_only,
        max_bad=max_bad,
        rows_per_file=rows_per_file,
        workers=actors(workers, num_cpus, num_gpus),
        address=address,
        ray_options={"object_store_bytes": object_store_memory and object_store_memory << 20},
        progress=sys.stderr.isatty(),
    )
    if as_json:
        said.document(summary)
        return
    run = summary["this_run"]
    accepted = "" if summary["accept_rate"] is None else f", {summary['accept_rate']:.1%} accepted"
    said.result(
        f"{output}: {summary['rows']} rows{accepted}{stage_shares(summary)}, {summary['bad_images']} bad images"
    )
    for reason, number in summary["reasons"].items():
        said.result(f"  {number}: {reason}")
    said.result(f"  this run: {run['rows']} rows, {run['images_per_second']:g} images/s")


def actors(workers: str | None, num_cpus: int, num_gpus: float) -> Workers:
    """Return the Workers of the options. Raises BadParameter for a range that is none."""
    from vilu.serving.offline import Workers

    least, _, most = (workers or "").partition("-")
    if workers is None:
        return Workers(cpus=num_cpus, gpus=num_gpus)
    try:
        first, last = int(least), int(most or least)
    except ValueError:
        first, last = 0, 0
    if not 1 <= first <= last:
        raise click.BadParameter(f"--workers must be N or MIN-MAX, got {workers!r}")
    return Workers(first, last, num_cpus, num_gpus)
