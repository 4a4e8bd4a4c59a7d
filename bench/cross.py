"""How much of a head's gain over MCM stays on classes that it was not trained on: `python bench/cross.py FILE [FILE2]`.

The files are embeddings as `vilu train --embeddings` reads them. With one file, half of its classes (drawn by a seed)
are the old set and the other half the new one; with two files, the first is the old set. Half of the new set's images
are the test images. The other half are labelled images of the new set, of which a few, or all, are used. Each set has
only its own classes as candidates. The rows:

    MCM                no training
    old, linear        the default recipe's linear start, fitted on the old set
    old, default       the default recipe, trained on the old set (--heads)
    N new, linear      the linear start, fitted on N labelled images of the new set alone
    old + N new        the linear start, fitted on both, each image weighing alike
    old + N new, even  the same, the N images weighted so that the sets weigh alike
    all new, linear    the linear start, fitted on all labelled images of the new set
    all new, default   the default recipe, trained on these (--heads)

"kept" is the share of the gain of "all new, linear" over MCM. Prints a table; --output writes it as JSON as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from vilu import ViLUHead
from vilu.data import load_embeddings
from vilu.embeddings import EmbeddedSet
from vilu.errors import UserError
from vilu.evaluation.metrics import auroc
from vilu.recipes import Recipe
from vilu.train import fit
from vilu.training.batches import clip_answers, make_batch
from vilu.training.linear import Classes, Linear, fit_linear
from vilu.training.loss import failure_weights, head_columns


class Answers(NamedTuple):
    """What a linear start reads of N images: log-odds (N,), columns (N, D) by part, CLIP's mistakes (N,), the classes.

    probability: (K,) the mean of CLIP's probabilities.
    """

    odds: Tensor
    columns: dict[str, Tensor]
    wrong: Tensor
    predicted: Tensor
    text: Tensor
    probability: Tensor

    def some(self, rows: Tensor) -> Answers:
        return self._replace(
            odds=self.odds[rows],
            columns={part: c[rows] for part, c in self.columns.items()},
            wrong=self.wrong[rows],
            predicted=self.predicted[rows],
        )


def answers_of(data: EmbeddedSet) -> Answers:
    recipe, data = Recipe(), replace(data, text=data.text.float())
    found = clip_answers(data, recipe)
    assert found is not None
    batch = make_batch(data, found, torch.arange(len(data)), recipe)
    columns = head_columns(ViLUHead(data.text.normalised.shape[1], projection="identity"), batch)
    text, probability = data.text.normalised, found.mass / len(data)
    return Answers(found.log_odds, columns, found.wrong, found.predicted, text, probability)


def linear(parts: Sequence[Answers], seed: int, even: bool = False) -> Linear:
    """The linear start of the default recipe on one or several sets; `even`: the sets weigh alike."""
    total = sum(len(part.odds) for part in parts)
    weights = [
        failure_weights(part.wrong, None) * (total / len(parts) / len(part.odds) if even else 1.0) for part in parts
    ]
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    odds, wrong = torch.cat([part.odds for part in parts]), torch.cat([part.wrong for part in parts])
    predicted, masses, known = [], [], 0
    for part in parts:
        answered = torch.bincount(part.predicted, minlength=len(part.text))
        masses.append(answered + len(part.odds) * part.probability)
        predicted.append(part.predicted + known)
        known += len(part.text)
    classes = Classes(torch.cat(predicted), torch.cat([part.text for part in parts]), torch.cat(masses))
    return fit_linear(odds, columns, wrong, torch.cat(weights), seed, classes)


def confidence(found: Linear, answers: Answers) -> np.ndarray:
    logit = found.slope * answers.odds
    if len(found.weight):
        logit = logit + torch.cat([*answers.columns.values()], dim=1) @ found.weight
    return -logit.double().numpy()


def of_classes(data: EmbeddedSet, classes: Tensor) -> EmbeddedSet:
    """The images of some classes, with these classes as the candidates."""
    assert data.labels is not None
    place = torch.full((len(data.text),), -1)
    place[classes] = torch.arange(len(classes))
    rows = (place[data.labels] >= 0).nonzero().squeeze(1)
    names = tuple(data.class_names[int(i)] for i in classes) if data.class_names else ()
    return replace(
        data,
        image=data.image[rows],
        labels=place[data.labels[rows]],
        text=data.text[classes],
        class_names=names,
    )


def run(old: EmbeddedSet, new: EmbeddedSet, few: Sequence[int], seed: int, heads: bool) -> dict[str, float]:
    """The AUC of each row on the test half of the new set."""
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))
    labelled, test = new[order[: len(new) // 2]], new[order[len(new) // 2 :]]
    of_old, of_new, of_test = answers_of(old), answers_of(labelled), answers_of(test)
    right = ~of_test.wrong.numpy()
    found = {"MCM": auroc(-of_test.odds.double().numpy(), right)}

    def add(name: str, parts: Sequence[Answers], even: bool = False) -> None:
        found[name] = auroc(confidence(linear(parts, seed, even), of_test), right)

    def add_head(name: str, train: EmbeddedSet) -> None:
        head = fit(train, Recipe(seed=seed)).head
        with torch.no_grad():
            logit = head(test.image.normalised.float(), test.text.normalised.float())
        found[name] = auroc(-logit.double().numpy(), right)

    add("old, linear", [of_old])
    if heads:
        add_head("old, default", old)
    for count in few:
        some = of_new.some(torch.arange(min(count, len(labelled))))
        if some.wrong.any() and not some.wrong.all():
            add(f"{count} new, linear", [some])
            add(f"old + {count} new", [of_old, some])
            add(f"old + {count} new, even", [of_old, some], even=True)
    add("all new, linear", [of_new])
    if heads:
        add_head("all new, default", labelled)
    return found


def table(runs: Sequence[dict[str, float]]) -> list[dict[str, float | str | None]]:
    """A row a method: its mean AUC over the runs that have it, the gain over MCM in the same runs, and what is kept."""
    rows: list[dict[str, float | str | None]] = []
    for name in max(runs, key=len):  # a run leaves out what it could not fit
        have = [one for one in runs if name in one]
        gain = float(np.mean([one[name] - one["MCM"] for one in have]))
        whole = float(np.mean([one["all new, linear"] - one["MCM"] for one in have]))
        kept = gain / whole if whole > 0 and name != "MCM" else None
        rows.append({"row": name, "auc": float(np.mean([o[name] for o in have])), "gain": gain, "kept": kept})
    return rows


def cut(files: Sequence[EmbeddedSet], seed: int) -> tuple[EmbeddedSet, EmbeddedSet]:
    """The old and the new set."""
    if len(files) == 2:
        return files[0], files[1]
    data = files[0]
    if data.labels is None:
        raise UserError(f"{data.name}: captions have no classes to cut into an old and a new set")
    present = torch.unique(data.labels)
    if len(present) < 4:
        raise UserError(f"{data.name}: {len(present)} classes are too few to cut into an old and a new set")
    order = present[torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))]
    return of_classes(data, order[: len(order) // 2]), of_classes(data, order[len(order) // 2 :])


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--few", default="20,50,100", show_default=True, help="Numbers of labelled images of the new set.")
@click.option("--splits", default=4, show_default=True, type=click.IntRange(1), help="Number of random cuts.")
@click.option("--heads", is_flag=True, help="Also train heads with the default recipe. This takes minutes.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
def main(files: tuple[Path, ...], few: str, splits: int, heads: bool, output: Path | None) -> None:
    """Measure how much of a head's gain over MCM stays on other classes."""
    if len(files) > 2:
        raise click.UsageError("one or two files, please")
    counts = [int(part) for part in few.split(",") if part.strip()]
    try:
        sets = [load_embeddings(path) for path in files]
        runs = [run(*cut(sets, seed), counts, seed, heads) for seed in range(splits)]
    except UserError as error:
        raise click.ClickException(str(error)) from None
    rows = table(runs)
    click.echo(
        f"{' -> '.join(s.name for s in sets)}, {splits} splits\n\n| | AUC | over MCM | kept |\n|---|---|---|---|"
    )
    for row in rows:
        kept = "" if row["kept"] is None else f"{row['kept']:.0%}"
        click.echo(f"| {row['row']} | {row['auc']:.4f} | {row['gain']:+.4f} | {kept} |")
    if output is not None:
        output.write_text(json.dumps({"files": [s.name for s in sets], "splits": splits, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
