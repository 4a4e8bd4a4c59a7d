"""`vilu export` writes ONNX graphs and a Triton model repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output as said
from vilu.cli.command import Command, RenamedOption
from vilu.cli.options import (
    PATH,
    REPOSITORY,
    SECONDS,
    FloatRange,
    check_stages,
    clip_options,
    default_cache,
    stages_argument,
    template_option,
)
from vilu.cli.progress import progress_bar
from vilu.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vilu.checkpoint import Checkpoint
    from vilu.class_set import ClassSet


@click.command("export", cls=Command, extra="export")
@stages_argument
@click.option("--ckpt", type=PATH, help="Checkpoint of a ViLU head.")
@click.option(
    "--cascade",
    is_flag=True,
    help="Export a cascade: name a checkpoint for each stage, the smallest CLIP first. An image goes on to the next "
    "stage where its failure probability is above --cascade-threshold.",
)
@click.option(
    "--cascade-threshold",
    metavar="FILE|NUMBER",
    help="Threshold of a cascade: the file that `vilu calibrate --cascade --output` wrote, or a number from 0 to 1.",
)
@click.option(
    "--cascade-default",
    is_flag=True,
    help="Serve the cascade as `vilu` and `vilu_open`, too, so that clients need not name it.  [default: as "
    "`vilu_cascade` alone]",
)
@click.option(
    "--escalation-seconds",
    type=SECONDS,
    help="Seconds that a cascade waits for its later stages; then it gives the answer so far, rejected.  [default: 20]",
)
@click.option(
    "--output",
    type=PATH,
    default=REPOSITORY,
    show_default=True,
    help="Model repository to write. It is replaced whole.",
)
@click.option(
    "--classes",
    type=PATH,
    help="File with other class names, one per line; for a head alone their text_embeddings (.npz, .safetensors).",
)
@click.option(
    "--embeddings",
    type=PATH,
    help="Embeddings to measure a head alone on, as `vilu train --embeddings` takes them.  [default: drawn at random]",
)
@template_option
@clip_options
@click.option(
    "--images",
    type=PATH,
    help="Folder of images to measure parity on: at least 256, and 320 for int8. Sub-folders named after classes give "
    "the labels.",
)
@click.option(
    "--parity-images",
    type=click.IntRange(min=256),
    default=256,
    show_default=True,
    help="Number of images to draw from --images.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "float16", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="Precision of the CLIP towers: float16 for GPUs, bfloat16 for CPUs that have it, int8 calibrated on --images; "
    "auto for a CPU measures them all here, and takes the fastest that is within its budget.",
)
@click.option(
    "--cpu-flags",
    metavar="LIST",
    help="What the servers' CPU can do, as /proc/cpuinfo names it (avx2,avx512_vnni), for --precision auto.  "
    "[default: as this machine]",
)
@click.option(
    "--allow-loss",
    is_flag=True,
    help="Keep an export that loses more than its precision's budget allows. parity.json then says so.",
)
@click.option(
    "--preprocess",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="How images are decoded: exact as open_clip does, or fast, which decodes large JPEGs at reduced scale.",
)
@click.option(
    "--threshold",
    type=FloatRange(0, 1),
    help="Failure probability below which an answer is accepted.  [default: the checkpoint's]",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(2, 1024),
    default=32,
    show_default=True,
    help="Largest batch that the served models take.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "gpu"]), help="Device that the servers run the models on.  [default: cpu]"
)
@click.option(
    "--provider",
    type=click.Choice(["openvino", "cpu", "cuda", "tensorrt"]),
    help="ONNX Runtime provider that runs the towers.  [default: openvino where installed, else cpu; for GPUs cuda]",
)
@click.option(
    "--cores", type=click.IntRange(min=1), help="Number of cores that a CPU server has.  [default: this machine's]"
)
@click.option(
    "--tensorrt-cache",
    "engines",
    cls=RenamedOption,
    old="--engines",
    default="/var/cache/vilu/engines",
    show_default=True,
    help="Folder on the server that keeps TensorRT's engines.",
)
@click.option(
    "--cuda-arch",
    metavar="LIST",
    help="Compute capabilities to compile the head for, such as 80,90. Implies --device gpu.  [default: all known]",
)
@click.option(
    "--version",
    type=click.IntRange(1),
    help="Number of the version to add beside those that are there.  [default: replace the repository]",
)
@click.option(
    "--max-queue", type=int, help="Number of requests that may wait for one model; 0 sets no limit.  [default: 256]"
)
@click.option("--queue-seconds", type=float, help="Seconds that a request may wait in a queue.  [default: 30]")
@click.option("--max-image-bytes", type=int, help="Largest encoded image, in bytes.  [default: 20 MiB]")
@click.option("--max-image-pixels", type=int, help="Largest decoded image, in pixels.  [default: 50,000,000]")
@click.option("--max-labels", type=int, help="Number of labels that a request may bring itself.  [default: 1000]")
@click.option("--max-label-bytes", type=int, help="Longest such label, in bytes of UTF-8.  [default: 256]")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="VILU_CACHE",
    default=default_cache,
    show_default="VILU_CACHE, or ~/.cache/vilu",
    help="Folder that keeps the traced towers, which makes the next export of the same CLIP fast.",
)
def export_command(
    stages: tuple[Path, ...],
    ckpt: Path | None,
    cascade: bool,
    cascade_threshold: str | None,
    cascade_default: bool,
    escalation_seconds: float | None,
    output: Path,
    classes: Path | None,
    embeddings: Path | None,
    templates: tuple[str, ...],
    clip_name: str | None,
    pretrained: str | None,
    images: Path | None,
    parity_images: int,
    precision: str,
    cpu_flags: str | None,
    allow_loss: bool,
    preprocess: str,
    threshold: float | None,
    max_batch_size: int,
    device: str | None,
    provider: str | None,
    cores: int | None,
    engines: str,
    cuda_arch: str | None,
    version: int | None,
    cache: Path | None,
    **limits: float | None,
) -> None:
    """Write ONNX graphs and a Triton model repository.

    Every graph is compared with the eager model. The repository's parity.md says what the precision costs; where the
    cost is over the precision's budget, nothing is written.

    A head that was trained on the embeddings of another model (`vilu train --embeddings`) is exported alone: the server
    then takes embeddings, and `vilu ask --embeddings FILE` asks it.

    The authors' .ckpt files hold no CLIP and no class names: give --clip, --pretrained and --classes for them.

    With --cascade the repository holds every stage, and `vilu ask --model vilu_cascade` asks the first, and
    the next ones where the answer is in doubt.
    """
    from dataclasses import replace

    from vilu.checkpoint import load_checkpoint
    from vilu.class_set import DEFAULT_TEMPLATES, read_names
    from vilu.clip import load_clip_for
    from vilu.export import export
    from vilu.export.auto import export_fastest
    from vilu.export.limits import Limits
    from vilu.export.sample import CALIBRATION, from_folder

    refused: dict[str, Any]
    target: dict[str, Any] = {"device": device or ("gpu" if cuda_arch else "cpu"), "provider": provider, "cores": cores}
    automatic = precision == "auto"
    if automatic and target["device"] == "gpu":
        raise UserError("--precision auto measures on this machine's CPU; for a GPU name float16 or int8")
    if automatic and allow_loss:
        raise UserError("--precision auto takes nothing over its budget; leave out --allow-loss")
    if cpu_flags is not None and not automatic:
        raise UserError("--cpu-flags is for --precision auto")
    if automatic:
        del target["device"]
        target["cpu_flags"] = None if cpu_flags is None else cpu_flags.replace(",", " ").split()
    else:
        target["precision"] = precision
    target |= {"allow_loss": allow_loss, "engines": engines, "preprocess": preprocess}
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    target |= {"version": version, "limits": Limits(**given), "cache": cache and cache / "towers"}
    if cuda_arch is not None:
        if device == "cpu":
            raise UserError("--cuda-arch is for --device gpu")
        if not all(part.strip().isdecimal() for part in cuda_arch.split(",")):
            raise UserError(f"--cuda-arch {cuda_arch!r}: expected numbers as in 80,90")
        target["cuda_archs"] = [int(part) for part in cuda_arch.split(",")]
    if cascade:
        refused = {"--ckpt": ckpt, "--classes": classes, "--embeddings": embeddings, "--template": templates}
        refused |= {"--clip": clip_name, "--pretrained": pretrained, "--threshold": threshold is not None}
        for name in (name for name, value in refused.items() if value):
            raise UserError(f"{name}: every stage of a cascade has what its checkpoint says; leave it out")
        target |= {"max_batch_size": max_batch_size, "as_default": cascade_default}
        if escalation_seconds is not None:
            target["escalation_seconds"] = escalation_seconds
        wanted = parity_images + (CALIBRATION if precision in ("int8", "auto") else 0)
        _export_cascade(
            stages, output, cascade_threshold, images, wanted, export_fastest if automatic else export, target
        )
        return
    check_stages(stages, cascade)
    for name, value in (
        ("--cascade-threshold", cascade_threshold),
        ("--cascade-default", cascade_default),
        ("--escalation-seconds", escalation_seconds),
    ):
        if value:
            raise UserError(f"{name} is for --cascade")
    if ckpt is None:
        raise UserError("give --ckpt, or --cascade with a checkpoint for each stage")
    checkpoint = load_checkpoint(ckpt)
    if checkpoint.clip is None and not clip_name and (checkpoint.class_set or embeddings or _is_matrix(classes)):
        refused = {"--images": images, "--template": templates, "--provider": provider, "--cuda-arch": cuda_arch}
        refused |= {"--precision": precision != "float32", "--device gpu": device == "gpu", "--cores": cores}
        for name in (name for name, value in refused.items() if value):
            raise UserError(f"{name}: is for CLIP's towers, and {ckpt} names no CLIP; its head is exported alone")
        _export_head(checkpoint, ckpt, output, classes, embeddings, threshold, max_batch_size, target)
        return
    if embeddings is not None:
        raise UserError(f"--embeddings: is for a head alone, and {ckpt} has a CLIP; give --images")
    missing = "give --clip and --pretrained, or the embeddings that the head was trained on as --embeddings"
    clip = load_clip_for(checkpoint, ckpt, clip_name, pretrained, missing=missing)
    class_set = checkpoint.class_set
    if classes is not None:
        old = class_set.templates if class_set else DEFAULT_TEMPLATES
        class_set = clip.class_set(read_names(classes), templates or old)
    elif templates and class_set is not None:
        class_set = clip.class_set(class_set.names, templates)
    elif class_set is None:
        raise UserError(f"{ckpt}: holds no class names; give --classes")
    checkpoint = replace(_over(checkpoint, class_set, threshold), clip=clip.spec)
    with progress_bar() as bar:
        if images is not None:
            wanted = parity_images + (CALIBRATION if precision in ("int8", "auto") else 0)
            target["images"], target["labels"] = from_folder(images, class_set.names, wanted)
        write = export_fastest if automatic else export
        report = write(checkpoint, output, clip=clip, max_batch_size=max_batch_size, **target, progress=bar)
    _show_choice(report)
    said.result(f"{output}: {report['precision']}, {_parity(report)}")
    _warn_over_budget(report)


def _export_cascade(
    paths: Sequence[Path],
    output: Path,
    threshold: str | None,
    images: Path | None,
    wanted: int,
    write: Any,
    target: dict[str, Any],
) -> None:
    """Export a cascade; `wanted`: how many images to draw from `images`."""
    from vilu.cli.cascade import load_stage, threshold_of
    from vilu.export.cascade import check_cascade, export_cascade
    from vilu.export.checks import require_clip_and_class_set
    from vilu.export.sample import from_folder

    check_stages(paths, cascade=True)
    if threshold is None:
        raise UserError(
            "a cascade needs --cascade-threshold: the file that `vilu calibrate --cascade --output FILE` writes"
        )
    loaded = [load_stage(path) for path in paths]
    checkpoints = [checkpoint for checkpoint, _ in loaded]
    number, note = threshold_of(threshold, paths, checkpoints)
    check_cascade(checkpoints, number)
    with progress_bar() as bar:
        if images is not None:
            names = require_clip_and_class_set(checkpoints[0]).names
            target["images"], target["labels"] = from_folder(images, names, wanted)
        clips = [clip for _, clip in loaded]
        summary = export_cascade(
            checkpoints, clips, output, threshold=number, calibration=note, write=write, **target, progress=bar
        )
    cascade = summary["cascade"]
    for stage, (path, report) in enumerate(zip(paths, (summary, *cascade["stages"]), strict=True), 1):
        _show_choice(report, f"stage {stage}: ")
        said.result(f"stage {stage}, {path}: {report['precision']}, {_parity(report)}")
    rule = cascade["rule"]
    said.result(
        f"{output}: {cascade['front']} goes on where P(failure) > {number:g}; of {rule['images']} images "
        f"{rule['routed_differently']} go another way than with the eager models"
    )
    _warn_over_budget(summary)


def _show_choice(report: dict[str, Any], before: str = "") -> None:
    """Print what --precision auto tried, and what int8 costs here; each line starts with `before`."""
    for row in report.get("tried", ()):
        speed = "" if row["images_per_second"] is None else f"{row['images_per_second']:.1f} images/s, "
        said.result(f"{before}{row['precision']} {row['provider']}: {speed}{row['verdict']}")
    for note in report["notes"]:
        if note.startswith("int8"):
            said.warn(f"{before}{note}")


def _parity(report: dict[str, Any]) -> str:
    """What the serving provider, which is the first, changes."""
    cost = report["answers"][next(iter(report["answers"]))]
    error = cost["failure_probability_error"]["max"]
    return f"{cost['argmax_agreement']:.2%} of the answers as the eager model's, P(failure) within {error:.1e}"


def _warn_over_budget(report: dict[str, Any]) -> None:
    for problem in report["over_budget"]:
        said.warn(f"over budget, kept by --allow-loss: {problem}")


def _is_matrix(classes: Path | None) -> bool:
    """Whether this class set's file holds text embeddings, not names alone."""
    return classes is not None and classes.suffix in (".npz", ".safetensors")


