"""Where an export is refused: the checks of what was asked, in the order of `export`, and that of the parity budget.

A check that belongs to one value is beside it, and is called from here or from `export`: `precision.check`,
`versions.check`, `cuda_head.check_archs`, `Limits`, and `sample.draw_sample` for the images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vilu.checkpoint import Checkpoint
from vilu.class_set import ClassSet
from vilu.clip import Clip
from vilu.errors import FailedError, UserError
from vilu.export import parity, precision, versions
from vilu.export.limits import Limits
from vilu.export.model_config import Runtime
from vilu.preprocess.image import MODES
from vilu.serving.backends.onnxruntime import session


class OverBudgetError(FailedError):
    """The written graphs are over their precision's parity budget."""


def check_output(output: Path, version: int | None) -> None:
    """Refuse a folder that no export wrote, unless it is empty, and a version that is there already."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output}: exists and is not a folder")
    names = {entry.name for entry in output.iterdir()} - {"README.md", ".gitkeep"} if output.is_dir() else set()
    if names and "parity.json" not in names:
        raise UserError(f"{output}: holds files that no export wrote; name an empty or new folder")
    if version is not None:
        versions.check(output, version)


def choose_runtime(device: str, provider: str | None, kind: str, cores: int | None, engines: str) -> Runtime:
    """What runs the graphs, with the defaults filled in; refuses what does not fit together or is not installed.

    Args:
        kind: the precision. The others are as `export` has them.
    """
    if device not in ("cpu", "gpu"):
        raise UserError(f"device must be cpu or gpu, got {device!r}")
    openvino = session.has_openvino()
    if provider is None:
        provider = "cuda" if device == "gpu" else "openvino" if openvino else "cpu"
    precision.check(kind, device, provider, has_openvino=openvino, has_bfloat16=session.has_bfloat16())
    if cores is not None and cores < 1:
        raise UserError(f"cores must be at least 1, got {cores}")
    return Runtime(device, provider, kind, cores or session.cores(), engines)


def check_options(preprocess: str, max_batch_size: int) -> None:
    """Refuse a way to decode that does not exist, and batches of one."""
    if preprocess not in MODES:
        raise UserError(f"preprocess must be one of {', '.join(MODES)}, got {preprocess!r}")
    if max_batch_size < 2:
        raise UserError(f"max_batch_size must be at least 2, got {max_batch_size}")


def require_clip_and_class_set(checkpoint: Checkpoint) -> ClassSet:
    """The checkpoint's class set; refuses a checkpoint that lacks it, or does not name its CLIP."""
    if checkpoint.clip is None or checkpoint.class_set is None:
        raise UserError("this checkpoint holds no CLIP name and class set, so it cannot be served; train one with both")
    return checkpoint.class_set


def check_clip(checkpoint: Checkpoint, clip: Clip, class_set: ClassSet, limits: Limits) -> None:
    """Refuse a CLIP or a class set whose embeddings the head does not read, and limits below what the CLIP reads."""
    side = clip.transform.size
    if limits.max_image_pixels < side * side:
        raise UserError(f"max_image_pixels must be at least {side}x{side}, what this CLIP reads")
    with torch.no_grad():
        width = clip.encode_pixels(torch.zeros(1, side, side, 3, dtype=torch.uint8)).shape[1]
    for what, found in (("CLIP " + clip.spec.name, width), ("its class set", class_set.text_embeddings.shape[1])):
        if found != checkpoint.head.dim:
            raise UserError(f"the head reads embeddings {checkpoint.head.dim} wide, {what} gives {found}")


def check_parity(report: Mapping[str, Any], *, allow_loss: bool) -> list[str]:
    """Refuse graphs that are over their precision's budget; `allow_loss` keeps them, unless a value is not finite.

    Returns:
        One line for everything that is over the budget.

    Raises:
        OverBudgetError: the graphs are refused.
    """
    problems = list(parity.over_budget(report))
    broken = [problem for problem in problems if parity.NOT_FINITE in problem]
    if broken or (problems and not allow_loss):
        first, more = (broken or problems)[0], len(problems) - 1
        raise OverBudgetError(f"export refused: {first}" + (f" (and {more} more)" if more else ""))
    return problems
