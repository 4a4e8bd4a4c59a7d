"""What there is to embed: images by index, each with a label or with a caption."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilu.class_set import check_names
from vilu.errors import UserError
from vilu.preprocess.image import ImageError, Transform

# One byte over what `decode` takes: a larger file is refused there, and never read whole.
READ_LIMIT = Transform(1).max_bytes + 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(ABC):
    """N images, with labels (a closed set) or with captions.

    name: what tables call it.
    labels: (N,) int64 into class_names; None for captions.
    captions: N texts; None for a closed set.
    skipped: a line for each image left out on opening (a shard's image without a caption).

    Raises:
        UserError: no images, fewer than two classes, repeated or empty class names, or labels that do not fit.
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
        if len(self.class_names) < 2:
            raise UserError(f"{self.name}: needs at least two classes, found only {self.class_names[0]!r}")
        if self.labels.shape != (len(self),) or self.labels.dtype != np.int64:
            raise UserError(f"{self.name}: {len(self)} images need as many int64 labels")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise UserError(f"{self.name}: labels must lie in 0..{len(self.class_names) - 1}, got {low}..{high}")

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> bytes | np.ndarray:
        """Image i: encoded bytes, or (H, W, 3) uint8. Raises ImageError or OSError where it cannot be had."""

    @abstractmethod
    def where(self, i: int) -> str:
        """Image i as a message names it."""

    @abstractmethod
    def _identify(self, digest: Any) -> None:
        """Feed what tells these images from others to the hash."""

    def key(self) -> str:
        """Identity of the data, 64 hex digits: another one whenever an image, label, name or caption changed."""
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
    """Images that are files: `paths`, relative to `root`.

    The key holds each file's path, size and modification time, not its content: hashing the content of
    ImageNet would take longer than many a training.
    """

    root: Path
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, i: int) -> str:
        return os.path.join(self.root, self.paths[i])

    def read(self, i: int) -> bytes:
        path = self.where(i)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ImageError("not a file")  # opening a FIFO would wait for ever
        with open(path, "rb") as file:
            return file.read(READ_LIMIT)

    def _identify(self, digest: Any) -> None:
        for i, path in enumerate(self.paths):
            digest.update(os.fsencode(path) + b"\0" + stamp(self.where(i)))


@dataclass(frozen=True, eq=False, kw_only=True)
class ArraySource(Source):
    """Images in memory: (N, H, W, 3) uint8. The key hashes the pixels."""

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


def stamp(path: str | os.PathLike[str]) -> bytes:
    """Size and modification time of a file, for a key; all zero where it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return bytes(16)
    return (status.st_size + 1).to_bytes(8, "little") + (status.st_mtime_ns % (1 << 64)).to_bytes(8, "little")


def inside(root: Path, path: str, where: str) -> str:
    """A path from a split file or a table, relative to the root.

    Judged by its letters alone: links inside the root are the user's own way of laying out data (CoOp advises them).

    Raises:
        UserError: empty, or it leaves the root.
    """
    base = os.path.abspath(root).rstrip(os.sep) + os.sep
    if not path.strip() or "\0" in path:
        raise UserError(f"{where}: {path!r} is no path")
    full = os.path.normpath(os.path.join(base, path))
    if not full.startswith(base):
        raise UserError(f"{where}: path {path!r} leaves {root}")
    return full[len(base) :]


def check_same_classes(train: Any, test: Any) -> None:
    """Two closed sets (anything with `name` and `class_names`) must have the same names in the same order.

    Raises:
        UserError: they do not; the line names what differs.
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
