"""Folders of images: one directory per class, alone or in each split."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vilu.data.image_files import CONVERT, OTHERS, SUFFIXES, ignored, walk
from vilu.data.source import FileSource
from vilu.data.splits import no_split, split_named
from vilu.data.tables import TABLES
from vilu.errors import UserError


def open_folder(folder: Path, split: str) -> FileSource:
    """Open a folder with one directory per class. A class's images may be anywhere below its directory.

    The directory's name is the class name, with _ read as a space. Hidden files, __MACOSX and directories without
    images are ignored. Directories named as splits (train, training, val, valid, validation, dev, test, testing, ... in
    any case) that hold class directories are splits. A folder without them gives the same data for every split. Images
    of other kinds than JPEG, PNG and WebP are listed in `skipped`.

    Args:
        folder: the folder.
        split: "train", "val" or "test".

    Raises:
        UserError: the folder does not exist, holds no images or fewer than two classes, lacks the split, its splits
            have different classes, a directory named as a split stands beside or below class directories, all its
            directories hold the same class directories, as splits of other names do, or a class has only images of
            other kinds.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
    name, names = folder.name or str(folder), _with_images(folder)
    splits = _split_folders(folder, names)
    if splits:
        if split not in splits:
            raise no_split(folder, split, splits)
        names = _class_folders(splits, split)
        folder = splits[split]
    else:
        _refuse_unnamed_splits(folder, names)
    others = _others(folder, names)
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES)
    hint = f"; for captions name the table, such as {tables[0]}" if tables else ""
    if not names:
        raise UserError(f"{folder}: holds no {', '.join(SUFFIXES)} files in class directories{hint}")
    if len(names) < 2:
        if len(_with_images(folder / names[0])) > 1:
            hint = f"; is the data in {folder / names[0]}?"
        raise UserError(f"{folder}: needs at least two class directories with images, found 1{hint}")
    paths, labels, found = read_classes(folder, names)
    number = np.array([names.index(one) for one in found], np.int64)
    return FileSource(
        name=name,
        root=folder,
        paths=paths,
        labels=number[labels],
        class_names=tuple(one.replace("_", " ") for one in names),
        skipped=tuple(f"{folder / path}: {CONVERT}" for path in others),
    )


def _others(folder: Path, names: list[str]) -> list[str]:
    """Return the images that are not read. Raises UserError where a directory has no others, and so is no class."""
    found = []
    for directory in _directories(folder):
        here = sorted(os.path.join(directory, path) for path in walk(folder / directory, OTHERS))
        if here and directory not in names:
            raise UserError(f"{folder / here[0]}: {CONVERT}; {directory!r} holds no other images")
        found += here
    return found


def _split_folders(folder: Path, names: list[str]) -> dict[str, Path]:
    """Return the folder of each split, or nothing where no directory is named as a split."""
    splits: dict[str, Path] = {}
    for name in names:
        split = split_named(name)
        if split is None:
            continue
        if split in splits:
            raise UserError(f"{folder}: {splits[split].name!r} and {name!r} both name the {split} split; keep one")
        splits[split] = folder / name
    others = [name for name in names if split_named(name) is None]
    if splits and others:
        one = next(iter(splits.values()))
        raise UserError(
            f"{folder}: {one.name!r} is named as a split, {others[0]!r} beside it is not. If {one.name!r} is a class, "
            f"rename its folder; if it is a split, name one split's folder ({one}) or keep only splits in this folder"
        )
    for split, path in splits.items():
        inner = _with_images(path)
        if [split_named(name) for name in inner] == [split]:  # as in seg_train/seg_train/CLASS
            splits[split] = path / inner[0]
    return splits


def _refuse_unnamed_splits(folder: Path, names: list[str]) -> None:
    """Refuse directories that all hold the same directories: they are splits, folds or domains, and no classes."""
    if len(names) < 2:
        return
    inner = []
    for name in names:
        inner.append(set(_with_images(folder / name)))
        if len(inner[-1]) < 2 or any(image.name.lower().endswith(SUFFIXES) for image in (folder / name).iterdir()):
            return
    common = sorted(set.intersection(*inner))
    if len(common) >= 2 and 2 * len(common) >= len(set.union(*inner)):
        others = "and all others" if len(names) > 2 else f"and {names[1]!r}"
        raise UserError(
            f"{folder}: {names[0]!r} {others} hold {common[0]!r} and {common[1]!r}. If these are the classes, name one "
            f"folder ({folder / names[0]}); if {names[0]!r} is a class, put its images directly into it"
        )


def _class_folders(splits: dict[str, Path], split: str) -> list[str]:
    """Return the names of the class directories, those of the train split where there is one."""
    classes = {one: _with_images(path) for one, path in splits.items()}
    for one, names in classes.items():
        if inner := next((name for name in names if split_named(name)), ""):
            raise UserError(
                f"{splits[one] / inner}: is named as a split and lies in another; rename it if it is a class"
            )
    if not classes[split]:
        raise UserError(
            f"{splits[split]}: is named as a split, but its images are not in class directories; rename it if it is "
            "a class"
        )
    known = classes.get("train") or sorted(set().union(*classes.values()))
    # A split may lack a class. One without any class directory holds unlabelled images and is not asked for here.
    for one in (split, *classes) if split == "train" else (split,):
        if set(classes[one]) - set(known):
            odd = ", ".join(map(repr, sorted(set(classes[one]) ^ set(known))[:5]))
            raise UserError(f"{splits[one]}: class names do not match those of {splits['train']}: they differ in {odd}")
    return known


def read_classes(folder: Path, directories: list[str]) -> tuple[list[str], list[int], list[str]]:
    """Return the paths relative to folder, their labels, and the names of the directories that hold an image.

    Raises:
        UserError: a directory below a class is named as a split, or links lead from two classes to one directory.
    """
    paths: list[str] = []
    labels: list[int] = []
    names: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    for directory in directories:
        found = sorted(_images(folder, directory))
        parents = sorted({os.path.dirname(path) for path in found})
        for parent in parents:
            place = os.stat(folder / parent)
            first = seen.setdefault((place.st_dev, place.st_ino), parent)
            if first.split(os.sep)[0] != directory:
                raise UserError(
                    f"{folder / parent}: is the same folder as {folder / first}, so its images would have two classes; "
                    "remove the link"
                )
        inner = {part for parent in parents for part in parent.split(os.sep)[1:]}
        if splits := sorted(part for part in inner if split_named(part)):
            raise UserError(
                f"{folder / directory}: holds {splits[0]!r}, which is named as a split, below a class; put the splits "
                f"above the classes ({splits[0]}/{directory}), or rename {splits[0]!r} if it is none"
            )
        if found:
            paths += found
            labels += [len(names)] * len(found)
            names.append(directory)
    return paths, labels, names


def _directories(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not ignored(entry.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


def _with_images(folder: Path) -> list[str]:
    """List the directories that hold an image, at any depth."""
    return [name for name in _directories(folder) if next(_images(folder, name), None) is not None]


def _images(folder: Path, directory: str) -> Iterator[str]:
    if (folder / directory).is_dir():  # a split may lack a class
        for path in walk(folder / directory):
            yield os.path.join(directory, path)
