"""WebDataset shards: plain tar files that are read in place, in any order, with the standard library."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from vilu import atomic
from vilu.class_set import read_names
from vilu.data.files import first_line
from vilu.data.image_files import SUFFIXES
from vilu.data.source import READ_LIMIT, Source, stamp
from vilu.errors import UserError
from vilu.preprocess.image import ImageError

MAX_SHARDS = 1_000_000
MAX_TEXT = 1 << 20  # bytes of a caption file that are read
INDEX = 1  # format of an index in the cache


@dataclass(frozen=True, eq=False, kw_only=True)
class TarSource(Source):
    """Images inside tar files, which are read without unpacking.

    shards: the tar files.
    shard: index (N,) of each image's tar file in shards.
    offset: position (N,) of each image in its tar file, in bytes.
    size: size (N,) of each image in bytes.
    members: name of each image inside its tar file.
    """

    shards: Sequence[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    members: Sequence[str]

    def __len__(self) -> int:
        return len(self.members)

    def where(self, i: int) -> str:
        return f"{self.shards[self.shard[i]]}: {self.members[i]}"

    def read(self, i: int) -> bytes:
        size = min(int(self.size[i]), READ_LIMIT)
        with open(self.shards[self.shard[i]], "rb") as file:
            file.seek(int(self.offset[i]))
            data = file.read(size)
        if len(data) != size:
            raise ImageError("the shard ends inside this image")
        return data

    def _identify(self, digest: Any) -> None:
        for shard in self.shards:
            digest.update(os.fsencode(shard.name) + b"\0" + stamp(shard))


@dataclass
class _Sample:
    """The members of a shard that share a basename.

    member: name of the image for messages, or the basename without an image.
    image: offset and size of the image in bytes; None without an image.
    caption: text of its caption; None without one.
    label: its class; None without one.
    """

    member: str
    image: tuple[int, int] | None = None
    caption: str | None = None
    label: int | None = None


def find_shards(data: str) -> list[Path] | None:
    """Return the shards that a path, a folder, a glob or a {000..010} pattern names; None where it names no tar files.

    Raises:
        UserError: the pattern matches nothing, or a shard that it names is missing.
    """
    if Path(data).is_dir():
        return sorted(path for path in Path(data).glob("*.tar") if not path.name.startswith(".")) or None
    if not data.endswith(".tar"):
        return None
    if Path(data).is_file():
        return [Path(data)]
    names = [Path(name) for name in _expand(data)]
    if len(names) == 1 and glob.has_magic(data):
        names = [Path(name) for name in sorted(glob.glob(data))]
        if not names:
            raise UserError(f"{data}: matches no file")
    missing = [name for name in names if not name.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such file" + (f" ({len(missing)} of {len(names)} missing)" if len(names) > 1 else "")
        )
    return names


def _expand(pattern: str) -> list[str]:
    """Expand every {a..b} and {a,b} of a pattern as a shell does."""
    parts: list[list[str]] = []
    count = 1
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
        if span:
            first, last = int(span[1]), int(span[2])
            if last < first or last - first >= MAX_SHARDS:
                raise UserError(f"{pattern}: {piece} is no range of at most {MAX_SHARDS} shards")
            width = len(span[1]) if span[1].startswith("0") else 1
            parts.append([f"{number:0{width}d}" for number in range(first, last + 1)])
        elif piece.startswith("{") and "," in piece:
            parts.append(piece[1:-1].split(","))
        else:
            parts.append([piece])
        count *= len(parts[-1])
        if count > MAX_SHARDS:
            raise UserError(f"{pattern}: names more than {MAX_SHARDS} shards")
    return ["".join(choice) for choice in product(*parts)]


def open_shards(name: str, shards: list[Path], caption_column: str, cache: Path | None) -> TarSource:
    """Open shards. Members with the same basename belong together: an image, and its .txt, .json or .cls file.

    If a file classes.txt (one class name per line) lies beside the first shard, the .cls files give labels and captions
    are ignored. Otherwise the .txt or .json files give captions. An image without its label or caption is left out and
    listed in `skipped`.

    Args:
        name: name of the data in tables.
        shards: the tar files.
        caption_column: key of the caption in .json files.
        cache: folder that keeps each shard's index until the shard changes; None keeps none.

    Raises:
        UserError: a shard is no plain tar file, there are no images, or more than a tenth of them have no label or
            caption.
    """
    classes = shards[0].parent / "classes.txt"
    closed = classes.is_file()
    columns: tuple[list, list, list, list, list] = ([], [], [], [], [])
    skipped = []
    total = 0
    for number, shard in enumerate(shards):
        for sample in _samples(shard, caption_column, cache):
            if sample.image is None:
                continue
            total += 1
            text = sample.label if closed else sample.caption
            if text is None:
                skipped.append(f"{shard}: {sample.member}: has no {'.cls label' if closed else 'caption'}")
                continue
            for column, value in zip(columns, (number, *sample.image, sample.member, text), strict=True):
                column.append(value)
    if not total:
        raise UserError(f"{name}: the shards hold no {', '.join(SUFFIXES)} members")
    if not columns[0]:
        raise UserError(
            f"{name}: {total} images have neither .txt or .json captions (column {caption_column!r}) "
            f"nor .cls labels with a classes.txt beside the shards"
        )
    if len(skipped) > total / 10:
        raise UserError(f"{name}: {len(skipped)} of {total} images have no text; the first: {skipped[0]}")
    return TarSource(
        name=name,
        shards=tuple(shards),
        shard=np.array(columns[0], np.int32),
        offset=np.array(columns[1], np.int64),
        size=np.array(columns[2], np.int64),
        members=columns[3],
        labels=np.array(columns[4], np.int64) if closed else None,
        class_names=read_names(classes) if closed else (),
        captions=None if closed else columns[4],
        skipped=tuple(skipped),
    )


def _samples(shard: Path, caption_column: str, cache: Path | None) -> list[_Sample]:
    """Return a shard's samples. They come from the cache if its index still matches the file."""
    if cache is None:
        return list(_scan(shard, caption_column))
    identity = [INDEX, os.path.abspath(shard), stamp(shard).hex(), caption_column]
    file = cache / "shards" / (hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24] + ".json")
    try:
        return [
            _Sample(**{**row, "image": row["image"] and tuple(row["image"])}) for row in json.loads(file.read_text())
        ]
    except (OSError, ValueError, TypeError, KeyError):
        pass  # there is no index, or it is damaged, so the shard is read again
    found = list(_scan(shard, caption_column))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None
    atomic.write(file, json.dumps([asdict(sample) for sample in found]))
    return found


