"""The tables of the paper that the data at hand allow: `python bench/paper.py --root DIR --output OUTPUT`.

DIR holds some of the paper's 13 data sets in CoOp's layout, as `vilu train --dataset NAME --root DIR` reads them. Each
folder DIR/NAME with `train` and `test` as embeddings (.npz or .safetensors) or as WebDataset shards (`train/*.tar`)
is read as well: for NAME among the 13, or for cc3m, cc12m and laion400m, whose images have captions.
DIR/released/NAME.ckpt is the authors' checkpoint for a set.

The tables, each with the published number beside ours where there is one:

    sets        every method, the paper's recipe and the default recipe
    captions    MCM, LVU, the paper's recipe and the default recipe, in groups of 1,024
    candidates  cc12m against the number of candidates K
    ablation    what the head's MLP reads, with the paper's recipe
    loss        cross-entropy or squared error, with the paper's recipe, on imagenet
    amount      shares of the training data, with the paper's recipe and the default recipe
    released    the authors' checkpoints

Every number is written to OUTPUT.json as soon as it is known. A run that is started again goes on from there.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import origin
from bench.paper_published import ABLATION, AMOUNTS, BY_CANDIDATES, CAPTIONS, LOSS, MEAN, RELEASED, SETS
from vilu import atomic, load_checkpoint, load_clip
from vilu.cli.progress import progress_bar
from vilu.clip import Clip
from vilu.data import embed, load_embeddings, open_source
from vilu.data.cache import default_cache
from vilu.data.registry import EMBEDDING_FILES, ON_DISK
from vilu.embeddings import EmbeddedSet
from vilu.errors import UserError
from vilu.evaluation.evaluate import confidences, correct
from vilu.evaluation.metrics import auroc, fpr_at_tpr
from vilu.head import PARTS
from vilu.recipes import Recipe, recipe_named
from vilu.scores import SCORES, Score, ViLU
from vilu.train import fit

GROUP = 1024
PAPER, DEFAULT = "ViLU, paper's recipe", "ViLU, default"
Pair = tuple[EmbeddedSet, EmbeddedSet]


@dataclass(frozen=True)
class Cell:
    """One number to compute.

    table, dataset, row: where it stands.
    score: builds the score from the training data.
    candidates: number K of captions in a group; None for a closed set.
    """

    table: str
    dataset: str
    row: str
    score: Callable[[EmbeddedSet], Score]
    candidates: int | None = None

    @property
    def key(self) -> str:
        return f"{self.table}/{self.dataset}/{self.row}"


class Data:
    """The data sets below a folder; embeddings are kept for the set that was read last."""

    def __init__(self, root: Path, load: Callable[[], Clip]) -> None:
        self.root, self._load = root, load
        self._last: tuple[str, Pair] | None = None
        self._clip: Clip | None = None

    def names(self) -> tuple[list[str], list[str]]:
        """The sets that can be read, and a line for each of the others."""
        reasons = {name: self._missing(name) for name in (*ON_DISK, *CAPTIONS)}
        return [name for name in reasons if not reasons[name]], [f"{n}: {why}" for n, why in reasons.items() if why]

    def _missing(self, name: str) -> str:
        """Why a set cannot be read; empty where it can."""
        if all(self._prepared(name, split) is not None for split in ("train", "test")):
            return ""
        if name not in ON_DISK:
            return f"no embeddings or shards in {self.root / name}"
        try:
            for split in ("train", "test"):
                open_source(dataset=name, root=self.root, split=split)
        except UserError as error:
            return str(error)
        return ""

    def _prepared(self, name: str, split: str) -> Path | str | None:
        folder = self.root / name
        for ending in EMBEDDING_FILES:
            if (folder / f"{split}{ending}").is_file():
                return folder / f"{split}{ending}"
        return str(folder / split) if any((folder / split).glob("*.tar")) else None

    def read(self, name: str) -> Pair:
        if self._last is None or self._last[0] != name:
            self._last = None  # two sets need not fit into memory together
            self._last = name, (self._read(name, "train"), self._read(name, "test"))
        return self._last[1]

    def _read(self, name: str, split: str) -> EmbeddedSet:
        found = self._prepared(name, split)
        if isinstance(found, Path):
            return replace(load_embeddings(found), name=name)
        if self._clip is None:
            self._clip = self._load()
        if found is not None:
            source = open_source(found, cache=default_cache())
        else:
            source = open_source(dataset=name, root=self.root, split=split)
        with progress_bar() as bar:
            return embed(source, self._clip, cache=default_cache(), projection=True, progress=bar)


def paper_recipe(name: str, **changes: Any) -> Recipe:
    """The released script's settings for a set."""
    kind = "captions" if name in CAPTIONS else "imagenet" if name == "imagenet" else "cifar10"
    return recipe_named(f"paper-{kind}", **changes)


