"""`export`: write a model repository from a checkpoint, whole and within its parity budget, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vilu import atomic
from vilu.checkpoint import Checkpoint, load_checkpoint
from vilu.clip import Clip, load_clip_for
from vilu.export import build, checks, cuda_head, measure, parity, report, versions
from vilu.export.cache import Cache
from vilu.export.job import Job, Progress, Ticker
from vilu.export.limits import Limits
from vilu.export.sample import draw_sample


def export(
    checkpoint: Checkpoint | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    clip: Clip | None = None,
    images: Sequence[np.ndarray] | None = None,
    labels: Sequence[int] | None = None,
    precision: str = "float32",
    allow_loss: bool = False,
    max_batch_size: int = 32,
    device: str = "cpu",
    provider: str | None = None,
    cores: int | None = None,
    cuda_archs: Sequence[int] = cuda_head.ARCHS,
    engines: str = "/var/cache/vilu/engines",
    preprocess: str = "exact",
    version: int | None = None,
    limits: Limits | None = None,
    cache: Path | None = None,
    tried: Sequence[Mapping[str, Any]] = (),
    on_measured: Callable[[measure.Measured], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a Triton model repository, whole and within its parity budget, or not at all.

    Every check that refuses an export is in `vilu.export.checks`.

    Args:
        checkpoint: a Checkpoint with its clip and class_set, or a path to one.
        output: the repository's folder; replaced whole, by renaming, once every graph is within the budget.
        clip: the loaded CLIP; by default the one the checkpoint names.
        images: at least 256 uint8 images (H, W, 3) to measure parity on; by default held-out digits and shapes
            of the embedded default. int8 takes 64 to 128 of them, drawn at random, for calibration alone.
        labels: the images' class indices, -1 where unknown: what the precision costs in AUC and FPR95 is then measured.
        precision: of the towers: "float32", "float16" (GPU), "bfloat16" (CPU) or "int8"; the head is float32.
        allow_loss: keep an export that is over its precision's budget; parity.json then says so.
        max_batch_size: the largest batch the server forms.
        device: "cpu", or "gpu": every graph on the GPU, and the head as the fused kernel's cubins.
        provider: what runs the towers. On a CPU "openvino" or "cpu", by default the first that is installed; on a GPU
            "cuda", the default, or "tensorrt".
        cores: what a CPU server may use; by default as many as this process may.
        cuda_archs: compute capabilities to compile the kernel for (90 is 9.0); no GPU is needed. Cubins run on a GPU
            alone, so parity is measured on the folded head that they are compiled from.
        engines: folder on the server for TensorRT's engines. They are code, so nobody else may write there.
        preprocess: "exact", or "fast": large JPEGs are decoded at reduced scale (vilu.preprocess.image.Transform).
        version: keep what the folder holds and add this export beside it; the server's next start serves it
            (`vilu.export.versions.use` goes back). None: replace the folder.
        limits: what the server refuses.
        cache: folder that keeps traced towers and what they answered, for the next export of the same CLIP
            (`vilu.export.cache`); None keeps nothing.
        tried: what `vilu.export.auto` measured to choose the precision, for the report.
        on_measured: called with what was measured, once it is within the budget.
        progress: called with (what, steps done, steps in all).

    Returns:
        What parity.json holds.

    Raises:
        UserError: the device, provider, precision or compute capability is unknown or they do not fit together; the
            checkpoint lacks CLIP or class set, or has another CLIP; the output folder is no model repository or cannot
            be written; there are too few images; the version exists; or a graph is over the parity budget. The old
            repository is then untouched.

    Examples:
        >>> from vilu.export import export
        >>> export("no-such-file.safetensors", "model_repository")
        Traceback (most recent call last):
            ...
        vilu.errors.UserError: no-such-file.safetensors: cannot be read (No such file or directory)

        A real export takes half a minute or more, so this is no test: `report = export("head.safetensors",
        "serving/model_repository")`; then `report["answers"]` says what changed for the user.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    output, limits = Path(output), limits or Limits()
    checks.check_output(output, version)
    runtime = checks.choose_runtime(device, provider, precision, cores, engines)
    archs = tuple(sorted(set(cuda_archs))) if device == "gpu" else ()
    if device == "gpu":
        cuda_head.check_archs(archs)
    checks.check_options(preprocess, max_batch_size)
    class_set = checks.require_clip_and_class_set(checkpoint)
    if clip is None:
        clip = load_clip_for(checkpoint)
    checks.check_clip(checkpoint, clip, class_set, limits)
    sample = draw_sample(clip, class_set.names, images, labels, calibrate=precision == "int8")
    job = Job(checkpoint, clip, class_set, sample, max_batch_size, runtime, limits, archs, preprocess, Cache(cache))
    with atomic.folder(output) as staging:
        tick = Ticker(progress, 12 + len(archs) + len(parity.batch_sizes(max_batch_size)))
        build.write_graphs(job, staging, tick)
        build.write_models(job, staging)
        measured = measure.measure(job, staging, tick)
        summary = report.build(job, measured.figures)
        if tried:
            summary["tried"] = list(tried)
        summary["over_budget"] = checks.check_parity(summary, allow_loss=allow_loss)
        if on_measured:
            on_measured(measured)
        report.write(staging, summary, measured)
        tick.progress("checked", tick.total, tick.total)
        if version is not None:
            versions.add(staging, output, version)
        versions.keep_class_sets(output, staging)
    return summary
