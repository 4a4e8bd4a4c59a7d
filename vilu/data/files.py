"""Sources of image files: a folder with one directory per class, or a table of paths and captions."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vilu.data.image_files import SUFFIXES
from vilu.data.source import FileSource, inside
from vilu.errors import UserError

TABLES = (".csv", ".tsv", ".parquet")


def open_folder(folder: Path, split: str) -> FileSource:
    """Open a folder with one directory per class. A class's images may be anywhere below its directory.

    The directory's name is the class name, with _ read as a space. Hidden files are ignored. A folder that holds only
    directories named train, val or test, at least two of them and each with class directories, has these splits. Any
    other folder gives the same data for every split.

    Args:
        folder: the folder.
        split: "train", "val" or "test".

    Raises:
        UserError: the folder does not exist, holds no images or fewer than two classes, lacks the split, or its splits
            have different classes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
    children = set(_directories(folder))
    splits = children & {"train", "val", "test"}
    if len(splits) > 1 and splits == children and all(_directories(folder / name) for name in splits):
        if split not in splits:
            raise UserError(f"{folder}: has no split {split!r}, only {', '.join(sorted(splits))}")
        classes = set(_directories(folder / split))
        for other in sorted(splits - {split}):
            odd = sorted(classes ^ set(_directories(folder / other)))
            if odd:
                raise UserError(
                    f"{folder}: class names do not match: {split} and {other} differ in {', '.join(map(repr, odd[:5]))}"
                )
        folder = folder / split
    paths, labels, names = read_classes(folder, _directories(folder))
    if not paths:
        raise UserError(f"{folder}: holds no {', '.join(SUFFIXES)} files in class directories")
    if len(names) < 2:
        raise UserError(f"{folder}: needs at least two class directories with images, found {len(names)}")
    return FileSource(
        name=folder.name or str(folder),
        root=folder,
        paths=paths,
        labels=np.array(labels, np.int64),
        class_names=tuple(name.replace("_", " ") for name in names),
    )


def read_classes(folder: Path, directories: list[str]) -> tuple[list[str], list[int], list[str]]:
    """Return the paths relative to folder, their labels, and the names of the directories that hold an image."""
    paths: list[str] = []
    labels: list[int] = []
    names: list[str] = []
    for directory in directories:
        found = sorted(_images(folder, directory))
        if found:
            paths += found
            labels += [len(names)] * len(found)
            names.append(directory)
    return paths, labels, names


def _directories(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


def _images(folder: Path, directory: str) -> Iterator[str]:
    # A class directory may be a link. Links below it are not followed, because they could form a circle.
    for parent, below, files in os.walk(folder / directory):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder)


def open_table(path: Path, image_column: str, caption_column: str) -> FileSource:
    """Open a table of image paths and captions: CSV with commas, .tsv with tabs, or Parquet.

    A CSV or .tsv file is UTF-8 and starts with a header. Paths are relative to the table's folder.

    Args:
        path: the table.
        image_column: name of the column of paths.
        caption_column: name of the column of captions.

    Raises:
        UserError: the table cannot be read, lacks a column, has no rows or an empty caption, or a path leaves its
            folder.
    """
    rows = _parquet(path, image_column, caption_column) if path.suffix == ".parquet" else None
    paths: list[str] = []
    captions: list[str] = []
    for where, image, caption in rows or _csv(path, image_column, caption_column):
        if not caption or not caption.strip():
            raise UserError(f"{where}: empty caption")
        paths.append(inside(path.parent, image or "", where))
        captions.append(caption.strip())
    if not paths:
        raise UserError(f"{path}: holds no rows")
    return FileSource(name=path.stem, root=path.parent, paths=paths, captions=captions)


Row = tuple[str, str | None, str | None]


def _csv(path: Path, image_column: str, caption_column: str) -> Iterator[Row]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            _need_columns(path, reader.fieldnames or (), image_column, caption_column)
            for row in reader:
                yield f"{path}: line {reader.line_num}", row[image_column], row[caption_column]
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 CSV ({error})") from None


def _parquet(path: Path, image_column: str, caption_column: str) -> Iterator[Row]:
    file = open_parquet(path)
    _need_columns(path, file.schema_arrow.names, image_column, caption_column)
    try:
        number = 0
        for batch in file.iter_batches(columns=[image_column, caption_column]):
            for row in batch.to_pylist():
                number += 1
                image, caption = row[image_column], row[caption_column]
                if not isinstance(image, str | None) or not isinstance(caption, str | None):
                    raise UserError(f"{path}: columns {image_column!r} and {caption_column!r} must hold text")
                yield f"{path}: row {number}", image, caption
    except UserError:
        raise
    except Exception as error:  # Arrow raises many types on damaged files; the user gets one message for all
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None


def open_parquet(path: Path) -> Any:
    """Open pyarrow's ParquetFile. Raises UserError without pyarrow, or for a file that is not Parquet."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'vilu[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # as in `_parquet`
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type where the message is empty."""
    return next(islice(str(error).splitlines(), 1), "") or type(error).__name__


def _need_columns(path: Path, columns: Iterable[str], *needed: str) -> None:
    names = list(columns)
    for column in needed:
        if column not in names:
            raise UserError(f"{path}: has no column {column!r}, only {', '.join(map(repr, names[:8])) or 'none'}")
