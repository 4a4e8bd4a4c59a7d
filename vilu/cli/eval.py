"""`vilu eval` compares every method on one or several data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from vilu.cli import output as said
from vilu.cli.command import Command
from vilu.cli.held_out import held_out
from vilu.cli.options import (
    PATH,
    FloatRange,
    check_stages,
    clip_options,
    column_options,
    drop_known_option,
    dtype_option,
    refuse_options,
    stages_argument,
)
from vilu.cli.progress import progress_bar
from vilu.cli.reader import Reader
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.data import Source
    from vilu.evaluation.evaluate import Case
    from vilu.evaluation.learning_curve import LearningCurve
    from vilu.evaluation.outside import Outside

T = TypeVar("T")
Named = tuple[str, "str | Path"]  # ("data", "dataset" or "embeddings", its name or path)
SMALLEST, GROWTH = 200, 2  # a learning curve has 200, 400, ... and all images
CASCADE_OPTIONS = (
    "cascade", "margin", "data", "datasets", "root", "image_column", "caption_column", "split", "drop_known", "output",
    "resamples", "seed", "cache", "dtype", "as_json",
)  # fmt: skip
CURVE_RESAMPLES = 400  # the most for a learning curve, which resamples for every size and seed


@click.command("eval", cls=Command, extra="train")
@stages_argument
@click.option(
    "--cascade",
    is_flag=True,
    help="Compare cascades instead: name a checkpoint for each stage, the smallest CLIP first. Accuracy is drawn "
    "against cost for cascades by P(failure), by MCM, by entropy and at random, and for each CLIP alone.",
)
@click.option(
    "--margin",
    type=FloatRange(0, 1, max_open=True),
    default=0.005,
    show_default=True,
    help="Accuracy that a cascade may lose against its last stage alone, a fraction: costs are compared there.",
)
@click.option(
    "--ckpt",
    "ckpts",
    type=PATH,
    multiple=True,
    help="Checkpoint to evaluate. Give one for all test sets, or one for each.",
)
@click.option("--data", multiple=True, help="Image folder, caption table or shards to test on. Repeat it for several.")
@click.option(
    "--dataset", "datasets", multiple=True, help="Named data set to test on, such as digits. Repeat it for several."
)
@click.option(
    "--embeddings",
    type=PATH,
    multiple=True,
    help="File of embeddings to test on (.npz, .safetensors, .parquet). Repeat it for several.",
)
@click.option("--root", type=PATH, help="Folder that holds the named data sets.")
@column_options
@click.option("--split", default="test", show_default=True, help="Split of the data to test on: train, val or test.")
@drop_known_option
@click.option(
    "--train-data",
    multiple=True,
    help="Image folder, caption table or shards to fit the baselines on. Give one for all test sets, or one for each.",
)
@click.option(
    "--train-dataset",
    "train_datasets",
    multiple=True,
    help="Named data set to fit the baselines on.  [default: the train split of each --dataset]",
)
@click.option("--train-embeddings", type=PATH, multiple=True, help="File of embeddings to fit the baselines on.")
@click.option(
    "--outside-data",
    multiple=True,
    help="Image folder, table or shards that show none of the classes: also tell how well each score sets them apart.",
)
@click.option(
    "--outside-dataset", "outside_datasets", multiple=True, help="Named data set that shows none of the classes."
)
@click.option(
    "--outside-embeddings", type=PATH, multiple=True, help="File of embeddings that show none of the classes."
)
@click.option(
    "--cross-dataset", is_flag=True, help="Allow test sets with other classes than the checkpoint was trained on."
)
@click.option(
    "--methods", default="all", show_default=True, help="Names of the methods to compare, separated by commas."
)
@click.option("--output", type=PATH, help="Folder to write the report to: report.html, JSON, CSV and pictures.")
@click.option(
    "--samples",
    "samples_format",
    type=click.Choice(["csv", "parquet", "none"]),
    default="csv",
    show_default=True,
    help="Format of the report's file with every image's scores.",
)
@click.option("--candidates", help="Numbers of candidates per group of captions.  [default: 128,256,...,8192]")
@click.option(
    "--learning-curve",
    "curve",
    is_flag=True,
    help="Also train heads on growing parts of the train data. This is slow.",
)
@click.option("--sizes", help="Numbers of images on the learning curve.  [default: 200,400,... and all]")
@click.option(
    "--curve-seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of seeds per size of the learning curve.",
)
@click.option(
    "--recipe", default="default", show_default=True, help="Recipe of the learning curve's heads, as in `vilu train`."
)
@click.option(
    "--resamples", type=click.IntRange(1), default=1000, show_default=True, help="Number of bootstrap resamples."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the bootstrap.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that keeps the embeddings.  [default: they are not kept]",
)
@dtype_option("float16")
@clip_options
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of tables.")
def eval_command(
    stages: tuple[Path, ...],
    cascade: bool,
    margin: float,
    ckpts: tuple[Path, ...],
    data: tuple[str, ...],
    datasets: tuple[str, ...],
    embeddings: tuple[Path, ...],
    root: Path | None,
    image_column: str,
    caption_column: str,
    split: str,
    drop_known: bool,
    train_data: tuple[str, ...],
    train_datasets: tuple[str, ...],
    train_embeddings: tuple[Path, ...],
    outside_data: tuple[str, ...],
    outside_datasets: tuple[str, ...],
    outside_embeddings: tuple[Path, ...],
    cross_dataset: bool,
    methods: str,
    output: Path | None,
    samples_format: str,
    candidates: str | None,
    curve: bool,
    sizes: str | None,
    curve_seeds: int,
    recipe: str,
    resamples: int,
    seed: int,
    cache: Path | None,
    dtype: str,
    clip_name: str | None,
    pretrained: str | None,
    as_json: bool,
) -> None:
    """Compare ViLU with every baseline, with intervals and p-values.

    The metrics are AUC, FPR95, risk and calibration. Baselines that learn are fitted on the train data; without it
    their rows say so. Several test sets are taken in the order --data, --dataset, --embeddings, and so are several
    train sets.

    With --cascade it compares cascades of CLIPs on one data set: accuracy against cost, in multiply-adds and in
    measured milliseconds.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    if cascade:
        from vilu.cli.cascade import compare
        from vilu.data import open_source

        check_stages(() if ckpts else stages, cascade)
        refuse_options("has no meaning beside --cascade", *CASCADE_OPTIONS, others=True)
        if len((*data, *datasets)) != 1:
            raise UserError("--cascade takes one data set, --data or --dataset")
        source = open_source(
            data[0] if data else None,
            dataset=datasets[0] if datasets else None,
            root=root,
            split=split,
            cache=cache,
            **columns,
        )
        compare(
            stages,
            source,
            cache,
            dtype,
            drop_known=drop_known,
            margin=margin,
            resamples=resamples,
            seed=seed,
            output=output,
            as_json=as_json,
        )
        return
    check_stages(stages, cascade)
    refuse_options("is for --cascade", "margin")
    if not ckpts:
        raise UserError("give --ckpt")
    from vilu.checkpoint import check_fits, load_checkpoint
    from vilu.data.splits import check_split
    from vilu.evaluation.evaluate import CANDIDATES, Case, evaluate, unique_names
    from vilu.evaluation.outside import evaluate_outside
    from vilu.evaluation.report import tables as report
    from vilu.evaluation.report.samples import samples_of
    from vilu.fingerprints import remembered
    from vilu.recipes import recipe_named
    from vilu.scores import SCORES

    chosen = choose_methods(methods, tuple(SCORES))
    groups = whole_numbers("--candidates", candidates, 2) or CANDIDATES
    parts = whole_numbers("--sizes", sizes, 1)
    if curve:
        recipe_named(recipe)
    if output is not None:
        report.check_output(output)
    tests = _named_sets(data, datasets, embeddings)
    trains: list[Named | None] = [*_named_sets(train_data, train_datasets, train_embeddings)]
    if not tests:
        raise UserError("nothing to test on: give --data, --dataset or --embeddings")
    outsiders = _named_sets(outside_data, outside_datasets, outside_embeddings)
    outside: list[Outside] = []
    own_train = not trains
    if own_train:
        trains = [named if named[0] == "dataset" else None for named in tests]
    checkpoints = one_each([load_checkpoint(path) for path in ckpts], len(tests), "--ckpt")
    cases: list[Case] = []
    lines: list[str] = []
    sources: list[Source | None] = []
    curves: dict[str, LearningCurve] = {}
    with progress_bar() as bar:
        reader = Reader(root, cache, dtype, "BayesVLM" in chosen, clip_name, pretrained, bar, columns)
        for test_of, train_of, checkpoint, path in zip(
            tests,
            one_each(trains, len(tests), "train sets"),
            checkpoints,
            one_each(list(ckpts), len(tests), "--ckpt"),
            strict=True,
        ):
            test = reader.read(*test_of, check_split(split), checkpoint, path)
            train = None if train_of is None else reader.read(*train_of, "train", checkpoint, path)
            other = not own_train and train is not None and train.class_names != test.class_names
            check_fits(
                path,
                checkpoint,
                test,
                same_classes=not (cross_dataset or other),
                hint="; give --cross-dataset if that is meant",
            )
            trained = {} if checkpoint.samples is None else {f"{path}: was trained": checkpoint.samples}
            if train is not None:
                trained["the baselines are fitted"] = remembered(train.image.normalised)
            sources.append(reader.sources.get(id(test)))  # before some of its images are left out
            test, known, found = held_out(test, trained, drop_known)
            if known:
                found[-1] += ": no method is called better than another (--drop-known leaves these samples out)"
                if curve:
                    raise UserError(f"--learning-curve: {found[-1]}")
            lines += found
            cases.append(Case(test, train, checkpoint.head, known))
            for named in outsiders:
                one = evaluate_outside(
                    test,
                    reader.read(*named, "test", checkpoint, path),
                    checkpoint.head,
                    checkpoint.threshold,
                    checkpoint.outlier,
                    resamples=resamples,
                    seed=seed,
                )
                outside.append(one)
        evaluation = evaluate(cases, chosen, candidates=groups, resamples=resamples, seed=seed, progress=bar)
        if curve:
            for case, name in zip(cases, unique_names(cases), strict=True):
                curves[name] = draw_curve(
                    case,
                    parts,
                    range(seed, seed + curve_seeds),
                    recipe,
                    resamples=min(resamples, CURVE_RESAMPLES),
                    progress=bar,
                )
        evaluation = replace(
            evaluation,
            curves=curves,
            settings={
                "checkpoint": ", ".join(map(str, ckpts)),
                "test": ", ".join(str(name) for _, name in tests),
                "train": ", ".join(str(of[1]) for of in trains if of) or "none",
                "CLIP": ", ".join(sorted(reader.clips)) or "embeddings made elsewhere",
                "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            },
        )
        if output is not None:
            bar("drawing", 0, 1)
            samples = {
                result.name: samples_of(case.test, result, checkpoint.threshold, source)
                for result, case, checkpoint, source in zip(
                    evaluation.results, cases, checkpoints, sources, strict=True
                )
            }
            report.write(evaluation, output, samples=samples, kind=samples_format)
    for line in [*(f"skipped {line}" for line in reader.skipped), *lines]:
        said.note(line)
    if as_json:
        document = report.as_json(evaluation)
        if outsiders:
            document["outside"] = [asdict(found) for found in outside]
        said.result(json.dumps(document, allow_nan=False))
        return
    from vilu.cli.tables import print_outside, print_tables, wide_console

    console = wide_console()
    print_tables(evaluation, console)
    print_outside(outside, console)
    if output is not None:
        said.result(f"{output / report.HTML}")


def _named_sets(data: Sequence[str], datasets: Sequence[str], embeddings: Sequence[Path]) -> list[Named]:
    sets: list[Named] = [("data", name) for name in data]
    sets += [("dataset", name) for name in datasets]
    sets += [("embeddings", path) for path in embeddings]
    return sets


def choose_methods(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the methods that --methods names. Upper and lower case are the same.

    Raises:
        UserError: the text names no method, or an unknown one.
    """
    if text.strip().lower() == "all":
        return tuple(known)
    from difflib import get_close_matches

    by_name = {name.lower(): name for name in known}
    found = []
    for name in filter(None, map(str.strip, text.split(","))):
        if name.lower() not in by_name:
            near = get_close_matches(name.lower(), by_name, n=3, cutoff=0.5)
            hint = f"near: {', '.join(by_name[n] for n in near)}" if near else f"known: {', '.join(known)}"
            raise UserError(f"--methods: unknown method {name!r}; {hint}")
        found.append(by_name[name.lower()])
    if not found:
        raise UserError("--methods: names no method")
    return tuple(dict.fromkeys(found))


def whole_numbers(option: str, text: str | None, least: int) -> tuple[int, ...]:
    """Read the numbers in a text such as "128,256"; None gives no numbers. Raises UserError for other text."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and len(part) < 12 and int(part) >= least for part in parts):
        raise UserError(f"{option}: expected whole numbers from {least} up, separated by commas, got {text!r}")
    return tuple(int(part) for part in parts)


def one_each(given: list[T], sets: int, what: str) -> list[T]:
    """Return one value per test set from one value for all or one for each. Raises UserError for another count."""
    if len(given) not in (1, sets):
        raise UserError(f"{what}: {len(given)} given for {sets} test sets; give one for all, or one each")
    return given * sets if len(given) == 1 else given


def draw_curve(
    case: Case,
    sizes: Sequence[int],
    seeds: Sequence[int],
    recipe: str,
    *,
    resamples: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> LearningCurve:
    """Draw the learning curve of heads that a recipe trains, as `vilu train` does.

    Args:
        case: training and test data.
        sizes: numbers of training images; an empty list stands for 200, 400, ... and all.
        seeds: seeds of the trainings.
        recipe: name of the recipe.
        resamples: number of bootstrap resamples.
        progress: called with (what, done, total).

    Raises:
        UserError: the case has no training data.
    """
    from vilu.evaluation.learning_curve import learning_curve
    from vilu.recipes import recipe_named
    from vilu.train import fit

    if case.train is None:
        raise UserError(f"--learning-curve: {case.test.name} has no train data; give --train-data or the like")
    largest = len(case.train)
    if not sizes:
        grown = [SMALLEST]
        while grown[-1] < largest:
            grown.append(grown[-1] * GROWTH)
        sizes = [*(size for size in grown if size < largest), largest]
    return learning_curve(
        case.train,
        case.test,
        sizes,
        seeds,
        lambda part, seed: fit(part, recipe_named(recipe, seed=seed)).head,
        resamples=resamples,
        seed=seeds[0],
        progress=progress,
    )
