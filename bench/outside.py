"""How well each score tells images of the classes from images of none of them: `python bench/outside.py SET [SET2]`.

A SET is a file of embeddings as `vilu train --embeddings` reads it, or an embedded data set (digits, shapes). Three
classes in ten, drawn by a seed, are left out of the candidates and of the training images. Of the other classes' images
one half (at most 3,000) trains the head and the outlier score, a quarter calibrates the outlier score's threshold, and
a quarter is tested against the images of the classes left out. Candidates without images stay candidates. The rows are
those of `vilu eval --outside-embeddings`; AUC and FPR95 are means over the cuts, and so are the shares of the images
inside and outside that the threshold of `--refuse` accepts. Prints a table a set; --output writes them as JSON as well,
with versions and commit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import origin, write_results
from bench.cross import of_classes
from vilu import load_clip
from vilu.data import embed, load_embeddings, open_source
from vilu.embeddings import EmbeddedSet
from vilu.errors import UserError
from vilu.evaluation.outside import OutsideRow, evaluate_outside
from vilu.outlier import fit_outlier
from vilu.recipes import Recipe
from vilu.train import fit

EMBEDDED = ("digits", "shapes")
LEFT_OUT, MOST = 0.3, 3000


def opened(name: str) -> EmbeddedSet:
    """The set of this name, or in this file."""
    return embed(open_source(dataset=name), load_clip()) if name in EMBEDDED else load_embeddings(Path(name))


def cut(data: EmbeddedSet, seed: int) -> tuple[EmbeddedSet, EmbeddedSet, EmbeddedSet, EmbeddedSet]:
    """The images that train, that calibrate and that are tested inside the class set, and those outside it."""
    if data.labels is None:
        raise UserError(f"{data.name}: captions have no classes to leave out")
    draw = torch.Generator().manual_seed(seed)
    present = torch.unique(data.labels)
    order = present[torch.randperm(len(present), generator=draw)]
    out = order[: round(LEFT_OUT * len(order))]
    if not len(out) or len(order) - len(out) < 2:
        raise UserError(f"{data.name}: {len(present)} classes are too few to leave some out")
    kept = torch.ones(len(data.text), dtype=torch.bool)
    kept[out] = False
    inside, outside = of_classes(data, kept.nonzero().squeeze(1)), of_classes(data, out)
    rows = torch.randperm(len(inside), generator=draw)
    half, quarter = len(rows) // 2, len(rows) // 4
    return inside[rows[:half][:MOST]], inside[rows[half : half + quarter]], inside[rows[half + quarter :]], outside


def run(data: EmbeddedSet, seed: int, refuse: float) -> tuple[OutsideRow, ...]:
    train, held, test, outside = cut(data, seed)
    outlier = fit_outlier(train.image.normalised, train.labels, train.text.normalised)
    outlier = outlier.calibrated(held.image.normalised, refuse)
    head = fit(train, Recipe(seed=seed)).head
    return evaluate_outside(test, outside, head, None, outlier, resamples=2).rows


def table(runs: Sequence[Sequence[OutsideRow]]) -> list[dict[str, Any]]:
    """A row a score: its means over the cuts."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return [
        {
            "row": of_score[0].method,
            "auc": mean([one.auc.value for one in of_score]),
            "fpr95": mean([one.fpr95 for one in of_score]),
            "inside_accepted": mean([one.inside_accepted for one in of_score]),
            "outside_accepted": mean([one.outside_accepted for one in of_score]),
        }
        for of_score in zip(*runs, strict=True)
    ]


@click.command()
@click.argument("sets", nargs=-1, required=True)
@click.option("--cuts", default=3, show_default=True, type=click.IntRange(1), help="Number of random cuts.")
@click.option("--refuse", default=0.05, show_default=True, help="Share of images inside that may be refused.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write: NAME.json.")
def main(sets: tuple[str, ...], cuts: int, refuse: float, output: Path | None) -> None:
    """Measure which score tells images of the classes from images of none of them."""
    found = []
    for name in sets:
        try:
            data = opened(name)
            rows = table([run(data, seed, refuse) for seed in range(cuts)])
        except UserError as error:
            raise click.ClickException(str(error)) from None
        found.append({"set": data.name, "cuts": cuts, "refuse": refuse, "rows": rows})
        click.echo(
            f"\n{data.name}, {cuts} cuts\n\n| | AUC | FPR95 | accepted inside | outside |\n|---|---|---|---|---|"
        )
        for row in rows:
            cells = [row[key] for key in ("auc", "fpr95", "inside_accepted", "outside_accepted")]
            click.echo(f"| {row['row']} | {' | '.join('' if cell is None else f'{cell:.3f}' for cell in cells)} |")
    if output is not None:
        write_results(output.with_suffix(""), {".json": origin() | {"sets": found}})


if __name__ == "__main__":
    main()