def _export_head(
    checkpoint: Checkpoint,
    ckpt: Path,
    output: Path,
    classes: Path | None,
    embeddings: Path | None,
    threshold: float | None,
    max_batch_size: int,
    target: dict[str, Any],
) -> None:
    """Export a head whose embeddings another program makes."""
    from dataclasses import replace

    from vilu.checkpoint import check_fits
    from vilu.data import load_embeddings
    from vilu.export import export_head

    measured = None if embeddings is None else load_embeddings(embeddings)
    class_set = checkpoint.class_set
    if classes is not None:
        class_set = _class_set_of(classes)
    elif class_set is None and measured is not None and measured.class_names:
        class_set = _made(measured.class_names, measured.text.normalised.float())
    if class_set is None:
        raise UserError(f"{ckpt}: holds no class names; give --classes FILE with text_embeddings and class_names")
    if measured is not None:
        check_fits(ckpt, replace(checkpoint, class_set=None), measured)
    checkpoint = _over(checkpoint, class_set, threshold)
    common = {"max_batch_size": max_batch_size, "version": target["version"], "limits": target["limits"]}
    with progress_bar() as bar:
        report = export_head(checkpoint, output, embeddings=measured, **common, progress=bar)
    said.result(f"{output}: the head alone, {_parity(report)}; ask it with `vilu ask --embeddings FILE`")


