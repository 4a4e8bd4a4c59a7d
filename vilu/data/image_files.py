"""Finding and reading the images in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vilu.errors import UserError
from vilu.preprocess.image import FORMATS

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def image_files(folder: Path) -> list[Path]:
    """List the JPEG, PNG and WebP files below a folder, sorted by path. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder}: holds no {', '.join(SUFFIXES)} files")
    return files


def read_rgb(path: Path) -> np.ndarray:
    """Read an image as RGB pixels (H, W, 3) uint8. Raises UserError for a file that is no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded ({type(error).__name__})") from None
