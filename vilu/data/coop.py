"""The paper's data sets in the layout of CoOp's DATASETS.md.

ImageNet is read from folders, FGVC-Aircraft from lists, and the others from CoOp's split files.

Class names are CoOp's. An underscore becomes a space, as in CoOp; the authors of ViLU keep the underscore. Labels are
CoOp's numbers and the same in every split. The authors number the classes by their first appearance in a split; no
score depends on the numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vilu.data.files import _directories, read_classes
from vilu.data.source import FileSource, inside
from vilu.data.splits import SPLITS
from vilu.errors import UserError

# data set -> (folder under the root, folder of the images inside it, split file)
SPLIT_FILES = {
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "flowers102": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": ("food-101", "images", "split_zhou_Food101.json"),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": ("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json"),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
}

# CLIP's list calls these two classes "missile" and "sunglasses", which are also its names for n03773504 and n04356056.
# Class names must differ, so these two get WordNet's own first word.
TWINS = {"n04008634": "projectile", "n04355933": "sunglass"}


def open_split(dataset: str, root: Path, split: str) -> FileSource:
    """Open one of the data sets in SPLIT_FILES.

    Args:
        dataset: its key in SPLIT_FILES.
        root: folder that holds the data sets, or the data set's own folder.
        split: "train", "val" or "test".

    Raises:
        UserError: the split file is missing or malformed, or a path in it leaves the folder of images.
    """
    folder, images, file_name = SPLIT_FILES[dataset]
    file = find(root, folder, file_name) / file_name
    content = _read_split(file)
    names: dict[int, str] = {}
    paths: list[str] = []
    labels: list[int] = []
    for part in SPLITS:
        for number, (path, label, name) in enumerate(content[part]):
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"{file}: class names do not match: {part}[{number}] calls class {label} {name!r}, "
                    f"before it was {names[label]!r}"
                )
            if part == split:
                paths.append(inside(file.parent / images, path, f"{file}: {part}[{number}]"))
                labels.append(label)
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{file}: labels are not 0..{len(names) - 1}: {sorted(names)[:5]}, ...")
    return FileSource(
        name=dataset,
        root=file.parent / images,
        paths=paths,
        labels=np.array(labels, np.int64),
        class_names=tuple(names[label].replace("_", " ") for label in range(len(names))),
    )


def _read_split(file: Path) -> dict[str, list[tuple[str, int, str]]]:
    def malformed(what: str) -> NoReturn:
        raise UserError(f"{file}: is no CoOp split file: {what}")

    try:
        content: Any = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        malformed(str(error).splitlines()[0])
    if not isinstance(content, dict):
        malformed("no object")
    for part in SPLITS:
        if not isinstance(content.get(part), list):
            malformed(f"no list {part!r}")
        for number, row in enumerate(content[part]):
            if not (isinstance(row, list) and [type(value) for value in row] == [str, int, str] and row[1] >= 0):
                malformed(f"{part}[{number}] is not [path, label, class name]")
    return content


def open_imagenet(root: Path, split: str) -> FileSource:
    """Open ImageNet: imagenet/images/{train,val}/<wnid>/*.JPEG, with class names in imagenet/classnames.txt.

    Args:
        root: folder that holds imagenet, or that folder itself.
        split: "train", "val" or "test". Both "val" and "test" are the validation images.

    Raises:
        UserError: a file or folder is missing, a class has no name, or train and val have different classes.
    """
    folder = find(root, "imagenet", "classnames.txt")
    file = folder / "classnames.txt"
    words = dict(line.split(" ", 1) for line in _lines(file) if " " in line)
    parts = {part: folder / "images" / part for part in ("train", "val")}
    here = parts["train" if split == "train" else "val"]
    wnids = _directories(here)
    if not wnids:
        raise UserError(f"{here}: holds no class folders (n01440764, ...); validation images must lie in theirs too")
    for other in parts.values():
        if other.is_dir() and (odd := sorted(set(wnids) ^ set(_directories(other)))):
            raise UserError(f"{other}: classes do not match those of {here}: {', '.join(odd[:5])}")
    if nameless := [wnid for wnid in wnids if wnid not in words]:
        raise UserError(f"{file}: names no class {nameless[0]} ({len(nameless)} of {len(wnids)} missing)")
    paths, labels, found = read_classes(here, wnids)
    number = np.array([wnids.index(wnid) for wnid in found], np.int64)
    names = [words[wnid].strip().replace("_", " ") for wnid in wnids]
    repeated = {name for name in names if names.count(name) > 1}
    return FileSource(
        name="imagenet",
        root=here,
        paths=paths,
        labels=number[labels] if paths else np.empty(0, np.int64),
        class_names=tuple(
            TWINS.get(wnid, name) if name in repeated else name for wnid, name in zip(wnids, names, strict=True)
        ),
    )


def open_aircraft(root: Path, split: str) -> FileSource:
    """Open FGVC-Aircraft: fgvc_aircraft/images/*.jpg, listed in images_variant_{train,val,test}.txt.

    The classes are the lines of variants.txt.

    Args:
        root: folder that holds fgvc_aircraft, or that folder itself.
        split: "train", "val" or "test".

    Raises:
        UserError: a file is missing, a variant is unknown, or a path leaves the folder of images.
    """
    folder = find(root, "fgvc_aircraft", "variants.txt")
    names = [line for line in _lines(folder / "variants.txt") if line]
    index = {name: label for label, name in enumerate(names)}
    file = folder / f"images_variant_{split}.txt"
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(_lines(file), 1):
        image, _, variant = line.partition(" ")
        if not line:
            continue
        if variant not in index:
            raise UserError(f"{file}: line {number}: {variant!r} is not in variants.txt")
        paths.append(inside(folder / "images", f"{image}.jpg", f"{file}: line {number}"))
        labels.append(index[variant])
    return FileSource(
        name="fgvc_aircraft",
        root=folder / "images",
        paths=paths,
        labels=np.array(labels, np.int64),
        class_names=tuple(name.replace("_", " ") for name in names),
    )


def find(root: Path, folder: str, file: str) -> Path:
    """Return root/folder, or root itself, whichever holds the file. Raises UserError where neither does."""
    for place in (root / folder, root):
        if (place / file).is_file():
            return place
    raise UserError(f"{root / folder / file}: no such file (the layout is that of CoOp's DATASETS.md)")


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from None
