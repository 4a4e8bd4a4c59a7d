"""Finding and reading the images in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vilu.errors import UserError
from vilu.preprocess.image import FORMATS

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Images that are not read, so that nobody misses them without a word.
OTHERS = (
    *(".jfif", ".jpe", ".jp2", ".bmp", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".avif", ".jxl", ".ppm", ".pgm"),
)
CONVERT = "is not .jpg, .png or .webp; convert it, or rename it if it is a JPEG"
# Folders that systems and storage servers make. ".name" is hidden anyway.
JUNK = (
    *("__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information", "lost+found"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
)


def ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden or made by a system, so that no image is looked for in it."""
    return name.startswith(".") or name.lower() in JUNK


def walk(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[str]:
    """Yield the paths of the files with these endings below a folder, relative to it, in no order.

    Links are followed, each folder once.

    Raises:
        UserError: a folder cannot be listed, so files would be left out.
    """
    seen = set[tuple[int, int]]()
    for parent, below, files in os.walk(folder, onerror=_refuse, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in seen:  # a link to a folder above it would have no end
            below.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        below[:] = sorted(name for name in below if not ignored(name))
        for name in files:
            if name.lower().endswith(suffixes) and not ignored(name):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def image_files(folder: Path) -> list[Path]:
    """List the JPEG, PNG and WebP files below a folder, sorted by path, as `walk` finds them.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
    files = sorted(path for name in walk(folder) if (path := folder / name).is_file())
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
