"""A cascade: one repository in which a larger CLIP answers the images that a smaller one is likely wrong about.

Every stage is an export of its own, with its own parity report. The first keeps the names of its models, so the
repository also serves it alone; the models of later stages have a prefix (`stage2_`). What joins them is one Python
model, `vilu_router`, and two ensembles, `vilu_cascade` and, for labels of a request's own, `vilu_cascade_open`. The
router asks a later stage by one call of an ensemble of its own, `stage2_vilu` or `stage2_vilu_open`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import vilu.export.repository as models
from vilu import atomic
from vilu.checkpoint import Checkpoint, digest
from vilu.clip import Clip
from vilu.clip.cost import multiply_adds
from vilu.errors import UserError
from vilu.export import checks, versions
from vilu.export.job import Progress
from vilu.export.limits import MAX_LIMITS, Limits
from vilu.export.measure import Measured
from vilu.export.model_config import TEXT_NICE, Step, Tensors, save_config, write_config, write_ensemble
from vilu.export.onnx_file import copy_graph
from vilu.export.precision import HEAD_BUDGET
from vilu.export.repository import Served
from vilu.export.rule import within_budget
from vilu.export.sample import embedded_images
from vilu.serving.about import CONFIG, load_config

FRONT = "vilu_cascade"
ROUTER = "vilu_router"
# What a later stage brings into the repository; the first stage decodes images and keeps class sets for all.
STAGE_MODELS = ("clip_image", "clip_text", "tokenize", "vilu_text", "vilu_head", "vilu_embeddings", "vilu_details")
ESCALATION_SECONDS = 20.0  # below the 30 s that a client waits
# Requests that wait for later stages. The front door has 64 under way at a time: where a stage hangs, a quarter is left
# for the images that do not go on.
WAITING = 48
# Multiply-adds of an image, some 10 ms on a core, below which more threads cost a busy server more than they save.
SMALL = 500_000_000
# Multiply-adds of an image, less than a ms on a core, below which a tower takes one thread, and in float32 runs on ONNX
# Runtime's own provider: where a batch has another size than the one before, OpenVINO takes some 0.4 ms more.
TINY = 100_000_000
# Niceness of what computes for every image, the decoder and the first tower; stages between it and the last have a part
# of it. An image that goes on has waited longest, so it goes first.
FIRST_NICE = 10
# Microseconds. The tower sends the answers to one batch one after another, and the router would begin with the first.
ROUTER_WAIT = 200
DETAILS = models.DETAIL_TENSORS  # without embeddings and outlier scores: those of two CLIPs cannot be compared
STAGE: Tensors = {"STAGE": ("TYPE_INT32", [1]), "ESCALATION_FAILED": ("TYPE_BOOL", [1])}


def export_cascade(
    checkpoints: Sequence[Checkpoint],
    clips: Sequence[Clip],
    output: Path,
    *,
    threshold: float,
    calibration: dict[str, Any] | None = None,
    as_default: bool = False,
    escalation_seconds: float = ESCALATION_SECONDS,
    write: Callable[..., dict[str, Any]],
    max_batch_size: int = 32,
    preprocess: str = "exact",
    version: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a model repository of a cascade, whole and every stage within its parity budget, or not at all.

    Args:
        checkpoints: a checkpoint for each stage, the smallest CLIP first, over the same classes in the same order.
        clips: their CLIPs.
        output: the repository's folder; replaced whole, or with `version` added to.
        threshold: an image goes on to the next stage where its failure probability is above this.
        calibration: what `vilu calibrate --cascade` wrote when it chose the threshold; kept in parity.json.
        as_default: serve the cascade as `vilu` and `vilu_open`, too, in the place of the first stage alone.
        escalation_seconds: how long an image may wait for later stages; then the answer so far is given, rejected.
        write: `export`, which then needs a precision, or `export_fastest`: it writes each stage. Where what the latter
            chose routes too many images to another stage, `rule.within_budget` takes the next fastest.
        options: as those of `export`, as are the other arguments.

    Returns:
        What parity.json holds: the first stage's report, and "cascade" with the later stages' reports and the rule's.

    Raises:
        UserError: fewer than two stages, other classes, a threshold out of range, and as `export` does for each stage.
            The old repository is then untouched.
    """
    limits = limits or Limits()
    checks.check_output(output, version)
    checks.check_options(preprocess, max_batch_size)
    check_cascade(checkpoints, threshold, escalation_seconds)
    if options.get("images") is None and options.get("precision") in (None, "int8"):
        # Every stage is then measured on the same images, whether it calibrates on others of them or not.
        options |= embedded_images(checks.require_clip_and_class_set(checkpoints[0]).names, clips)
    measured: dict[int, Measured] = {}
    with atomic.folder(output) as root:
        towers = root / ".towers"
        if "precision" not in options and options.get("cache") is None:
            options["cache"] = towers  # a stage may be written in more than one precision

        def write_stage(number: int, **more: Any) -> dict[str, Any]:
            asked = options | more
            on_cpu = asked.get("device", "cpu") == "cpu" and asked.get("precision") == "float32"
            if on_cpu and asked.get("provider") is None and multiply_adds(clips[number]) < TINY:
                asked["provider"] = "cpu"
            try:
                return write(
                    checkpoints[number],
                    root / f".stage{number + 1}",
                    clip=clips[number],
                    max_batch_size=max_batch_size,
                    preprocess=preprocess,
                    limits=limits,
                    on_measured=partial(measured.__setitem__, number),
                    progress=_named(progress, number + 1, len(checkpoints)),
                    **asked,
                )
            except checks.OverBudgetError as error:
                raise checks.OverBudgetError(f"stage {number + 1}: {error}") from None

        reports = [write_stage(number) for number in range(len(checkpoints))]
        rule, problems = within_budget(reports, measured, threshold, write_stage)
        if problems and not options.get("allow_loss"):
            raise checks.OverBudgetError(f"export refused: {problems[0]}")
        shutil.rmtree(towers, ignore_errors=True)
        for number in range(1, len(checkpoints) + 1):
            _adopt(root / f".stage{number}", root, number, keep=not (as_default and number == 1))
        stages = [
            _served(checkpoint, clip, max_batch_size, limits)
            for checkpoint, clip in zip(checkpoints, clips, strict=True)
        ]
        _join(root, stages, clips, threshold, as_default, escalation_seconds, preprocess)
        _share_cores(root, clips)
        summary = reports[0] | {
            "cascade": {
                "threshold": threshold,
                "front": "vilu" if as_default else FRONT,
                "rule": rule,
                "calibration": calibration,
                "stages": reports[1:],
            }
        }
        over = [f"stage {number}: {line}" for number, one in enumerate(reports, 1) for line in one["over_budget"]]
        summary["over_budget"] = [*over, *problems]
        (root / "parity.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", "utf-8")
        _write_text(root, summary, len(stages))
        if version is not None:
            versions.add(root, output, version)
        versions.keep_class_sets(output, root)
    return summary


