"""`vilu train` trains a head and says whether it is better than MCM."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output as said
from vilu.cli.command import Command, RenamedOption
from vilu.cli.config import config_option
from vilu.cli.from_record import record_data_options, training_set
from vilu.cli.options import (
    PATH,
    FloatRange,
    all_of,
    data_options,
    dtype_option,
    embeddings_option,
    template_option,
    train_clip_options,
)
from vilu.cli.progress import progress_bar
from vilu.cli.verdict import clip_accuracy_on, images_needed, name_of_clip, verdict, verdict_word
from vilu.errors import UserError
from vilu.recipes import FORMS, LOSSES, OPTIMIZERS, RECIPES, recipe_named

if TYPE_CHECKING:
    from torch import Tensor

    from vilu.checkpoint import ClipSpec
    from vilu.clip import Clip
    from vilu.data import Source
    from vilu.embeddings import EmbeddedSet

# Each option replaces the recipe's setting of the same name.
_setting_options = all_of(
    click.option("--epochs", type=click.IntRange(1), help="Number of passes over the training data."),
    click.option(
        "--batch-size",
        type=click.IntRange(2),
        help="Number of samples per step. For captions it is also the number of candidates.",
    ),
    click.option("--learning-rate", type=float, help="Highest learning rate of the schedule."),
    click.option("--weight-decay", type=float, help="Weight decay of the optimizer."),
    click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="Optimizer that trains the head."),
    click.option(
        "--architecture",
        "form",
        cls=RenamedOption,
        old="--form",
        type=click.Choice(FORMS),
        help="Take the projections and the attention scale from the authors' code or from the paper.",
    ),
    click.option(
        "--loss",
        type=click.Choice(LOSSES),
        help="Loss: weighted cross-entropy, or weighted squared error to the true class's probability.",
    ),
    click.option("--failure-weight", type=float, help="Fixed weight of wrong samples, instead of the adaptive one."),
    click.option(
        "--freeze-steps", type=click.IntRange(0), help="Number of steps before the projections are trained, too."
    ),
    click.option(
        "--validation",
        type=FloatRange(0, 1, max_open=True),
        help="Share of the training data that is set aside to choose the epoch.",
    ),
    click.option("--patience", type=click.IntRange(1), help="Stop after this number of epochs without an improvement."),
)


@click.command("train", cls=Command, extra="train")
@config_option
@data_options
@embeddings_option
@record_data_options
@click.option("--ckpt", type=PATH, help="With --from-record: checkpoint whose answers were recorded.")
@click.option("--output", type=PATH, required=True, help="Checkpoint to write (.safetensors).")
@train_clip_options
@template_option
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(list(RECIPES)),
    default="default",
    show_default=True,
    help="Training settings by name. The options below replace single settings of it.",
)
@_setting_options
@click.option(
    "--head-inputs",
    "parts",
    cls=RenamedOption,
    old="--parts",
    help="Embeddings that the head's MLP reads, separated by commas.  [default: image,predicted,attended]",
)
@click.option(
    "--prior/--no-prior",
    default=None,
    help="Start from CLIP's own confidence and learn a correction.  [default: as the recipe says]",
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="Embed newly augmented images in every epoch, as the authors do, instead of caching embeddings. This is slow.",
)
@dtype_option("float16")
@click.option("--tensorboard", type=PATH, help="Folder to write TensorBoard's event files to.")
@click.option(
    "--estimate-images/--no-estimate-images",
    "estimate",
    cls=RenamedOption,
    old="--estimate/--no-estimate",
    default=True,
    help="Where the head is not better than MCM, estimate how many training images it needs. This trains on three "
    "parts of the data.  [default: estimate]",
)
@click.option(
    "--outlier-score",
    is_flag=True,
    help="Also store how far an image lies from the training images, for images that show none of the classes.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the training.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with the results.")
def train_command(
    data: str | None,
    dataset: str | None,
    root: Path | None,
    image_column: str,
    caption_column: str,
    cache: Path | None,
    embeddings: Path | None,
    from_record: str | None,
    since: datetime | None,
    ckpt: Path | None,
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
    outlier_score: bool,
    seed: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a ViLU head on labelled or captioned images.

    CLIP itself is not changed. The command says how often CLIP is right on the training data, beside chance. OUTPUT is
    the epoch that was best on samples set aside from the training data; OUTPUT's .last.safetensors is the last one. A
    killed run continues where it was when it is started again. For several GPUs: torchrun -m vilu train ...
    """
    from vilu.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from vilu.class_set import DEFAULT_TEMPLATES, ClassSet
    from vilu.clip import load_clip
    from vilu.data import embed, load_embeddings, open_source
    from vilu.fingerprints import remembered
    from vilu.outlier import fit_outlier
    from vilu.preprocess.class_names import rows_problem
    from vilu.train import fit

    changes = {name: value for name, value in settings.items() if value is not None} | {"seed": seed}
    if parts is not None:
        changes["parts"] = tuple(filter(None, map(str.strip, parts.split(","))))
    if prior is not None:
        changes["prior"] = prior
    recipe = recipe_named(recipe_name, **changes)
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"{output}: {'is a folder' if output.is_dir() else 'its folder does not exist'}")
    say = said.result_or_note(as_json)
    prompts = templates or DEFAULT_TEMPLATES
    spec: ClipSpec | None = None
    augmented = None
    with _processes() as (rank, turn), progress_bar(rank == 0) as bar:
        if from_record is not None:
            if data or dataset or embeddings or no_cache or clip_name or pretrained or ckpt is None:
                raise UserError("--from-record needs --ckpt, and takes the place of other data and of --clip")
            known = load_checkpoint(ckpt)
            train, spec = training_set(from_record, known, since), known.clip
            prompts = known.class_set.templates if known.class_set else prompts
        elif embeddings is not None:
            if data or dataset or no_cache or clip_name or pretrained:
                raise UserError("--embeddings takes the place of --data, --dataset, --clip and --no-cache")
            train = load_embeddings(embeddings)
        else:
            source = open_source(
                data,
                dataset=dataset,
                root=root,
                split="train",
                image_column=image_column,
                caption_column=caption_column,
                cache=cache,
            )
            clip = load_clip(clip_name or _default_clip(dataset, source.name), pretrained)
            spec = clip.spec
            with turn:  # the first process fills the cache, and the others read it
                train = embed(source, clip, cache=cache, dtype=dtype, templates=prompts, progress=bar)
            if no_cache:
                augmented = _augmented(source, train, clip, seed)
        class_set, twins = None, ""
        if train.class_names:  # made before the training, so that a wrong one is refused now
            class_set = ClassSet(train.class_names, tuple(prompts), train.text.normalised.float())
            twins = rows_problem(class_set.names, class_set.text_embeddings.numpy())
            if twins and embeddings is None:  # the user's embeddings may hold such classes, as ImageNet's do
                raise UserError(f"class set: {twins}")
        clip_accuracy = clip_accuracy_on(train, recipe)
        if rank == 0:
            for line in train.skipped:
                said.note(f"skipped {line}")
            say(f"{name_of_clip(spec, train)}: {clip_accuracy}")
            if clip_accuracy.warning:
                said.warn(f"warning: {clip_accuracy.warning}")
            if twins:
                said.warn(f"warning: {twins}")
        state = None if no_cache else output.with_name(f".{output.name}.state")
        with _board(tensorboard if rank == 0 else None) as log, _interrupted(state):
            trained = fit(
                train,
                recipe,
                state=state,
                progress=lambda done, total: bar("training", done, total),
                log=log,
                augmented=augmented,
            )
    if rank != 0:
        return
    meta = {
        "data": train.name,
        "samples": len(train),
        "skipped": len(train.skipped),
        "accuracy": clip_accuracy.share,
        "chance": clip_accuracy.chance,
        "logit_scale": train.logit_scale,
        "recipe": {"name": recipe_name, **asdict(recipe)},
        "best_epoch": trained.best_epoch,
        "validation": asdict(trained.validation) if trained.validation else None,
    }
    samples = remembered(train.image.normalised)
    outlier = None
    if outlier_score:
        outlier = fit_outlier(train.image.normalised, train.labels, train.text.normalised)
    last = output.with_name(f"{output.name.removesuffix('.safetensors')}.last.safetensors")
    for path, head in ((last, trained.last), (output, trained.head)):
        save_checkpoint(Checkpoint(head, spec, class_set, meta=meta, samples=samples, outlier=outlier), path)
    epochs = len(trained.history) - 1
    needed = None
    kind = "captioned images" if train.captions else f"images of {len(train.text)} classes"
    left_out = f" ({len(train.skipped)} could not be read)" if train.skipped else ""
    say(f"{output}: trained on {len(train)} {kind}{left_out}, epoch {trained.best_epoch} of {epochs}")
    say(verdict(trained.validation))
    if estimate and trained.validation is not None and not trained.validation.better:
        with progress_bar() as bar:
            needed = images_needed(train, recipe, bar)
        say(f"how many it takes, by a learning curve over parts of this data: {needed}")
    if as_json:
        said.document(
            {
                "checkpoint": str(output),
                "last_checkpoint": str(last),
                "clip": asdict(spec) if spec else None,
                "classes": None if train.captions else len(train.text),
                **meta,
                "skipped": list(train.skipped),
                "chance_rule": clip_accuracy.rule,
                "warning": clip_accuracy.warning or None,
                "epochs": epochs,
                "verdict": verdict_word(trained.validation),
                "images_needed": needed,
            }
        )