def _over(checkpoint: Checkpoint, class_set: ClassSet, threshold: float | None) -> Checkpoint:
    """The checkpoint over a class set, with another threshold unless that is None.

    The outlier score knows the classes that it was trained on. Over others it is left out, with a warning.
    """
    from dataclasses import replace

    known, outlier = checkpoint.class_set, checkpoint.outlier
    if outlier is not None:
        names = None if known is None else set(known.names)
        if len(outlier.prototypes) != len(class_set) or names not in (None, set(class_set.names)):
            said.warn("the outlier score was trained on other classes, so it is not exported")
            outlier = None
    threshold = checkpoint.threshold if threshold is None else threshold
    return replace(checkpoint, class_set=class_set, threshold=threshold, outlier=outlier)


def _class_set_of(classes: Path) -> ClassSet:
    import torch

    from vilu.serving.classes import read_set

    found = read_set(classes)
    if found.text_embeddings is None:
        raise UserError(f"{classes}: holds names alone; a head without CLIP needs their text_embeddings (.npz)")
    return _made(found.names, torch.nn.functional.normalize(torch.from_numpy(found.text_embeddings), dim=1))


def _made(names: Sequence[str], text_embeddings: Tensor) -> ClassSet:
    from vilu.class_set import ClassSet

    return ClassSet(tuple(names), ("{}",), text_embeddings)