def check_cascade(checkpoints: Sequence[Checkpoint], threshold: float, seconds: float = ESCALATION_SECONDS) -> None:
    """Refuse stages that are no cascade. Raises UserError."""
    if len(checkpoints) < 2:
        raise UserError(f"a cascade needs at least two checkpoints, got {len(checkpoints)}")
    names = []
    for number, checkpoint in enumerate(checkpoints, 1):
        try:
            names.append(checks.require_clip_and_class_set(checkpoint).names)
        except UserError as reason:
            raise UserError(f"stage {number}: {reason}") from None
    for number, other in enumerate(names[1:], 2):
        if other != names[0]:
            raise UserError(
                f"stage {number} has other classes than stage 1; the stages of a cascade share their classes"
            )
    if not 0 <= threshold <= 1:
        raise UserError(f"a cascade's threshold must be in [0, 1], got {threshold}")
    longest = MAX_LIMITS["queue_seconds"]  # a wait that never ends would fill the places of those that wait
    if not 0 < seconds <= longest:
        raise UserError(f"escalation_seconds must be above 0 and at most {longest:g}, got {seconds:g}")


def _named(progress: Progress | None, number: int, count: int) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, total: progress(f"stage {number} of {count}: {what}", done, total)


def _served(checkpoint: Checkpoint, clip: Clip, max_batch_size: int, limits: Limits) -> Served:
    class_set = checks.require_clip_and_class_set(checkpoint)
    threshold, fingerprint = checkpoint.threshold, clip.spec.fingerprint
    return Served(class_set, threshold, fingerprint, max_batch_size, limits, digest(checkpoint), "", checkpoint.outlier)


