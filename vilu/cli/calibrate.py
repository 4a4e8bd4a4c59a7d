"""`vilu calibrate` chooses a threshold and calibrates the failure probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output as said
from vilu.cli.command import Command, RenamedOption
from vilu.cli.from_record import calibrate as calibrate_from_record
from vilu.cli.from_record import record_data_options
from vilu.cli.held_out import held_out
from vilu.cli.options import (
    PATH,
    FloatRange,
    check_stages,
    clip_options,
    data_options,
    drop_known_option,
    dtype_option,
    embeddings_option,
    refuse_options,
    stages_argument,
)
from vilu.cli.progress import progress_bar
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.checkpoint import ClipSpec
    from vilu.embeddings import EmbeddedSet
    from vilu.evaluation.calibration import Outlook

# What --cascade takes, besides --margin or --target-risk.
CASCADE_OPTIONS = (
    "cascade", "data", "dataset", "root", "image_column", "caption_column", "split", "cache", "drop_known",
    "confidence", "output", "dtype", "as_json",
)  # fmt: skip


@click.command("calibrate", cls=Command, extra="train")
@stages_argument
@click.option("--ckpt", type=PATH, help="Checkpoint to calibrate.")
@click.option(
    "--cascade",
    is_flag=True,
    help="Choose a cascade's threshold instead: name a checkpoint for each stage, the smallest CLIP first. An image "
    "goes on to the next stage where its failure probability is above the threshold.",
)
@click.option(
    "--margin",
    type=FloatRange(0, 1, True, True),
    default=0.005,
    show_default=True,
    help="Largest loss of a cascade's accuracy against its last stage alone, a fraction.",
)
@data_options
@embeddings_option
@clip_options
@record_data_options
@click.option(
    "--split",
    default="val",
    show_default=True,
    help="Split of the data to use: train, val or test. The head must not be trained on it.",
)
@drop_known_option
@click.option(
    "--target-risk",
    type=FloatRange(0, 1, True, True),
    help="Largest error rate that accepted answers may have.",
)
@click.option(
    "--confidence",
    type=FloatRange(0, 1, True, True),
    default=0.95,
    show_default=True,
    help="Probability with which the target risk holds.",
)
@click.option("--target-coverage", type=FloatRange(0, 1, True), help="Share of all answers to accept.")
@click.option("--target-tpr", type=FloatRange(0, 1, True), help="Share of the right answers to accept.")
@click.option(
    "--refuse-outliers",
    type=FloatRange(0, 1, True, True),
    help="Share of these images, all inside the class set, that the outlier score may refuse.",
)
@click.option(
    "--probability-calibration",
    "probability",
    cls=RenamedOption,
    old="--probability",
    type=click.Choice(["none", "temperature", "platt"]),
    default="none",
    show_default=True,
    help="Method that calibrates the failure probability, on a half of the data that the threshold does not see.",
)
@click.option(
    "--output",
    type=PATH,
    help="Checkpoint to write, or with --cascade a JSON file.  [default: replace --ckpt; with --cascade none]",
)
@dtype_option(None, "float32; with --cascade float16, as vilu train and vilu eval keep them")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the split into halves.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with the results.")
def calibrate_command(
    stages: tuple[Path, ...],
    ckpt: Path | None,
    cascade: bool,
    margin: float,
    data: str | None,
    dataset: str | None,
    root: Path | None,
    image_column: str,
    caption_column: str,
    cache: Path | None,
    embeddings: Path | None,
    clip_name: str | None,
    pretrained: str | None,
    from_record: str | None,
    since: datetime | None,
    split: str,
    drop_known: bool,
    target_risk: float | None,
    confidence: float,
    target_coverage: float | None,
    target_tpr: float | None,
    refuse_outliers: float | None,
    probability: str,
    output: Path | None,
    dtype: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Choose the threshold below which answers are accepted.

    The data must be data that the head was not trained on: the command knows the training samples, and promises nothing
    on them. --target-risk is a guarantee: with probability --confidence
    over the draw of this data, accepted answers from the same source are wrong at most that often. The checkpoint
    stores the choice and the data it was made on.

    With --cascade the threshold is the cheapest whose accuracy is within --margin of the last stage alone, or whose
    accepted answers meet --target-risk, with the same guarantee.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    if cascade:
        from vilu.cli.cascade import choose_threshold
        from vilu.data import open_source

        check_stages(() if ckpt is not None else stages, cascade)
        rule = "margin" if target_risk is None else "target_risk"
        why = "has no meaning beside --cascade" + (" and --target-risk" if rule == "target_risk" else "")
        refuse_options(why, *CASCADE_OPTIONS, rule, others=True)
        choose_threshold(
            stages,
            open_source(data, dataset=dataset, root=root, split=split, cache=cache, **columns),
            cache,
            dtype or "float16",
            drop_known=drop_known,
            margin=margin,
            target_risk=target_risk,
            confidence=confidence,
            output=output,
            as_json=as_json,
        )
        return
    check_stages(stages, cascade)
    refuse_options("is for --cascade", "margin")
    if ckpt is None:
        raise UserError("give --ckpt")
    import numpy as np
    import torch

    from vilu.checkpoint import check_fits, load_checkpoint, save_checkpoint
    from vilu.evaluation.calibration import (
        TargetNotMetError,
        for_coverage,
        for_tpr,
        guaranteed_risk,
        outlook,
        platt,
        temperature,
    )

    say = said.result_or_note(as_json)
    wanted = [t for t in (target_risk, target_coverage, target_tpr) if t is not None]
    if len(wanted) > 1 or (not wanted and probability == "none" and refuse_outliers is None):
        raise UserError(
            "give one of --target-risk, --target-coverage and --target-tpr, or --probability-calibration or "
            "--refuse-outliers"
        )
    if from_record is not None:
        if target_risk is None or len(wanted) > 1 or probability != "none" or data or dataset or embeddings:
            raise UserError("--from-record needs --target-risk, and no other target, data or calibration")
        calibrate_from_record(ckpt, from_record, since, target_risk, confidence, output or ckpt)
        return
    checkpoint = load_checkpoint(ckpt)
    if embeddings is not None and (clip_name or pretrained):
        raise UserError("--embeddings takes the place of --clip and --pretrained")
    if refuse_outliers is not None and checkpoint.outlier is None:
        raise UserError(f"{ckpt}: has no outlier score; train it with --outlier-score")
    named = (clip_name, pretrained)
    dtype = dtype or "float32"
    held, spec = _held_out(checkpoint, ckpt, data, dataset, root, cache, embeddings, split, dtype, columns, named)
    check_fits(ckpt, checkpoint, held)
    for line in held.skipped:
        said.note(f"skipped {line}")
    trained_on = 0
    if checkpoint.samples is None:
        said.warn(f"{ckpt}: does not say which samples it was trained on; {held.name} must not be among them")
    else:
        held, trained_on, lines = held_out(held, {f"{ckpt}: was trained": checkpoint.samples}, drop_known)
        if trained_on and target_risk is not None:
            raise UserError(
                f"{lines[0]}: no risk can be promised on them; name held-out data, or leave them out (--drop-known)"
            )
        if trained_on and refuse_outliers is not None:
            raise UserError(
                f"{lines[0]}: they are less unlike the training images than new ones; leave them out (--drop-known)"
            )
        if trained_on:
            lines[0] += ": its answers there are better than on new data (--drop-known leaves them out)"
        for line in lines:
            said.warn(line)
    order = np.random.default_rng(seed).permutation(len(held))
    halves = np.array_split(order, 2) if probability != "none" and wanted else [order, order]

    head, correct, group = checkpoint.head, *_correct(held)
    note: dict[str, Any] = {"data": held.name, "split": split, "samples": len(correct), "candidates": group}
    note["trained_on"] = trained_on
    with torch.no_grad():
        failure = _failure_probability(head, held, group)
    if probability != "none":
        rows = halves[0][halves[0] < len(correct)]
        found = (platt if probability == "platt" else temperature)(failure[rows], correct[rows])
        head = found.fold_into(head)
        with torch.no_grad():
            failure = _failure_probability(head, held, group)
        note["probability"] = {"method": probability, "samples": len(rows), **asdict(found)}
        say(f"P(failure) calibrated by {probability} on {len(rows)} samples: slope {found.slope:.3f}, "
                   f"offset {found.offset:.3f}")  # fmt: skip
    threshold = checkpoint.threshold
    before = checkpoint.meta.get("calibration") or {}
    if probability != "none" and not wanted and before.get("threshold"):
        # The earlier threshold moves with the probability, so that it still accepts the same answers.
        threshold = float(np.float32(found(np.array([threshold]))[0]))
        note["threshold"] = {"data": before["data"], **before["threshold"], "threshold": threshold}
        say(f"threshold moved from {checkpoint.threshold:.4f} to {threshold:.4f}: it accepts the same answers")
    if wanted:
        rows = halves[1][halves[1] < len(correct)]
        given = (failure[rows], correct[rows])
        beside: list[str] = []
        if target_risk is not None:
            beside = _outlook_lines(outlook(*given, target_risk, confidence))
            try:
                chosen = guaranteed_risk(*given, target_risk, confidence)
            except TargetNotMetError:
                say("\n".join(beside))
                raise
        elif target_coverage is not None:
            chosen = for_coverage(*given, target_coverage)
        else:
            assert target_tpr is not None
            chosen = for_tpr(*given, target_tpr)
        threshold = chosen.threshold
        note["threshold"] = asdict(chosen)
        promise = "" if chosen.bound is None else f", promised at {confidence:.0%}: at most {chosen.target:.2%}"
        say(
            f"threshold {threshold:.4f} on {chosen.samples} samples: accepts {chosen.coverage:.1%} of answers, "
            f"{chosen.risk:.2%} of them wrong{promise}"
        )
        for line in beside:
            say(line)
    if not wanted and probability == "none":
        note = dict(before)  # the outlier score alone was calibrated
    outlier = checkpoint.outlier
    if refuse_outliers is not None and outlier is not None:
        outlier = outlier.calibrated(held.image.normalised, refuse_outliers)
        note["outlier"] = {
            "data": held.name,
            "samples": len(held),
            "threshold": outlier.threshold,
            "refused": refuse_outliers,
        }
        say(
            f"outlier score: threshold {outlier.threshold:.3f} on {len(held)} samples refuses at most "
            f"{refuse_outliers:.1%} of images inside the class set, on average over such samples"
        )
    elif "outlier" in before:
        note["outlier"] = before["outlier"]
    if not held.captions and (wanted or probability != "none"):
        # The half that the calibration of the probability did not see, as the monitor's test of drift needs it.
        names = checkpoint.class_set.names if checkpoint.class_set else held.class_names
        note["reference"] = _reference(failure, held, halves[1], names) | {"target_risk": target_risk}
    meta = {**checkpoint.meta, "calibration": note}
    save_checkpoint(
        replace(checkpoint, head=head, clip=spec, threshold=threshold, meta=meta, outlier=outlier), output or ckpt
    )
    say(f"{output or ckpt}: written")
    if as_json:
        said.document({"checkpoint": str(output or ckpt), "threshold": threshold, "calibration": note})


def _outlook_lines(found: Outlook) -> list[str]:
    """What the same samples give without the guarantee, and what more of them would bring."""
    seen = found.observed
    without = (
        "without the guarantee: no threshold has this risk on these samples"
        if seen is None
        else f"without the guarantee: threshold {seen.threshold:.4f} accepts {seen.coverage:.1%} of these samples, "
        f"{seen.risk:.2%} of them wrong"
    )
    more = ", ".join(f"{share:.1%} with {samples:,} samples" for samples, share in found.more.items())
    return [without, f"with more samples like these, the guarantee would accept about {more}"]


def _held_out(
    checkpoint: Any,
    ckpt: Path,
    data: str | None,
    dataset: str | None,
    root: Path | None,
    cache: Path | None,
    embeddings: Path | None,
    split: str,
    dtype: str,
    columns: dict[str, str],
    named: tuple[str | None, str | None],
) -> tuple[EmbeddedSet, ClipSpec | None]:
    """Return the embedded data and the CLIP to store, which is the one that --clip or --pretrained names."""
    from vilu.class_set import DEFAULT_TEMPLATES
    from vilu.clip import load_clip_for
    from vilu.data import embed, load_embeddings, open_source

    if embeddings is not None:
        if data or dataset:
            raise UserError("--embeddings takes the place of --data and --dataset")
        return load_embeddings(embeddings), checkpoint.clip
    source = open_source(data, dataset=dataset, root=root, split=split, cache=cache, **columns)
    clip = load_clip_for(checkpoint, ckpt, *named, missing="give --clip and --pretrained, or --embeddings")
    templates = checkpoint.class_set.templates if checkpoint.class_set else DEFAULT_TEMPLATES
    with progress_bar() as bar:
        held = embed(source, clip, cache=cache, dtype=dtype, templates=templates, progress=bar)
    return held, clip.spec if any(named) else checkpoint.clip


def _reference(failure: Any, held: EmbeddedSet, rows: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the summary of the data that `vilu monitor` compares a server's answers with, classes in this order."""
    import torch

    from vilu.evaluation.reference import summarise

    v = held.image.normalised[torch.as_tensor(rows)].float()
    index = torch.cat([(part @ held.text.normalised.float().T).argmax(dim=1) for part in v.split(4096)])
    place = {name: i for i, name in enumerate(names)}
    order = torch.tensor([place[name] for name in held.class_names] or range(len(held.text)))
    return summarise(failure[rows], order[index].numpy(), len(held.text), v.numpy())


CAPTION_GROUP = 1024  # candidates per group of captions, as in the published tables


def _correct(held: EmbeddedSet) -> tuple[Any, int]:
    """Return where CLIP is right, (N,) bool, and the number of candidates. Captions count only in whole groups."""
    from vilu.evaluation.evaluate import correct

    group = min(CAPTION_GROUP, len(held)) if held.captions else len(held.text)
    return correct(held, group if held.captions else None), group


def _failure_probability(head: Any, held: EmbeddedSet, group: int) -> Any:
    from vilu.evaluation.evaluate import confidences
    from vilu.scores import ViLU

    return 1 - confidences({"ViLU": ViLU(head)}, held, group if held.captions else None)["ViLU"]
