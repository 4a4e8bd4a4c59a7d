"""Folders of images: finding them, reading them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vilu.errors import UserError
from vilu.preprocess.image import FORMATS

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def image_files(folder: Path) -> list[Path]:
    """Every JPEG, PNG and WebP below a folder, in name order. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder}: holds no {', '.join(SUFFIXES)} files")
    return files


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises UserError for a file that is no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded ({type(error).__name__})") from None