def cells(names: list[str], released: Path, epochs: int | None) -> Iterator[Cell]:
    """All numbers that the data allow, set by set."""
    short = {} if epochs is None else {"epochs": epochs, "min_steps": 0}
    trained: dict[Recipe, Score] = {}  # on all of the current set: several tables show the same head

    def head(recipe: Recipe, share: float = 1.0) -> Callable[[EmbeddedSet], Score]:
        if recipe.parts == PARTS:
            recipe = replace(recipe, parts=None)

        def built(train: EmbeddedSet) -> Score:
            if share == 1 and recipe in trained:
                return trained[recipe]
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))
            part = train if share == 1 else train[order[: max(4, round(share * len(train)))].sort().values]
            score = ViLU(fit(part, replace(recipe, batch_size=min(recipe.batch_size, len(part)))).head)
            if share == 1:
                trained[recipe] = score
            return score

        return built

    def baseline(name: str) -> Callable[[EmbeddedSet], Score]:
        def built(train: EmbeddedSet) -> Score:
            score = SCORES[name]()
            if epochs is not None and hasattr(score, "training"):
                score.training = replace(score.training, epochs=epochs)
            return score.fit(train.image, train.labels, train.text, train.logit_scale)

        return built

    baselines = [name for name in SCORES if name != "ViLU"]
    for name in names:
        trained.clear()
        captions = name in CAPTIONS
        k = GROUP if captions else None
        size = {"batch_size": GROUP} if captions else {}
        paper, default = paper_recipe(name, **short), recipe_named("default", **short, **size)
        for row in ("MCM", "LVU-BCE", "BayesVLM") if captions else baselines:
            yield Cell("captions" if captions else "sets", name, row, baseline(row), k)
        for row, recipe in ((PAPER, paper), (DEFAULT, default)):
            yield Cell("captions" if captions else "sets", name, row, head(recipe), k)
        if name in BY_CANDIDATES:
            for count in next(iter(BY_CANDIDATES[name].values())):
                for row, built in (("MCM", baseline("MCM")), (PAPER, head(paper)), (DEFAULT, head(default))):
                    yield Cell("candidates", name, f"{row}, K = {count}", built, count)
        if name in ABLATION:
            for row, (parts, _) in ABLATION[name].items():
                yield Cell("ablation", name, row, head(replace(paper, parts=parts)), k)
        if name in LOSS:
            for loss in LOSS[name]:
                yield Cell("loss", name, loss, head(replace(paper, loss=loss)), k)
        for share in AMOUNTS if not captions else ():
            for row, recipe in ((PAPER, paper), (DEFAULT, default)):
                yield Cell("amount", name, f"{row}, {share:.0%}", head(recipe, share), k)
        checkpoint = released / f"{name}.ckpt"
        if checkpoint.is_file():
            yield Cell("released", name, "released", _loaded(checkpoint), k)


def _loaded(path: Path) -> Callable[[EmbeddedSet], Score]:
    return lambda _: ViLU(load_checkpoint(path).head)


def published(table: str, dataset: str, row: str) -> tuple[float | None, float | None]:
    """The published AUC and FPR95 in percent of a cell; None where there is none."""
    if table == "sets":
        return SETS.get(dataset, {}).get(row, (None, None))
    if table == "captions":
        return CAPTIONS[dataset].get(row, (None, None))
    if table == "candidates":
        name, _, count = row.partition(", K = ")
        return BY_CANDIDATES[dataset].get(name, {}).get(int(count)), None
    if table == "ablation":
        return ABLATION[dataset][row][1], None
    if table == "loss":
        return LOSS[dataset][row], None
    return RELEASED.get(dataset, (None, None)) if table == "released" else (None, None)