def _prefix(number: int) -> str:
    return "" if number == 1 else f"stage{number}_"


def _adopt(stage: Path, root: Path, number: int, *, keep: bool) -> None:
    """Move a stage's models from its own repository into the cascade's; a later stage's get their prefix."""
    if number == 1:
        for path in stage.iterdir():
            if path.name not in ("preprocess", "class_sets") and (keep or path.name not in ("vilu", "vilu_open")):
                path.rename(root / path.name)
    else:
        for name in STAGE_MODELS:
            target = root / (_prefix(number) + name)
            (stage / name).rename(target)
            config = load_config(target / CONFIG)
            config.name = target.name
            for step in config.ensemble_scheduling.step:
                step.model_name = _prefix(number) + step.model_name
            save_config(target, config)
        (stage / "parity.md").rename(root / f".parity{number}.md")
    shutil.rmtree(stage)


def _join(
    root: Path,
    stages: Sequence[Served],
    clips: Sequence[Clip],
    threshold: float,
    as_default: bool,
    seconds: float,
    preprocess: str,
) -> None:
    """Write what all stages share: the decoder, the class sets, the router and the front models."""
    names: dict[Any, str] = {}
    pixels = []
    for clip in clips:
        transform = replace(clip.transform, mode=preprocess)
        pixels.append(names.setdefault(transform, "PIXELS" if not names else f"PIXELS_{len(names) + 1}"))
    by_name = {name: transform for transform, name in names.items()}
    first = by_name.pop("PIXELS")
    models.write_preprocess(root / "preprocess", first, stages[0], by_name)
    later = [
        {
            "fingerprint": stage.fingerprint,
            "dim": stage.dim,
            "templates": list(stage.class_set.templates),
            "text_model": f"{_prefix(number)}vilu_text",
        }
        for number, stage in enumerate(stages[1:], 2)
    ]
    models.write_class_sets(root / "class_sets", stages[0], later)
    # Pixels of the first stage's kind are there; a later stage makes others from the file of an image that goes on.
    size = clips[0].transform.size
    kinds: Tensors = {"PIXELS": ("TYPE_UINT8", [size, size, 3]), "IMAGE": ("TYPE_STRING", [1])}
    wanted = {name: kinds[name] for name in sorted({_given(one) for one in pixels[1:]})}
    about = [
        {"prefix": _prefix(number), "dim": stage.dim, "pixels": name}
        | ({"model": f"{_prefix(number)}vilu"} if number > 1 else {})
        for number, (stage, name) in enumerate(zip(stages, pixels, strict=True), 1)
    ]
    for number, (stage, name) in enumerate(zip(stages[1:], pixels[1:], strict=True), 2):
        given = _given(name)
        for candidates in (False, True):
            _write_stage(root, _prefix(number), stage, name, {given: kinds[given]}, candidates=candidates)
    # On a GPU the head is a kernel that only vilu_head runs.
    graphs = sorted((root / "vilu_head" / "1").glob("*.onnx"))
    own = any(path.stem == "model" for path in graphs)
    _write_router(root / ROUTER, stages, about, wanted, threshold, seconds, wait=ROUTER_WAIT if own else 0)
    for path in graphs if own else ():
        copy_graph(path, root / ROUTER / "1" / path.name)
    for front in (FRONT, "vilu") if as_default else (FRONT,):
        _write_front(root / front, stages[0], wanted, head=None if own else "vilu_head", candidates=False)
        _write_front(root / f"{front}_open", stages[0], wanted, head="vilu_embeddings", candidates=True)


