"""The default recipe beside its simplest rivals, on halves of labelled embeddings: `python bench/halves.py FILE...`.

The files are embeddings as `vilu train --embeddings` reads them; `digits` and `shapes` are the embedded sets. For each
split (drawn by a seed) one half of the images trains, or the first N of that half, and the other half is the test. The
rows:

    MCM              no training
    plain ViLU       the paper's head, recipe "plain"
    default          what `vilu train` gives
    class bias       `vilu.scores.ClassBias`
    mean of both     half the logit of a head with the prior alone (recipe "default" without its linear start) and half
                     that of the class bias

"worse" and "better" count the splits on which a row's AUC differs from MCM's significantly (paired bootstrap, 5%).
Prints a table; --output writes each split's figures as JSON as well.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import markdown_table, origin, write_results
from vilu import load_clip
from vilu.cli.progress import progress_bar
from vilu.data import embed, load_embeddings, open_source
from vilu.data.cache import default_cache
from vilu.embeddings import EmbeddedSet, Embeddings
from vilu.errors import UserError
from vilu.evaluation.bootstrap import paired_bootstrap
from vilu.evaluation.metrics import Floats, auroc, fpr_at_tpr
from vilu.head import ViLUHead
from vilu.recipes import Recipe, recipe_named
from vilu.scores import ClassBias
from vilu.train import fit
from vilu.training.batches import clip_answers

ROWS = ("MCM", "plain ViLU", "default", "class bias", "mean of both")


def split(data: EmbeddedSet, size: int | None, seed: int) -> tuple[EmbeddedSet, EmbeddedSet]:
    """Half of the data, or the first `size` images of that half, to train; and the other half to test."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    half = len(data) // 2
    return data[order[: min(size or half, half)]], data[order[half:]]


def failure_logit(head: ViLUHead, test: EmbeddedSet) -> Floats:
    with torch.no_grad():
        found: Floats = head(test.image.normalised.float(), test.text.normalised.float()).double().numpy()
    return found


def class_bias(train: EmbeddedSet, test: EmbeddedSet, odds: torch.Tensor, predicted: torch.Tensor) -> Floats:
    assert train.labels is not None
    score = ClassBias().fit(train.image.normalised, train.labels, train.text.normalised, train.logit_scale)
    found: Floats = score.bias.logit(odds.double(), predicted).numpy()
    return found


def run(train: EmbeddedSet, test: EmbeddedSet, seed: int, rows: Sequence[str] = ROWS) -> dict[str, dict[str, float]]:
    """AUC, FPR95 and the p-value against MCM of each row; "seconds" of CPU time where it is trained.

    Raises:
        UserError: the training or the test images hold no mistakes of CLIP, or nothing else.
    """
    test = replace(test, text=test.text.float())
    answers = clip_answers(test, Recipe(), keep_attention=False)
    assert answers is not None
    right = ~answers.wrong.numpy()
    logits: dict[str, Floats] = {"MCM": answers.log_odds.double().numpy()}
    seconds = {}
    recipes = {
        "plain ViLU": recipe_named("plain", seed=seed),
        "default": Recipe(seed=seed),
        "prior": Recipe(seed=seed, linear=False),
    }
    wanted = [*rows, *(["class bias", "prior"] if "mean of both" in rows else [])]
    for name in dict.fromkeys(wanted):
        started = time.process_time()
        if name in recipes:
            logits[name] = failure_logit(fit(train, recipes[name]).head, test)
        elif name == "class bias":
            logits[name] = class_bias(train, test, answers.log_odds, answers.predicted)
        seconds[name] = time.process_time() - started
    if "mean of both" in rows:
        logits["mean of both"] = (logits["class bias"] + logits["prior"]) / 2
    found = {}
    for name in rows:
        against = paired_bootstrap(auroc, -logits[name], -logits["MCM"], right, resamples=999)
        found[name] = {
            "auc": auroc(-logits[name], right),
            "fpr95": fpr_at_tpr(-logits[name], right),
            "p_value": against.p_value,
            "seconds": round(seconds.get(name, 0.0), 2),
        }
    return found


def read(name: str) -> EmbeddedSet:
    """A file of embeddings, or all images of an embedded set."""
    if name not in ("digits", "shapes"):
        return load_embeddings(Path(name))
    clip = load_clip()
    parts = [embed(open_source(dataset=name, split=s), clip, cache=default_cache()) for s in ("train", "test")]
    images = torch.cat([part.image.normalised for part in parts])
    labels = torch.cat([part.labels for part in parts if part.labels is not None])
    return replace(parts[0], name=name, image=Embeddings(images), labels=labels, rows=None)


def summary(runs: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """A row a method: means over the splits, and on how many it is significantly worse or better than MCM."""
    found = []
    for name in runs[0]:
        mine = [(one[name], one["MCM"]["auc"]) for one in runs]
        significant = [(row["auc"] > mcm) for row, mcm in mine if row["p_value"] < 0.05]
        found.append(
            {
                "row": name,
                "auc": float(np.mean([row["auc"] for row, _ in mine])),
                "fpr95": float(np.mean([row["fpr95"] for row, _ in mine])),
                "worse": len(significant) - sum(significant),
                "better": sum(significant),
                "seconds": float(np.mean([row["seconds"] for row, _ in mine])),
            }
        )
    return found


@click.command()
@click.argument("sets", nargs=-1, required=True)
@click.option("--sizes", default="50,100,200,400,half", show_default=True, help="Numbers of training images.")
@click.option("--splits", default=4, show_default=True, type=click.IntRange(1), help="Number of random halves.")
@click.option("--first-seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the first half.")
@click.option("--rows", default=",".join(ROWS), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Path of the results without suffix.")
def main(sets: tuple[str, ...], sizes: str, splits: int, first_seed: int, rows: str, output: Path | None) -> None:
    """Measure the default recipe beside its simplest rivals on halves of labelled embeddings."""
    chosen = [row.strip() for row in rows.split(",")]
    if unknown := [row for row in chosen if row not in ROWS]:
        raise click.BadParameter(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}", param_hint="--rows")
    chosen = list(dict.fromkeys(["MCM", *chosen]))
    wanted = [None if size.strip() == "half" else int(size) for size in sizes.split(",")]
    results = []
    with progress_bar() as bar:
        for name in sets:
            data = read(name)
            for size in wanted:
                runs: list[dict[str, dict[str, float]]] = []
                for seed in range(first_seed, first_seed + splits):
                    train, test = split(data, size, seed)
                    bar(f"{data.name}, {len(train)} images", seed - first_seed + 1, splits)
                    try:
                        runs.append(run(train, test, seed, chosen))
                    except UserError:  # too few mistakes among few images
                        continue
                label = f"{data.name}: {len(train)} images to train, {len(runs)} of {splits} splits"
                if not runs:
                    click.echo(f"{label}: too few mistakes to train on\n")
                    continue
                means = summary(runs)
                results.append({"set": data.name, "size": len(train), "means": means, "runs": runs})
                lines = [
                    [
                        row["row"],
                        f"{row['auc']:.4f}",
                        f"{row['fpr95']:.3f}",
                        row["worse"],
                        row["better"],
                        f"{row['seconds']:.1f}",
                    ]
                    for row in means
                ]
                head = ("", "AUC", "FPR95", "worse than MCM", "better", "CPU seconds")
                click.echo("\n".join([label, "", *markdown_table(head, lines), ""]))
    if output is not None:
        write_results(output, {".json": {**origin(), "splits": splits, "first_seed": first_seed, "results": results}})


if __name__ == "__main__":
    main()
