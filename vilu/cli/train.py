"""`vilu train`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli.options import clip_options, data_options
from vilu.cli.progress import progress_bar
from vilu.errors import UserError
from vilu.recipes import FORMS, LOSSES, OPTIMIZERS, RECIPES, Recipe, recipe_named

if TYPE_CHECKING:
    from torch import Tensor

    from vilu.clip import Clip
    from vilu.data import Source
    from vilu.embeddings import EmbeddedSet
    from vilu.train import Validation

# Options that replace one setting of the recipe: name, type, help.
_SETTINGS: tuple[tuple[str, Any, str], ...] = (
    ("epochs", click.IntRange(1), "Passes over the training data."),
    ("batch_size", click.IntRange(2), "Samples a step; among captions also the number of candidates."),
    ("learning_rate", float, "At its highest."),
    ("weight_decay", float, "Of the optimizer."),
    ("optimizer", click.Choice(OPTIMIZERS), ""),
    ("form", click.Choice(FORMS), "Projections and attention scale as the authors' code or the paper has them."),
    ("loss", click.Choice(LOSSES), "Weighted cross-entropy, or weighted squared error to p[true class]."),
    ("failure_weight", float, "Static weight of wrong samples, instead of the adaptive one."),
    ("freeze_steps", click.IntRange(0), "Train the projections after so many steps."),
    ("validation", click.FloatRange(0, 1, max_open=True), "Share cut from the training data to choose the epoch."),
    ("patience", click.IntRange(1), "Stop after so many epochs that were not better."),
)


def _setting_options(command: Any) -> Any:
    for name, kind, text in reversed(_SETTINGS):
        command = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=text)(command)
    return command


@click.command("train")
@data_options
@click.option("--embeddings", type=click.Path(path_type=Path), help="Embeddings made elsewhere, instead of images.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Checkpoint to write (.safetensors).")
@clip_options
@click.option("--template", "templates", multiple=True, help="Prompt with one {}; repeat for several.")
@click.option("--recipe", "recipe_name", type=click.Choice(list(RECIPES)), default="default", show_default=True)
@_setting_options
@click.option("--parts", help="What the MLP sees.  [default: image,predicted,attended]")
@click.option("--prior/--no-prior", default=None, help="Start from CLIP's own confidence.  [default: the recipe's]")
@click.option("--no-cache", is_flag=True, help="Embed augmented images anew in every epoch, as the authors do; slow.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Folder for TensorBoard's event files.")
@click.option(
    "--estimate/--no-estimate",
    default=True,
    help="Where the head is not better than MCM: of how many "
    "images that takes. Trains on three parts of the data.  [default: --estimate]",
)
@click.option("--seed", type=int, default=0, show_default=True)
def train_command(
    data: str | None,
    dataset: str | None,
    root: Path | None,
    cache: Path,
    embeddings: Path | None,
    output: Path,
    clip_name: str | None,
    pretrained: str | None,
    templates: tuple[str, ...],
    recipe_name: str,
    parts: str | None,
    prior: bool | None,
    no_cache: bool,
    dtype: str,
    tensorboard: Path | None,
    estimate: bool,
    seed: int,
    **settings: Any,
) -> None:
    """Train a ViLU head on labelled or captioned images; CLIP itself is not changed.

    A killed run continues where it was when it is called again. Writes OUTPUT, the epoch that was best on
    samples cut from the training data, and OUTPUT's .last.safetensors. Several GPUs: torchrun -m vilu train ...
    """
    from vilu.checkpoint import Checkpoint, ClipSpec, save_checkpoint
    from vilu.class_set import DEFAULT_TEMPLATES, ClassSet
    from vilu.clip import load_clip
    from vilu.data import embed, load_embeddings, open_source
    from vilu.train import fit

    changes = {name: value for name, value in settings.items() if value is not None} | {"seed": seed}
    if parts is not None:
        changes["parts"] = tuple(filter(None, map(str.strip, parts.split(","))))
    if prior is not None:
        changes["prior"] = prior
    recipe = recipe_named(recipe_name, **changes)
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"{output}: {'is a folder' if output.is_dir() else 'its folder does not exist'}")
    prompts = templates or DEFAULT_TEMPLATES
    spec: ClipSpec | None = None
    augmented = None
    with _processes() as (rank, turn), progress_bar(rank == 0) as bar:
        if embeddings is not None:
            if data or dataset or no_cache or clip_name or pretrained:
                raise UserError("--embeddings takes the place of --data, --dataset, --clip and --no-cache")
            train = load_embeddings(embeddings)
        else:
            source = open_source(data, dataset=dataset, root=root, split="train", cache=cache)
            clip = load_clip(clip_name or "vilu-tiny", pretrained)
            spec = clip.spec
            with turn:  # the first process fills the cache, the others read it
                train = embed(source, clip, cache=cache, dtype=dtype, templates=prompts, progress=bar)
            if no_cache:
                augmented = _augmented(source, train, clip, seed)
        with _board(tensorboard if rank == 0 else None) as log:
            trained = fit(
                train,
                recipe,
                state=None if no_cache else output.with_name(f".{output.name}.state"),
                progress=lambda done, total: bar("training", done, total),
                log=log,
                augmented=augmented,
            )
    if rank != 0:
        return
    class_set = None
    if train.class_names:
        class_set = ClassSet(train.class_names, tuple(prompts), train.text.normalised.float())
    meta = {
        "data": train.name,
        "samples": len(train),
        "skipped": len(train.skipped),
        "recipe": {"name": recipe_name, **asdict(recipe)},
        "best_epoch": trained.best_epoch,
        "validation": asdict(trained.validation) if trained.validation else None,
    }
    for line in train.skipped:
        click.echo(f"skipped {line}", err=True)
    last = output.with_name(f"{output.name.removesuffix('.safetensors')}.last.safetensors")
    for path, head in ((last, trained.last), (output, trained.head)):
        save_checkpoint(Checkpoint(head, spec, class_set, meta=meta), path)
    kind = "captioned images" if train.captions else f"images of {len(train.text)} classes"
    left_out = f" ({len(train.skipped)} could not be read)" if train.skipped else ""
    epochs = f"epoch {trained.best_epoch} of {len(trained.history) - 1}"
    click.echo(f"{output}: trained on {len(train)} {kind}{left_out}, {epochs}")
    click.echo(verdict(trained.validation))
    if estimate and trained.validation is not None and not trained.validation.better:
        with progress_bar() as bar:
            click.echo(f"how many it takes, by a learning curve over parts of this data: {_needed(train, recipe, bar)}")


def verdict(validation: Validation | None) -> str:
    """The head beside MCM in words: whether it is worth having."""
    if validation is None:
        return "validation: none, or CLIP is always right or always wrong on it: nothing says that this head helps"
    v = validation
    line = (
        f"validation, {v.samples} images, {v.failures} failures: AUC {v.auc:.1%} (MCM {v.mcm_auc:.1%}, p = "
        f"{v.p_value:.3f}), FPR95 {v.fpr95:.1%} (MCM {v.mcm_fpr95:.1%})"
    )
    if v.better:
        return line
    said = "significantly WORSE" if v.worse else "not significantly better"
    return (
        f"{line}\nthis head is {said} than the free MCM score here: train on more images "
        "(`vilu eval --learning-curve` draws what they bring)"
    )


CURVE_SHARES = (0.175, 0.35, 0.7)  # of the training data; what is left is tested on


def _needed(train: EmbeddedSet, recipe: Recipe, progress: Callable[[str, int, int], None]) -> str:
    """In words, the number of training images from which a head of this recipe would beat MCM."""
    import torch

    from vilu.evaluation.learning_curve import learning_curve
    from vilu.train import fit

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))
    sizes = [int(share * len(train)) for share in CURVE_SHARES]
    try:
        curve = learning_curve(
            train[order[: sizes[-1]]],
            train[order[sizes[-1] :]],
            sizes,
            [recipe.seed],
            lambda part, seed: fit(part, replace(recipe, seed=seed)).head,
            progress=progress,
        )
    except UserError as error:
        return f"cannot tell: {error}"
    return curve.needed.text


def _augmented(source: Source, train: EmbeddedSet, clip: Clip, seed: int) -> Callable[[Tensor, int], Tensor]:
    """Embeddings of freshly augmented images, by row of `train` and epoch."""
    import numpy as np
    import torch

    from vilu.data import augment, batches

    def embed_rows(rows: Tensor, epoch: int) -> Tensor:
        places = rows if train.rows is None else train.rows[rows]
        transform = augment(clip.transform.size, np.random.default_rng([seed, epoch]))
        found = []
        with torch.no_grad():  # inside the loop, so that decoding runs ahead of the tower
            for _, pixels in batches(source, transform, places.tolist(), 64):
                found.append(clip.encode_pixels(torch.from_numpy(pixels)))
        if sum(map(len, found)) != len(rows):
            raise UserError(f"{source.name}: an image that could be read before cannot be read any more")
        return torch.cat(found)

    return embed_rows


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, contextlib.AbstractContextManager[None]]]:
    """(rank, a context that the first process leaves before the others enter), under torchrun or alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield 0, contextlib.nullcontext()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        if dist.get_rank() != 0:
            dist.barrier()
        yield
        if dist.get_rank() == 0:
            dist.barrier()

    try:
        yield dist.get_rank(), turn()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _board(folder: Path | None) -> Iterator[Callable[[dict[str, float]], None] | None]:
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None

    def log(figures: dict[str, float]) -> None:
        for name, value in figures.items():
            if name != "epoch":
                writer.add_scalar(name, value, int(figures["epoch"]))

    try:
        yield log
    finally:
        writer.close()