def _given(pixels: str) -> str:
    """What a later stage with these pixels is given: the first stage's, or the file, of which it makes its own."""
    return "PIXELS" if pixels == "PIXELS" else "IMAGE"


def _share_cores(root: Path, clips: Sequence[Clip]) -> None:
    """Have the stages, which compute side by side, share the cores of a CPU, later stages first."""
    for number, clip in enumerate(clips, 1):
        tower = root / f"{_prefix(number)}clip_image"
        given = load_config(tower / CONFIG).parameters
        if "intra_op_thread_count" not in given:  # on a GPU
            continue
        nice = str(FIRST_NICE * (len(clips) - number) // (len(clips) - 1))
        # A thread that is tied to a core waits for another tower's there, and its own tower's others for it.
        shared = {"nice": nice, "pin_threads": "no"}
        size, threads = multiply_adds(clip), int(given["intra_op_thread_count"].string_value)
        if size < SMALL:
            shared["intra_op_thread_count"] = str(1 if size < TINY else max(1, threads // len(clips)))
        _set_parameters(tower, shared)
        _set_parameters(root / f"{_prefix(number)}clip_text", {"nice": str(FIRST_NICE + TEXT_NICE)})  # it waits for all
        if number == 1:
            _set_parameters(root / "preprocess", {"nice": nice})


def _set_parameters(folder: Path, values: dict[str, str]) -> None:
    config = load_config(folder / CONFIG)
    for name, value in values.items():
        config.parameters[name].string_value = value
    save_config(folder, config)


def _write_stage(root: Path, prefix: str, served: Served, pixels: str, image: Tensors, *, candidates: bool) -> None:
    """Write the ensemble that the router asks of a later stage, for all of the stage's steps in one call.

    Args:
        pixels: the name of the stage's pixels among the outputs of `preprocess`.
        image: what the router gives: the image, or its PIXELS where they are the first stage's, too.
        candidates: the request brings LABELS of its own.
    """
    own = models.LABELS if candidates else {}
    head = "vilu_embeddings" if candidates else "vilu_head"
    answers = {name: name for name in models.HEAD_TENSORS}
    # IMAGE_EMBEDDING is an output and an input of a step: right only where all outputs are asked for, as the router
    # does (see `repository.write_answering`).
    embedding = {"IMAGE_EMBEDDING": "IMAGE_EMBEDDING"}
    steps = [
        Step(f"{prefix}clip_image", {"PIXELS": pixels}, embedding),
        Step(prefix + head, embedding | dict.fromkeys(own, "LABELS"), answers),
    ]
    if "IMAGE" in image:
        steps.insert(0, Step("preprocess", {"IMAGE": "IMAGE"}, {pixels: pixels}))
    write_ensemble(
        root / (f"{prefix}vilu_open" if candidates else f"{prefix}vilu"),
        {**image, **own},
        {**models.HEAD_TENSORS, "IMAGE_EMBEDDING": ("TYPE_FP32", [served.dim])},
        steps,
        served.max_batch_size,
    )


def _write_router(
    folder: Path,
    stages: Sequence[Served],
    about: Sequence[dict[str, Any]],
    image: Tensors,
    threshold: float,
    seconds: float,
    *,
    wait: int,
) -> None:
    models.write_head_files(folder, stages[0].class_set, "vilu_router/model.py")
    dim = max(stage.dim for stage in stages)
    inputs: Tensors = {
        **models.HEAD_TENSORS,
        "IMAGE_EMBEDDING": ("TYPE_FP32", [stages[0].dim]),
        **image,
        **models.LABELS,
        "ANSWERED": ("TYPE_FP32", [2 + dim]),
    }
    write_config(
        folder,
        backend="python",
        inputs=inputs,
        outputs={**models.ANSWER_TENSORS, **models.CLASS_SET, **STAGE, "ANSWERED": inputs["ANSWERED"], **DETAILS},
        max_batch_size=stages[0].max_batch_size,
        limits=stages[0].limits,
        parameters={
            **stages[0].head_parameters,
            "fingerprint": stages[0].fingerprint,
            "intra_op_thread_count": "1",
            "cascade_threshold": repr(threshold),
            "stages": json.dumps(list(about)),
            "max_waiting": str(min(stages[0].limits.max_queue or WAITING, WAITING)),
            "escalation_seconds": repr(float(seconds)),
            "checkpoint": hashlib.sha256(repr((threshold, [one.checkpoint for one in stages])).encode()).hexdigest(),
        },
        queue_limit=False,
        ragged=list(inputs),  # a request brings a stage's answer, or asks for the details of one
        wait=wait,
    )


def _write_front(folder: Path, served: Served, image: Tensors, *, head: str | None, candidates: bool) -> None:
    """Write the ensemble that a client asks. As in `repository.write_answering`, a step waits for the one before, and
    the details are a step of their own, which Triton skips where no output of it is asked for.

    Args:
        image: what the router takes of an image, besides its embedding.
        head: the model that answers for stage 1; None: the router does.
    """
    own = models.LABELS if candidates else {}
    first = {name: f"first_{name}" for name in models.HEAD_TENSORS} if head else {}
    labels = dict.fromkeys(own, "LABELS")
    answer = {name: name for name in (*models.ANSWER_TENSORS, *models.CLASS_SET, *STAGE)} | {"ANSWERED": "answered"}
    places = {"PIXELS": "pixels", "IMAGE": "IMAGE"}
    carried = {"IMAGE_EMBEDDING": "embedding", **{name: places[name] for name in image}, **labels}
    steps = [
        Step("preprocess", {"IMAGE": "IMAGE"}, {"PIXELS": "pixels"}),
        Step("clip_image", {"PIXELS": "pixels"}, {"IMAGE_EMBEDDING": "embedding"}),
        Step(ROUTER, first | carried, answer),
        Step(ROUTER, {"ANSWERED": "answered", **labels}, {name: name for name in DETAILS}),
    ]
    if head:
        steps.insert(2, Step(head, {"IMAGE_EMBEDDING": "embedding", **labels}, first))
    write_ensemble(
        folder,
        {"IMAGE": ("TYPE_STRING", [1]), **own},
        {**models.ANSWER_TENSORS, **models.CLASS_SET, **STAGE, **DETAILS},
        steps,
        served.max_batch_size,
    )


def _write_text(root: Path, summary: dict[str, Any], count: int) -> None:
    """Put the rule, and the later stages' reports, into parity.md, and the cascade's models into README.md."""
    cascade, first = summary["cascade"], root / "parity.md"
    rule = cascade["rule"]
    shares = ", ".join(f"stage {number} {share:.1%}" for number, share in enumerate(rule["stages"], 1))
    parts = [
        f"# Parity of this cascade of {count} stages\n\nAn image goes on to the next stage where P(failure) > "
        f"{cascade['threshold']:g}. Of the {rule['images']} images the stages answer: {shares}. "
        f"{rule['routed_differently']} images get another stage's answer than with the eager models, "
        f"{rule['not_near']} of them not within {HEAD_BUDGET.error:g} of the threshold; "
        f"{rule['argmax_agreement']:.2%} of the images get the same class.\n"
    ]
    for number in range(1, count + 1):
        path = first if number == 1 else root / f".parity{number}.md"
        text = path.read_text("utf-8").removeprefix("# ")
        if number > 1:  # the picture is the first stage's
            text = "\n".join(line for line in text.split("\n") if not line.startswith("!["))
            path.unlink()
        parts.append(f"# Stage {number}: {text}")
    first.write_text("\n".join(parts), "utf-8")
    with (root / "README.md").open("a", encoding="utf-8") as readme:
        readme.write((models.TEMPLATES / "README.cascade.md").read_text("utf-8"))
        if cascade["front"] != FRONT:
            readme.write(f"`{cascade['front']}` and `{cascade['front']}_open` are this cascade, too.\n")
