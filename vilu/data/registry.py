"""`open_source` finds the data that a user names and opens it as a Source."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache as remembered
from pathlib import Path

from vilu.data.cifar import LAYOUTS, open_cifar
from vilu.data.coop import SPLIT_FILES, open_aircraft, open_imagenet, open_split
from vilu.data.files import open_folder
from vilu.data.shards import find_shards, open_shards
from vilu.data.source import ArraySource, Source, check_text, refuse_url
from vilu.data.splits import check_split
from vilu.data.tables import TABLES, open_table
from vilu.errors import UserError
from vilu.tiny import data as tiny

# Shapes can be drawn without end. 8192 test captions are enough for the largest published number of candidates K.
SHAPES = {"train": 10_000, "test": 4_000}
CAPTIONS = {"train": 10_000, "test": 8_192}

ON_DISK: dict[str, Callable[[str, Path, str], Source]] = {
    "imagenet": lambda _, root, split: open_imagenet(root, split),
    "fgvc_aircraft": lambda _, root, split: open_aircraft(root, split),
    **dict.fromkeys(LAYOUTS, open_cifar),
    **dict.fromkeys(SPLIT_FILES, open_split),
}
EMBEDDED = ("digits", "shapes", "shapes-captions")
NAME_ONE = "name the data: --data or --dataset, one of the two"
EMBEDDING_FILES = (".npz", ".npy", ".safetensors")


def open_source(
    data: str | None = None,
    *,
    dataset: str | None = None,
    root: Path | None = None,
    split: str = "train",
    image_column: str = "path",
    caption_column: str = "caption",
    cache: Path | None = None,
) -> Source:
    """Open the data that `data` or `dataset` names.

    Args:
        data: an image folder; a CSV, TSV or Parquet table of paths and captions; or WebDataset shards, given as one
            .tar file, a folder of them, a glob, or a pattern such as "shards/{000..010}.tar".
        dataset: an embedded data set ("digits", "shapes" or "shapes-captions"), or one of the paper's 13 below `root`.
        root: folder that holds the paper's data sets.
        split: "train", "val" or "test", or a synonym such as "valid". It chooses among split folders, among shards with
            splits in their names, and among the rows of a table with a column "split". Other data ignore it.
        image_column: column of a table that holds the paths: absolute ones, or relative to the table's folder.
        caption_column: column of a table, or key of a JSON caption in shards, that holds the captions.
        cache: folder that keeps the indexes of shards; None keeps none.

    Raises:
        UserError: neither or both are named, the data does not exist, a name or split is unknown, or the data has a
            fault.

    Examples:
        >>> source = open_source(dataset="digits", split="test")
        >>> len(source), source.class_names[:2], source.read(0).shape
        (576, ('handwritten zero', 'handwritten one'), (64, 64, 3))
    """
    if data is not None and dataset is not None:
        raise UserError(NAME_ONE)
    split = check_split(split)
    if dataset is not None:
        return _named(dataset, root, split)
    if data is None:
        raise UserError(NAME_ONE)
    if root is not None:
        raise UserError("--root is for --dataset; give --data a whole path")
    refuse_url(data, "--data")
    check_text(data)
    path = Path(data)
    if path.suffix.lower() in EMBEDDING_FILES:
        raise UserError(f"{data}: holds embeddings, not images")
    if path.suffix.lower() in TABLES:
        if not path.is_file():
            raise UserError(f"{data}: no such file")
        return open_table(path, image_column, caption_column, split)
    shards = find_shards(data, split)
    if shards is not None:
        return open_shards(
            path.stem if len(shards) == 1 else path.parent.name or "shards", shards, caption_column, cache
        )
    if path.is_dir():
        return open_folder(path, split)
    if not path.exists():
        raise UserError(f"{data}: no such file or folder")
    packed = ".tar." in path.name.lower() or path.suffix.lower() in (".tgz", ".zip")
    raise UserError(f"{data}: {'is compressed; unpack it first' if packed else 'not a folder, a table or shards'}")


def _named(dataset: str, root: Path | None, split: str) -> Source:
    if dataset in EMBEDDED:
        if root is not None:
            raise UserError(f"--dataset {dataset} is embedded: it takes no --root")
        if split not in SHAPES:
            raise UserError(f"{dataset}: has no split {split!r}, only train and test")
        return _embedded(dataset, split)
    if dataset not in ON_DISK:
        known = [*EMBEDDED, *ON_DISK]
        near = difflib.get_close_matches(dataset.lower(), known, n=3, cutoff=0.5)
        raise UserError(f"unknown data set {dataset!r}; {'near' if near else 'known'}: {', '.join(near or known)}")
    if root is None:
        raise UserError(f"--dataset {dataset} needs --root, the folder that holds it")
    if not root.is_dir():
        raise UserError(f"{root}: not a folder")
    return ON_DISK[dataset](dataset, root, split)


@remembered
def _embedded(dataset: str, split: str) -> Source:
    # A process remembers the result, because drawing ten thousand shapes takes seconds.
    if dataset == "digits":
        found = tiny.digits(split)
    else:
        found = tiny.shapes(split, (SHAPES if dataset == "shapes" else CAPTIONS)[split])
    if dataset == "shapes-captions":
        return ArraySource(name=dataset, images=found.images, captions=found.captions)
    return ArraySource(name=dataset, images=found.images, labels=found.labels, class_names=found.names)