def run(root: Path, output: Path, clip: tuple[str, str | None], epochs: int | None) -> dict[str, Any]:
    """Compute what OUTPUT.json does not hold yet. Returns the document."""
    settings = {"clip": list(clip), "epochs": epochs}
    document: dict[str, Any] = {"settings": settings, **origin(), "cells": {}}
    if output.exists():
        try:
            document = json.loads(output.read_text())
            known = document["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{output}: not the results of this script; name another file") from None
        if known != settings:
            raise UserError(f"{output}: was begun with other settings ({known}); name another file")
    data = Data(root, lambda: load_clip(*clip))
    names, left_out = data.names()
    for line in left_out:
        click.echo(f"left out: {line}", err=True)
    if not names:
        raise UserError(f"{root}: holds none of {', '.join((*ON_DISK, *CAPTIONS))}")
    for cell in cells(names, root / "released", epochs):
        if cell.key in document["cells"]:
            continue
        click.echo(cell.key, err=True)
        train, test = data.read(cell.dataset)
        started = time.perf_counter()
        try:
            document["cells"][cell.key] = {**measured(cell, train, test), "train": len(train), "test": len(test)}
        except UserError as error:
            document["cells"][cell.key] = {"reason": str(error)}
        document["cells"][cell.key] |= {
            "table": cell.table,
            "dataset": cell.dataset,
            "row": cell.row,
            "seconds": round(time.perf_counter() - started, 1),
        }
        atomic.write(output, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return document


def measured(cell: Cell, train: EmbeddedSet, test: EmbeddedSet) -> dict[str, float]:
    candidates = None if cell.candidates is None else min(cell.candidates, len(test))
    if cell.candidates is not None and candidates != cell.candidates and cell.table == "candidates":
        raise UserError(f"{test.name}: {len(test)} test images are fewer than {cell.candidates} candidates")
    right = correct(test, candidates)
    confidence = confidences({cell.row: cell.score(train)}, test, candidates)[cell.row]
    return {"auc": auroc(confidence, right), "fpr95": fpr_at_tpr(confidence, right), "accuracy": float(right.mean())}


def markdown(document: Mapping[str, Any]) -> str:
    """All tables, ours and the published numbers in percent."""
    lines = [
        "# The paper's tables on the data at hand",
        "",
        f"CLIP {' '.join(filter(None, document['settings']['clip']))}, commit {document['commit']}. Percent: ours "
        "(published). Lower FPR95 is better. The published numbers are from arXiv 2507.07620 and the notebooks of the "
        "authors' code.",
    ]
    by_table: dict[str, list[dict[str, Any]]] = {}
    for cell in document["cells"].values():
        by_table.setdefault(cell["table"], []).append(cell)
    for table, found in by_table.items():
        lines += ["", f"## {table}", "", "| data set | row | AUC | FPR95 | |", "|---|---|---|---|---|"]
        for cell in found:
            numbers = published(table, cell["dataset"], cell["row"])
            shown = [_beside(cell.get(key), number) for key, number in zip(("auc", "fpr95"), numbers, strict=True)]
            lines.append(f"| {cell['dataset']} | {cell['row']} | {' | '.join(shown)} | {cell.get('reason', '')} |")
        if table == "sets":
            lines += _means(found)
    return "\n".join(lines) + "\n"


def _means(found: list[dict[str, Any]]) -> list[str]:
    """The mean of each row over the sets that all rows have; the published mean is over 13 sets."""
    rows = dict.fromkeys(cell["row"] for cell in found)
    have = {row: {cell["dataset"]: cell for cell in found if cell["row"] == row and "auc" in cell} for row in rows}
    lines = []
    for row, cells_of in have.items():
        if cells_of:
            means = [math.fsum(cell[key] for cell in cells_of.values()) / len(cells_of) for key in ("auc", "fpr95")]
            numbers = MEAN.get(row, (None, None))
            shown = [_beside(mean, number) for mean, number in zip(means, numbers, strict=True)]
            lines.append(f"| mean of {len(cells_of)} | {row} | {' | '.join(shown)} | |")
    return lines


def _beside(ours: float | None, number: float | None) -> str:
    return ("" if ours is None else f"{100 * ours:.1f}") + ("" if number is None else f" ({number:.1f})")


@click.command()
@click.option("--root", type=click.Path(path_type=Path, file_okay=False, exists=True), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Path of the results without suffix.")
@click.option("--clip", default="ViT-B-32", show_default=True, help="The paper's CLIP, or another.")
@click.option("--pretrained", default="openai", show_default=True, help='Its weights; "" for vilu-tiny.')
@click.option("--epochs", type=click.IntRange(1), help="Train every head for so many epochs only, to try the script.")
def main(root: Path, output: Path, clip: str, pretrained: str, epochs: int | None) -> None:
    """Compute every table of the paper that the data below --root allow."""
    if not output.parent.is_dir():
        raise click.BadParameter(f"{output.parent}: no such folder", param_hint="--output")
    try:
        document = run(root, output.with_name(f"{output.name}.json"), (clip, pretrained or None), epochs)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    text = markdown(document)
    atomic.write(output.with_name(f"{output.name}.md"), text.encode())
    click.echo(text)


if __name__ == "__main__":
    main()
