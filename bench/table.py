"""The table of results on the embedded default: `python bench/table.py --output bench/results/table`, or `make table`.

Every method of `vilu.scores` on digits and shapes (closed set) and on shapes-captions (caption mode), and the paper's
ablation: heads that see parts of what ViLU sees, without the prior (recipe "plain"). A seed changes each head's first
weights, order and validation cut, and those of every baseline that is trained; the test images are the same. All are
trained on the train split; nothing is chosen on the test split.
Writes OUTPUT.json (rows, means, versions, commit, machine), OUTPUT.md and OUTPUT.png. Data sets that are not asked for
keep what OUTPUT.json holds of them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import platform
import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import origin, write_results
from bench.table_report import METRICS, PARTS, WHOLE, draw, markdown
from vilu import ViLUHead, load_clip
from vilu.cli.progress import progress_bar
from vilu.data import embed, open_source
from vilu.data.cache import default_cache
from vilu.data.pipeline import cores
from vilu.embeddings import EmbeddedSet
from vilu.errors import UserError
from vilu.evaluation.bootstrap import INDEX, comparison, interval
from vilu.evaluation.evaluate import OURS, Case, Evaluation, Result, evaluate, group_sizes, headline
from vilu.recipes import Recipe, recipe_named
from vilu.scores import SCORES, Score, ViLU
from vilu.train import fit

DATASETS = ("digits", "shapes", "shapes-captions")
CANDIDATES = (128, 512, 1024, 4096)  # captions in a group; 1,024 is the table's
LEVEL = 0.95
TRIED = {"epochs": 4, "min_steps": 0}  # --quick
Progress = Callable[[str, int, int], None]


def recipe(name: str, train: EmbeddedSet, candidates: int | None, seed: int, **changes: Any) -> Recipe:
    """A recipe of `vilu.recipes`; among captions a batch is as large as the groups of the test."""
    if train.captions and candidates:
        changes["batch_size"] = min(candidates, len(train) // 2)
    return recipe_named(name, seed=seed, **changes)


def factories(
    train: EmbeddedSet, candidates: int | None, seed: int, heads: Mapping[str, ViLUHead], **changes: Any
) -> dict[str, Callable[..., Score]]:
    """All of SCORES with this seed (and, among captions, the same number of candidates), and a score for each head."""

    def seeded(build: Callable[..., Score]) -> Callable[[], Score]:
        def built() -> Score:
            score = build()
            training = getattr(score, "training", None)
            if training is not None:
                ranked = score.name.startswith(("LVU", "ConfidNet"))  # those with the group's answers as target
                size = {"batch_size": min(candidates, len(train) // 2)} if candidates and ranked else {}
                score.training = replace(training, seed=seed, **size, **changes)  # type: ignore[attr-defined]
            return score

        return built

    found = {name: build if name == OURS else seeded(build) for name, build in SCORES.items()}
    return found | {name: partial(ViLU, head) for name, head in heads.items()}


def run_seed(
    train: EmbeddedSet,
    test: EmbeddedSet,
    seed: int,
    *,
    candidates: Sequence[int] = CANDIDATES,
    resamples: int = 1000,
    quick: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Train all there is with one seed and evaluate it; the rows are SCORES, then PARTS."""
    groups = headline(group_sizes(test, candidates))
    tried = TRIED if quick else {}
    wanted = [(OURS, "default", None), *((name, "plain", parts) for name, parts in PARTS.items())]
    heads = {}
    say: Progress = progress or (lambda what, done, total: None)
    for name, of, parts in wanted:
        settings = recipe(of, train, groups, seed, parts=parts, **tried)
        heads[name] = fit(train, settings, progress=partial(say, f"{test.name}: head {name}")).head
    ours = heads.pop(OURS)
    built = factories(train, groups, seed, heads, **({"epochs": TRIED["epochs"]} if quick else {}))
    return evaluate(
        [Case(test, train, ours)],
        [*SCORES, *PARTS],
        candidates=candidates,
        resamples=resamples,
        level=LEVEL,
        factories=built,
        progress=progress,
    )


def swept(evaluation: Evaluation) -> tuple[Result, ...]:
    """The one result of a closed set, or those over K."""
    return next(iter(evaluation.sweeps.values()), evaluation.results)


def rows(evaluation: Evaluation, seed: int) -> list[dict[str, Any]]:
    """One a method and K: each metric's value and interval, or the reason why there is none."""
    found = []
    for result in swept(evaluation):
        for row in result.rows:
            found.append(
                {
                    "dataset": result.name,
                    "mode": "captions" if result.captions else "closed set",
                    "candidates": result.candidates,
                    "method": row.method,
                    "seed": seed,
                    **{key: asdict(row.cells[key]) for key in METRICS if key in row.cells},
                    **({"reason": row.reason} if row.reason else {}),
                }
            )
    return found