def _default_clip(dataset: str | None, name: str) -> str:
    """Return the embedded CLIP for its own data. Raises UserError for other data, which it does not know."""
    from vilu import tiny
    from vilu.data.registry import EMBEDDED

    if dataset in EMBEDDED:
        return tiny.NAME
    raise UserError(
        f"{name}: name the CLIP that answers, such as --clip ViT-B-32 --pretrained FILE (or openai, a download); "
        f"the embedded {tiny.NAME} knows only {', '.join(EMBEDDED)}, and --clip {tiny.NAME} uses it all the same"
    )


def _augmented(source: Source, train: EmbeddedSet, clip: Clip, seed: int) -> Callable[[Tensor, int], Tensor]:
    """Return a function from rows (n,) of `train` and an epoch to embeddings (n, D) of newly augmented images."""
    import numpy as np
    import torch

    from vilu.data import augment, batches

    def embed_rows(rows: Tensor, epoch: int) -> Tensor:
        places = rows if train.rows is None else train.rows[rows]
        transform = augment(clip.transform.size, np.random.default_rng([seed, epoch]))
        found = []
        with torch.no_grad():  # encoding inside the loop lets the threads decode ahead
            for _, pixels in batches(source, transform, places.tolist(), 64):
                found.append(clip.encode_pixels(torch.from_numpy(pixels)))
        if sum(map(len, found)) != len(rows):
            raise UserError(f"{source.name}: an image that could be read before cannot be read any more")
        return torch.cat(found)

    return embed_rows


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, contextlib.AbstractContextManager[None]]]:
    """Yield the rank and a context that the first process leaves before the others enter it. torchrun is optional."""
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
def _interrupted(state: Path | None) -> Iterator[None]:
    """Say how an interrupted training goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if state is not None and state.exists():
            said.warn("interrupted: the same command goes on where it was")
        raise


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
