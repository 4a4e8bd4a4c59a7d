"""Sources of images to embed. Each image has an index, and a label or a caption."""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilu.class_set import check_names
from vilu.errors import UserError
from vilu.preprocess.image import ImageError, Transform

# One byte more than `decode` accepts, so that it refuses a larger file and the file is never read whole.
READ_LIMIT = Transform(1).max_bytes + 1
LIMIT = 0.1  # share of images that cannot be read or paired above which a data set is refused


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(ABC):
    """N images with labels (a closed set) or with captions.

    name: name that tables show.
    labels: index (N,) int64 of each image's class in class_names; None for captions.
    class_names: the K class names; empty for captions.
    captions: N texts; None for a closed set.
    skipped: one line for each image that was left out on opening, such as one without a caption.

    Raises:
        UserError: there are no images or fewer than two classes, a class name is empty or repeated, or the labels or
            captions do not fit.
    """

    name: str
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    captions: Sequence[str] | None = None
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self):
            raise UserError(f"{self.name}: no images")
        if self.captions is not None:
            if self.labels is not None:
                raise UserError(f"{self.name}: needs labels or captions, one of the two")
            if len(self.captions) != len(self):
                raise UserError(f"{self.name}: {len(self)} images but {len(self.captions)} captions")
            return
        if self.labels is None:
            raise UserError(f"{self.name}: needs labels or captions, one of the two")
        check_names(self.class_names, self.name)
        if self.labels.shape != (len(self),) or self.labels.dtype != np.int64:
            raise UserError(f"{self.name}: {len(self)} images need as many int64 labels")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise UserError(f"{self.name}: labels must lie in 0..{len(self.class_names) - 1}, got {low}..{high}")

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> bytes | np.ndarray:
        """Return image i as encoded bytes or as pixels (H, W, 3) uint8.

        Raises:
            ImageError, OSError: the image cannot be read.
        """

    @abstractmethod
    def where(self, i: int) -> str:
        """Return the name of image i for messages."""

    @abstractmethod
    def _identify(self, digest: Any) -> None:
        """Add to the hash everything that tells these images from others."""

    def key(self) -> str:
        """Return 64 hexadecimal digits that change whenever an image, label, class name or caption changes."""
        digest = hashlib.sha256(type(self).__name__.encode())
        self._identify(digest)
        if self.labels is not None:
            digest.update(json.dumps(self.class_names).encode())
            digest.update(self.labels.tobytes())
        for caption in self.captions or ():
            text = caption.encode("utf-8", "surrogatepass")
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSource(Source):
    """Images in files.

    The key depends on each file's path, size and modification time. It does not depend on the content, because hashing
    all of ImageNet would take longer than training a head.

    root: folder that the paths start from.
    paths: N paths, absolute or relative to root.

    Raises:
        UserError: as `Source`, or a path is not UTF-8.
    """

    root: Path
    paths: Sequence[str]

    def __post_init__(self) -> None:
        for path in self.paths:
            check_text(os.path.join(self.root, path))
        super().__post_init__()

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, i: int) -> str:
        return os.path.join(self.root, self.paths[i])

    def read(self, i: int) -> bytes:
        path = self.where(i)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ImageError("not a file")  # opening a FIFO could block for ever
        with open(path, "rb") as file:
            return file.read(READ_LIMIT)

    def _identify(self, digest: Any) -> None:
        for i, path in enumerate(self.paths):
            digest.update(os.fsencode(path) + b"\0" + stamp(self.where(i)))


@dataclass(frozen=True, eq=False, kw_only=True)
class ArraySource(Source):
    """Images in memory. The key depends on the pixels.

    images: pixels (N, H, W, 3) uint8.
    """

    images: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def where(self, i: int) -> str:
        return f"{self.name}[{i}]"

    def read(self, i: int) -> np.ndarray:
        return self.images[i]

    def _identify(self, digest: Any) -> None:
        digest.update(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))


def check_text(path: str) -> None:
    """Check that a path is text, which the checkpoint, the reports and the server's files can hold.

    Raises:
        UserError: the path has bytes that are not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "replace")
        raise UserError(f"{shown}: its name is not UTF-8; rename it") from None


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:\w+/")


def refuse_url(path: str, where: str) -> None:
    """Raise UserError for a URL in the place of a path."""
    if URL.match(path.strip()):
        shown = path if len(path) <= 80 else path[:79] + "…"
        raise UserError(
            f"{where}: {shown!r} is a URL, and vilu reads files only: download the images first (img2dataset does, and "
            "writes shards that --data takes)"
        )


def stamp(path: str | os.PathLike[str]) -> bytes:
    """Return a file's size and modification time as 16 bytes for a key. They are all zero where the file is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return bytes(16)
    return (status.st_size + 1).to_bytes(8, "little") + (status.st_mtime_ns % (1 << 64)).to_bytes(8, "little")


def inside(root: Path, path: str, where: str) -> str:
    """Check a relative path from a split file or a table, and return it relative to the root.

    Only the text of the path is checked. Links inside the root are allowed, because users lay out data with them, as
    CoOp advises.

    Args:
        root: folder that the path must stay in.
        path: the path.
        where: place of the path, for messages.

    Raises:
        UserError: the path is empty or leaves the root.
    """
    base = os.path.abspath(root).rstrip(os.sep) + os.sep
    if not path.strip() or "\0" in path:
        raise UserError(f"{where}: {path!r} is no path")
    full = os.path.normpath(os.path.join(base, path))
    if not full.startswith(base):
        raise UserError(f"{where}: path {path!r} leaves {root}")
    return full[len(base) :]


def check_same_classes(train: Any, test: Any) -> None:
    """Check that two closed sets have the same class names in the same order.

    Args:
        train: anything with `name` and `class_names`.
        test: the same kind of object.

    Raises:
        UserError: the class names differ. The message says in what.
    """
    a, b = tuple(train.class_names), tuple(test.class_names)
    if a == b:
        return
    parts = [
        f"{len(names)} only in {source.name} ({', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''})"
        for source, names in (
            (train, [name for name in a if name not in set(b)]),
            (test, [name for name in b if name not in set(a)]),
        )
        if names
    ]
    reason = "; ".join(parts) or "the same names in another order"
    raise UserError(f"{test.name}: class names do not match those of {train.name}: {reason}")
