"""The inputs that an export is measured on: images, their labels where known, and texts; others calibrate int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vilu import tiny
from vilu.class_set import prompts
from vilu.clip import Clip
from vilu.data.image_files import image_files, read_rgb
from vilu.errors import UserError
from vilu.preprocess.image import pixels

MIN_INPUTS = 256
CALIBRATION = 128
MIN_CALIBRATION = 64


@dataclass(frozen=True)
class Sample:
    """What an export is measured on.

    Attributes:
        pixels: (N, S, S, 3) uint8, to measure on.
        labels: (N,) class indices, -1 where unknown.
        calibration: (M, S, S, 3) uint8, other images, to calibrate int8 on; M is 0 for other precisions.
    """

    pixels: np.ndarray
    labels: np.ndarray
    calibration: np.ndarray


def draw_sample(
    clip: Clip,
    names: Sequence[str],
    images: Sequence[np.ndarray] | None,
    labels: Sequence[int] | None,
    *,
    calibrate: bool,
) -> Sample:
    """Split images at random, the same way each time; by default held-out digits and shapes of the embedded CLIP.

    Args:
        names: the class names.
        images: uint8 images (H, W, 3) of any sizes.
        labels: their class indices, -1 where unknown.
        calibrate: keep 64 to 128 images to calibrate int8 on.

    Raises:
        UserError: there are too few images, labels do not fit, or there is nothing to calibrate another CLIP on.
    """
    needed = MIN_INPUTS + (MIN_CALIBRATION if calibrate else 0)
    if images is None:
        if calibrate and clip.spec.name not in tiny.FOLDERS:
            raise UserError("int8 is calibrated on your own images: give --images")
        images, labels = _embedded(names, MIN_INPUTS + (CALIBRATION if calibrate else 0))
    if len(images) < needed:
        split = f" ({MIN_CALIBRATION} to calibrate on, {MIN_INPUTS} others to measure on)" if calibrate else ""
        raise UserError(f"parity needs at least {needed} images{split}, got {len(images)}")
    known = np.full(len(images), -1) if labels is None else np.asarray(labels, np.int64)
    if len(known) != len(images) or known.min() < -1 or known.max() >= len(names):
        raise UserError(f"{len(images)} images need as many labels from -1 (unknown) to {len(names) - 1}")
    order = np.random.default_rng(0).permutation(len(images))
    kept = min(CALIBRATION, len(images) - MIN_INPUTS) if calibrate else 0
    side = clip.transform.size
    read = [pixels(Image.fromarray(images[i]), clip.transform) for i in order]
    first = np.stack(read[:kept]) if kept else np.empty((0, side, side, 3), np.uint8)
    return Sample(np.stack(read[kept:]), known[order[kept:]], first)


def _embedded(names: Sequence[str], count: int) -> tuple[list[np.ndarray], list[int]]:
    from vilu.tiny import data

    half = count // 2
    digits, shapes = data.digits("test"), data.shapes("test", half)
    index = {name: i for i, name in enumerate(names)}
    images = [*digits.images[:half], *shapes.images]
    labels = [index.get(source.names[label], -1) for source in (digits, shapes) for label in source.labels[:half]]
    return images, labels


def embedded_images(names: Sequence[str], clips: Sequence[Clip]) -> dict[str, Any]:
    """The images and labels that `draw_sample` takes by default, enough to calibrate on; none for another CLIP."""
    if not all(clip.spec.name in tiny.FOLDERS for clip in clips):
        return {}
    images, labels = _embedded(names, MIN_INPUTS + CALIBRATION)
    return {"images": images, "labels": labels}


def from_folder(folder: Path, names: Sequence[str], count: int) -> tuple[list[np.ndarray], list[int] | None]:
    """Draw at most `count` images below a folder at random, the same each time.

    Images in a sub-folder named as a class (_ is read as a space) have that class's label.

    Returns:
        The images, uint8 (H, W, 3), and their class indices, -1 where unknown; None where no label is known.

    Raises:
        UserError: there are no images, or one cannot be decoded.
    """
    files = image_files(folder)
    drawn = np.sort(np.random.default_rng(0).permutation(len(files))[:count])
    chosen = [files[i] for i in drawn]
    index = {name: i for i, name in enumerate(names)}
    index |= {name.replace("_", " "): i for name, i in index.items() if name.replace("_", " ") not in index}
    labels = [index.get(path.relative_to(folder).parts[0].replace("_", " "), -1) for path in chosen]
    return [read_rgb(path) for path in chosen], labels if max(labels) >= 0 else None


def texts(names: Sequence[str], templates: Sequence[str]) -> tuple[list[str], list[str]]:
    """MIN_INPUTS texts to measure on, class prompts first, and at most CALIBRATION others to calibrate on."""
    from vilu.tiny import data

    own = prompts(names, templates)
    captions = data.shapes("test", 2 * MIN_INPUTS).captions
    measured = (own[:MIN_INPUTS] + captions)[:MIN_INPUTS]
    seen = set(measured)
    others = [text for text in own[MIN_INPUTS : MIN_INPUTS + CALIBRATION // 2] + captions if text not in seen]
    return measured, others[:CALIBRATION]
