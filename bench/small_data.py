"""A head against no head, from few training images up: `python bench/small_data.py --output bench/results/small-data`.

For every size and seed a part of the embedded default's train split is drawn (of as many shapes as the largest size
wants), a head is trained by the recipes "default" and "plain", and AUC and FPR95 on the whole test split are put beside
MCM's, which needs no training.
Writes OUTPUT.json (with versions, commit and machine) and OUTPUT.png.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import origin, png, write_results
from vilu import load_clip
from vilu.cli.progress import progress_bar
from vilu.data import embed, open_source, registry
from vilu.data.cache import default_cache
from vilu.evaluation.bootstrap import paired_bootstrap
from vilu.evaluation.evaluate import confidences, correct
from vilu.evaluation.metrics import auroc, fpr_at_tpr
from vilu.recipes import recipe_named
from vilu.scores import MCM, ViLU
from vilu.train import fit

RECIPES = ("default", "plain")


@click.command()
@click.option("--dataset", "datasets", multiple=True, default=("digits", "shapes"), show_default=True)
@click.option(
    "--sizes",
    default="200,800,3200,12800,50000",
    show_default=True,
    help="Numbers of training images; one above a set's size means all of it.",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Path of the results without suffix.")
def main(datasets: tuple[str, ...], sizes: str, seeds: int, output: Path) -> None:
    """Train heads on growing parts of a data set and compare them with MCM."""
    registry.SHAPES["train"] = max(registry.SHAPES["train"], *map(int, sizes.split(",")))
    clip, rows = load_clip(), list[dict[str, Any]]()
    with progress_bar() as bar:
        for dataset in datasets:
            train, test = (
                embed(open_source(dataset=dataset, split=split), clip, cache=default_cache(), progress=bar)
                for split in ("train", "test")
            )
            right = correct(test)
            mcm = confidences({"MCM": MCM()}, test)["MCM"]
            for size in sorted({min(int(size), len(train)) for size in sizes.split(",")}):
                for seed in range(seeds):
                    part = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:size]]
                    for recipe in RECIPES:
                        started = time.perf_counter()
                        trained = fit(part, recipe_named(recipe, seed=seed))
                        took = time.perf_counter() - started
                        ours = confidences({"ViLU": ViLU(trained.head)}, test)["ViLU"]
                        against = paired_bootstrap(auroc, ours, mcm, right, resamples=499)
                        rows.append(
                            {
                                "dataset": dataset,
                                "size": size,
                                "seed": seed,
                                "recipe": recipe,
                                "auc": auroc(ours, right),
                                "fpr95": fpr_at_tpr(ours, right),
                                "mcm_auc": auroc(mcm, right),
                                "mcm_fpr95": fpr_at_tpr(mcm, right),
                                "p_value": against.p_value,
                                "epoch": trained.best_epoch,
                                "seconds": round(took, 1),
                            }
                        )
                        bar(f"{dataset}, {size} images", seed + 1, seeds)
                        click.echo(json.dumps(rows[-1]))
    about = origin() | {"threads": torch.get_num_threads()}
    write_results(output, {".json": {**about, "rows": rows}, ".png": draw(rows)})


def draw(rows: list[dict[str, Any]]) -> bytes:
    """A PNG: AUC against the number of training images, a panel a data set."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = Figure(figsize=(5.5 * len(datasets), 4), layout="constrained")
    for axis, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        mine = [row for row in rows if row["dataset"] == dataset]
        sizes = sorted({row["size"] for row in mine})
        axis.axhline(mine[0]["mcm_auc"], color="tab:gray", label="MCM, no training")
        for recipe, colour in zip(RECIPES, ("tab:blue", "tab:orange"), strict=True):
            values = [[row["auc"] for row in mine if (row["size"], row["recipe"]) == (s, recipe)] for s in sizes]
            axis.plot(sizes, [np.mean(v) for v in values], "o-", color=colour, label=f"ViLU, recipe {recipe}")
            axis.fill_between(sizes, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)
        axis.set(title=dataset, xlabel="training images", ylabel="AUC on the test split", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    return png(figure, 90)


if __name__ == "__main__":
    main()