def means(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One a method and K: over the seeds mean, sd, and ViLU's lead (of PARTS: the whole head's) with its p-value.

    The seeds share their bootstrap draws, so a draw of the mean over seeds is the mean of one draw from each: interval
    and p-value tell what other test images would change, sd what other seeds change.
    """
    found = []
    for results in zip(*map(swept, evaluations), strict=True):
        first = results[0]
        cells = [{row.method: row.cells for row in result.rows} for result in results]
        values = {
            method: {key: np.array([cell[method][key].value for cell in cells]) for key in METRICS}
            for method in cells[0]
            if all(set(METRICS) <= set(cell[method]) for cell in cells)
        }
        drawn = {method: np.mean([result.draws[method] for result in results], axis=0) for method in values}
        for method, columns in values.items():
            row: dict[str, Any] = {
                "dataset": first.name,
                "mode": "captions" if first.captions else "closed set",
                "candidates": first.candidates,
                "method": method,
                "seeds": len(results),
            }
            rival = WHOLE if method in PARTS else OURS
            for key, per_seed in columns.items():
                at = drawn[method][:, INDEX[key]]
                mean = interval(float(per_seed.mean()), at, LEVEL)
                assert mean is not None
                row[key] = {
                    "mean": mean.value,
                    "sd": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0,
                    "low": mean.low,
                    "high": mean.high,
                }
                if rival != method and rival in values:
                    lead = float((values[rival][key] - per_seed).mean())
                    compared = comparison(lead, drawn[rival][:, INDEX[key]] - at, LEVEL)
                    assert compared is not None
                    row[key]["lead"] = asdict(compared)
            found.append(row)
    return found


def read(dataset: str, quick: bool, progress: Progress | None = None) -> tuple[EmbeddedSet, EmbeddedSet]:
    """The train and the test split, from the cache where they are."""
    clip = load_clip()
    train, test = (
        embed(
            open_source(dataset=dataset, split=split),
            clip,
            cache=default_cache(),
            projection=True,
            progress=progress,
        )
        for split in ("train", "test")
    )
    return (train[slice(0, 1000)], test[slice(0, 1000)]) if quick else (train, test)


def job(dataset: str, seed: int, resamples: int, quick: bool, said: Any) -> tuple[Evaluation, float]:
    """`run_seed` in a process of its own, on one core; what it does goes to the queue `said`."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    train, test = read(dataset, quick)
    evaluation = run_seed(
        train,
        test,
        seed,
        resamples=resamples,
        quick=quick,
        progress=lambda *step: said.put((f"seed {seed}: {step[0]}", *step[1:])),
    )
    return evaluation, time.perf_counter() - started


def run(
    datasets: Sequence[str], seeds: int, resamples: int, quick: bool, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Each data set's part of OUTPUT.json; one process a core, as steps so small gain nothing from more threads."""
    about = origin() | {"machine": f"{platform.machine()}, {cores()} cores"}
    sizes = {dataset: len(read(dataset, quick, progress)[0]) for dataset in datasets}  # and the cache is full
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(cores(), context) as pool:
        said = manager.Queue()
        # The longest first, so that no core is left with one at the end.
        jobs = [(d, seed) for d in sorted(datasets, key=DATASETS.index, reverse=True) for seed in range(seeds)]
        futures = {key: pool.submit(job, *key, resamples, quick, said) for key in jobs}
        while not all(future.done() for future in futures.values()):
            done = sum(future.done() for future in futures.values())
            with contextlib.suppress(queue.Empty):
                what, at, total = said.get(timeout=0.5)
                progress(f"{done} of {len(jobs)} runs done; {what}", at, total)
            for future in futures.values():
                if future.done() and future.exception():
                    pool.shutdown(wait=False, cancel_futures=True)
                    future.result()  # raises it
        parts = {}
        for dataset in datasets:
            results = [futures[dataset, seed].result() for seed in range(seeds)]
            evaluations = [evaluation for evaluation, _ in results]
            first = evaluations[0].results[0]
            parts[dataset] = {
                **about,
                "seconds": round(sum(took for _, took in results)),
                "train": sizes[dataset],
                "test": first.samples,
                "failures": first.failures,
                "captions": first.captions,
                "candidates": first.candidates,
                "resamples": resamples,
                "means": means(evaluations),
                "rows": [row for seed, evaluation in enumerate(evaluations) for row in rows(evaluation, seed)],
            }
    return parts


@click.command()
@click.option("--datasets", default=",".join(DATASETS), show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--resamples", type=click.IntRange(1), default=1000, show_default=True, help="Bootstrap draws.")
@click.option("--quick", is_flag=True, help="Try it: one seed, 1,000 images, 4 epochs, 100 draws.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Path of the results without suffix.")
def main(datasets: str, seeds: int, resamples: int, quick: bool, output: Path) -> None:
    """Evaluate every method and the ablation on the embedded data sets."""
    chosen = [name.strip() for name in datasets.split(",")]
    unknown = [name for name in chosen if name not in DATASETS]
    if unknown:
        raise click.BadParameter(
            f"no data set {unknown[0]!r}; there are {', '.join(DATASETS)}", param_hint="--datasets"
        )
    if not output.parent.is_dir():
        raise click.BadParameter(f"{output.parent}: no such folder", param_hint="--output")
    file = output.with_name(f"{output.name}.json")
    if quick:
        seeds, resamples = 1, 100
    started = time.perf_counter()
    try:
        with progress_bar() as bar:
            made = run(chosen, seeds, resamples, quick, bar)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    # Read now: another run may have written its data sets meanwhile.
    kept = json.loads(file.read_text()) if file.exists() and len(chosen) < len(DATASETS) else {}
    parts = {dataset: {**kept, **made}[dataset] for dataset in DATASETS if dataset in {**kept, **made}}
    text = json.dumps(parts, indent=1, allow_nan=False) + "\n"
    write_results(output, {".json": text, ".md": markdown(parts), ".png": draw(parts)})
    click.echo(markdown(parts))
    click.echo(f"{output}.md, .json, .png: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