def _scan(shard: Path, caption_column: str) -> Iterator[_Sample]:
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                # A sparse member's bytes are not in one piece; a link or device has none. Only plain files count.
                if not member.isreg() or member.sparse is not None or not stem:
                    continue
                if member.offset_data + member.size > length:
                    raise UserError(f"{shard}: is cut short within {_printable(member.name)}")
                kind = "." + extension.lower()
                name = f"{folder}/{stem}"
                sample = samples.setdefault(name, _Sample(_printable(name.lstrip("/"))))
                if kind in SUFFIXES:
                    if sample.image is None:
                        sample.image = (member.offset_data, member.size)
                        sample.member = _printable(member.name)
                elif kind in (".txt", ".json", ".cls"):
                    file.seek(member.offset_data)
                    text = file.read(min(member.size, MAX_TEXT)).decode("utf-8", "replace").strip()
                    if kind == ".txt":
                        sample.caption = text or sample.caption
                    elif kind == ".json":
                        sample.caption = sample.caption or _caption(text, caption_column)
                    elif re.fullmatch(r"\d{1,9}", text, re.ASCII):
                        sample.label = int(text)
            # tarfile takes a damaged or cut header for the end of the file. The true end is a block of zeros.
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise UserError(f"{shard}: is cut short or damaged after {tar.offset} bytes (no end marker)")
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise UserError(f"{shard}: cannot be read as a plain, uncompressed tar file ({first_line(error)})") from None
    yield from samples.values()


def _caption(text: str, column: str) -> str | None:
    try:
        value = json.loads(text)[column]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return (_printable(value).strip() or None) if isinstance(value, str) else None


def _printable(text: str) -> str:
    """Replace lone surrogates, which neither a terminal nor a tokenizer accepts."""
    return text.encode("utf-8", "replace").decode()
