"""What `vilu calibrate --cascade` and `vilu eval --cascade` do.

The first chooses the threshold above which the next, larger CLIP is asked; the second draws accuracy against cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilu.cli import output as said
from vilu.cli.held_out import held_out
from vilu.cli.progress import progress_bar
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.checkpoint import Checkpoint
    from vilu.clip import Clip
    from vilu.data.source import Source
    from vilu.embeddings import EmbeddedSet
    from vilu.evaluation.cascade import Stage


def choose_threshold(
    paths: Sequence[Path],
    source: Source,
    cache: Path | None,
    dtype: str,
    *,
    drop_known: bool,
    margin: float,
    target_risk: float | None,
    confidence: float,
    output: Path | None,
    as_json: bool,
) -> None:
    """Choose a cascade's threshold on held-out data, print what it costs, and write it as JSON where asked for.

    Args:
        paths: a checkpoint for each stage, the smallest CLIP first.
        source: the images.
        cache: folder of the embeddings.
        dtype: number type of the embeddings.
        drop_known: leave out the samples that a head was trained on.
        margin: largest loss of accuracy against the last stage alone.
        target_risk: if given, the rule instead of the margin.
        confidence: probability of the guarantee.
        output: JSON file to write.
        as_json: print that JSON, and everything else on stderr.
    """
    from vilu import atomic
    from vilu.checkpoint import digest
    from vilu.clip.cost import milliseconds, multiply_adds
    from vilu.evaluation.cascade import within_margin, within_risk

    if output is not None:
        if output.suffix in (".safetensors", ".ckpt"):
            raise UserError(f"--output {output}: a cascade's threshold is a JSON file; no checkpoint is replaced")
        atomic.check_file(output)
    say = said.result_or_note(as_json)
    loaded = [load_stage(path) for path in paths]
    _same_classes(paths, [checkpoint for checkpoint, _ in loaded])
    sets = _embed(paths, loaded, source, cache, dtype, drop_known)
    costs = [milliseconds(clip) for _, clip in loaded]
    for number, (path, (_, clip), cost) in enumerate(zip(paths, loaded, costs, strict=True), 1):
        billions = multiply_adds(clip) / 1e9
        say(f"stage {number}, {path}: {clip.spec.name}, {cost:.2f} ms and {billions:.2f} G multiply-adds an image")

    def choose(stages: list[Stage]) -> Any:
        if target_risk is not None:
            return within_risk(stages, target_risk, confidence)
        return within_margin(stages, margin, confidence)

    by_method = _stages(loaded, sets, costs, ("P(failure)", "MCM"))
    found = choose(by_method["P(failure)"])
    what = f"risk {found.target:.2%}" if found.rule == "risk" else f"a loss of {found.target:.2%}"
    shares = ", ".join(f"{share:.1%} to stage {number}" for number, share in enumerate(found.reached[1:], 2))
    alone = by_method["MCM"][-1].cost
    say(
        f"threshold {found.threshold:.4f} on {found.samples} samples: {shares} go on; accuracy {found.accuracy:.2%}, "
        f"the last stage alone {found.last_accuracy:.2%}; promised at {found.confidence:.0%}: at most {what} "
        f"(bound {found.bound:.2%})"
    )
    if not any(found.reached[1:]):
        say("no image goes on: the first stage alone keeps this promise, and needs no cascade")
    say(f"cost {found.cost:.2f} ms an image, {found.cost / alone:.0%} of the last stage alone")
    try:
        other = choose(by_method["MCM"])
        say(f"with MCM in place of P(failure): {other.cost:.2f} ms, {other.cost / alone:.0%}")
    except UserError as reason:
        say(f"with MCM in place of P(failure): {reason}")
    stages = [
        {
            "checkpoint": path.name,
            **asdict(clip.spec),
            "head": digest(checkpoint),
            "milliseconds": cost,
            "accuracy": float(stage.correct.mean()),
        }
        for path, (checkpoint, clip), cost, stage in zip(paths, loaded, costs, by_method["P(failure)"], strict=True)
    ]
    note = {"format": "vilu-cascade", "version": 1, "data": sets[0].name, "stages": stages, **asdict(found)}
    if output is not None:
        atomic.write(output, json.dumps(note, indent=2) + "\n")
        say(f"{output}: written")
    if as_json:
        said.result(json.dumps(note))


def compare(
    paths: Sequence[Path],
    source: Source,
    cache: Path | None,
    dtype: str,
    *,
    drop_known: bool,
    margin: float,
    resamples: int,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compare cascades by P(failure), MCM, entropy and at random, and each model alone; print tables, write a report.

    Args:
        paths: a checkpoint for each stage, the smallest CLIP first.
        source: the images.
        cache: folder of the embeddings; None: they are not kept.
        dtype: number type of the embeddings.
        drop_known: leave out the samples that a head was trained on.
        margin: accuracy that a cascade may lose against its last stage alone.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap and of the random doubt.
        output: folder of the report.
        as_json: print the results as JSON instead of tables.
    """
    from vilu.cli.tables import print_cascade, wide_console
    from vilu.clip.cost import milliseconds, multiply_adds
    from vilu.evaluation.cascade_curve import METHODS, Cost, cascade_curve
    from vilu.evaluation.report import cascade as report
    from vilu.evaluation.report.tables import HTML, check_output

    if output is not None:
        check_output(output)
    loaded = [load_stage(path) for path in paths]
    _same_classes(paths, [checkpoint for checkpoint, _ in loaded])
    sets = _embed(paths, loaded, source, cache, dtype, drop_known)
    costs = [Cost(multiply_adds(clip), milliseconds(clip)) for _, clip in loaded]
    with progress_bar() as bar:
        curve = cascade_curve(
            sets[0].name,
            [clip.spec.name for _, clip in loaded],
            _stages(loaded, sets, [cost.milliseconds for cost in costs], tuple(METHODS), seed),
            costs,
            margin=margin,
            resamples=resamples,
            seed=seed,
            progress=lambda done, total: bar("resampling", done, total),
        )
    settings = {
        "checkpoints": ", ".join(map(str, paths)),
        "test": source.name,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    if output is not None:
        report.write(curve, output, settings)
    if as_json:
        said.result(json.dumps(report.as_json(curve, settings), allow_nan=False))
        return
    print_cascade(curve, wide_console())
    if output is not None:
        said.result(f"{output / HTML}")


def threshold_of(given: str, paths: Sequence[Path], checkpoints: Sequence[Checkpoint]) -> tuple[float, Any]:
    """A cascade's threshold: a number, or the file that `vilu calibrate --cascade` wrote for these checkpoints.

    Returns:
        The threshold, and what the file holds; None for a number.

    Raises:
        UserError: neither of the two, a file about other checkpoints, or one by which the last stage is no better than
            an earlier one.
    """
    from vilu.checkpoint import digest

    try:
        return float(given), None
    except ValueError:
        pass
    try:
        note = json.loads(Path(given).read_text("utf-8"))
        json.dumps(note, allow_nan=False)  # parity.json keeps it
        if note["format"] != "vilu-cascade" or note["version"] != 1:
            raise ValueError
        threshold, stages = _fraction(note["threshold"]), note["stages"]
        heads = [str(stage["head"]) for stage in stages]
        accuracy = [_fraction(stage["accuracy"]) for stage in stages]
    except OSError as error:
        raise UserError(f"{given!r}: neither a number nor a file that can be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{given}: not what `vilu calibrate --cascade --output` writes") from None
    if len(heads) != len(paths):
        raise UserError(f"{given}: chosen for a cascade of {len(heads)} stages, not of {len(paths)}")
    for number, (path, checkpoint, head) in enumerate(zip(paths, checkpoints, heads, strict=True), 1):
        if digest(checkpoint) != head:
            raise UserError(f"{given}: chosen for another checkpoint as stage {number} than {path}; calibrate it again")
    for number, before in enumerate(accuracy[:-1], 1):
        if accuracy[-1] <= before:
            raise UserError(
                f"{paths[-1]}: no better than stage {number} by {given}: it was right on {accuracy[-1]:.2%} of the "
                f"samples, stage {number} on {before:.2%}; a cascade has nothing to gain"
            )
    return threshold, note


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError
    return float(value)


def load_stage(path: Path) -> tuple[Checkpoint, Clip]:
    """A stage's checkpoint and its CLIP. Raises UserError."""
    from vilu.checkpoint import load_checkpoint
    from vilu.clip import load_clip_for

    checkpoint = load_checkpoint(path)
    return checkpoint, load_clip_for(checkpoint, path, missing="train it with one")


def _same_classes(paths: Sequence[Path], checkpoints: Sequence[Checkpoint]) -> None:
    names = [checkpoint.class_set.names if checkpoint.class_set else None for checkpoint in checkpoints]
    for path, other in zip(paths[1:], names[1:], strict=True):
        if other != names[0]:
            raise UserError(f"{path}: has other classes than {paths[0]}; the stages of a cascade share their classes")


def _embed(
    paths: Sequence[Path],
    loaded: Sequence[tuple[Checkpoint, Clip]],
    source: Source,
    cache: Path | None,
    dtype: str,
    drop_known: bool,
) -> list[EmbeddedSet]:
    """The samples that no head was trained on, embedded by the CLIP of each stage, in the same order."""
    import torch

    from vilu.checkpoint import check_fits
    from vilu.class_set import DEFAULT_TEMPLATES
    from vilu.data import embed

    if source.captions is not None:
        raise UserError(f"{source.name}: a cascade answers with classes, not with captions")
    sets = []
    embedded: dict[Any, EmbeddedSet] = {}  # stages may share a CLIP
    for path, (checkpoint, clip) in zip(paths, loaded, strict=True):
        templates = checkpoint.class_set.templates if checkpoint.class_set else DEFAULT_TEMPLATES
        of = clip.spec, clip.transform, templates
        if of not in embedded:
            with progress_bar() as bar:
                embedded[of] = embed(source, clip, cache=cache, dtype=dtype, templates=templates, progress=bar)
        held = embedded[of]
        check_fits(path, checkpoint, held)
        if checkpoint.samples is None:
            said.warn(f"{path}: does not say which samples it was trained on; {held.name} must not be among them")
        else:
            held, known, lines = held_out(held, {f"{path}: was trained": checkpoint.samples}, drop_known)
            if known:
                raise UserError(f"{lines[0]}: nothing can be promised on them; leave them out (--drop-known)")
            for line in lines:
                said.note(line)
        sets.append(held)
    rows = [torch.arange(len(held)) if held.rows is None else held.rows for held in sets]
    kept = rows[0]
    for other in rows[1:]:
        kept = kept[torch.isin(kept, other)]
    if not len(kept):
        raise UserError(f"{sets[0].name}: no sample is held out for every stage")
    return [held[torch.isin(own, kept)] for held, own in zip(sets, rows, strict=True)]


def _stages(
    loaded: Sequence[tuple[Checkpoint, Clip]],
    sets: Sequence[EmbeddedSet],
    costs: Sequence[float],
    methods: Sequence[str],
    seed: int = 0,
) -> dict[str, list[Stage]]:
    """By method, the stages with this doubt."""
    import numpy as np

    from vilu.evaluation.cascade import Stage
    from vilu.evaluation.evaluate import confidences, correct
    from vilu.scores import MCM, Entropy, ViLU

    rng = np.random.default_rng(seed)
    by_method: dict[str, list[Stage]] = {name: [] for name in methods}
    for (checkpoint, _), held, cost in zip(loaded, sets, costs, strict=True):
        scores = {"P(failure)": ViLU(checkpoint.head), "MCM": MCM(), "Entropy": Entropy()}
        found = confidences(scores, held)
        # The entropy's confidence is in [−1, 0], the others' in [0, 1].
        doubt = {name: -value if name == "Entropy" else 1 - value for name, value in found.items()}
        doubt["random"] = rng.random(len(held))
        accepted = doubt["P(failure)"] < checkpoint.threshold
        right = correct(held)
        for name in methods:
            by_method[name].append(Stage(np.clip(doubt[name], 0, 1), right, cost, accepted))
    return by_method
