"""WebDataset shards: plain tar files that are read in place, in any order, with the standard library."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

import numpy as np

from vilu import atomic
from vilu.class_set import read_names
from vilu.data.image_files import SUFFIXES, ignored
from vilu.data.source import LIMIT, READ_LIMIT, Source, check_text, stamp
from vilu.data.splits import no_split, split_named, split_within
from vilu.data.tables import first_line, without_surrogates
from vilu.errors import UserError
from vilu.preprocess.image import ImageError

TEXTS = (".txt", ".json", ".cls")
MAX_SHARDS = 1_000_000
MAX_TEXT = 1 << 20  # bytes of a caption file that are read
INDEX = 3  # format of an index in the cache


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
    """The members of a shard that share a key.

    member: name of the image for messages, or the key without an image.
    image: offset and size of the image in bytes; None without an image.
    caption: text of its caption; None without one.
    label: its class; None without one.
    problem: why it is no sample; "" where it is one. `image` and `member` are then those of one image that is left out.
    """

    member: str
    image: tuple[int, int] | None = None
    caption: str | None = None
    label: int | None = None
    problem: str = ""


def find_shards(data: str, split: str) -> list[Path] | None:
    """Return the shards that a path, a folder, a glob or a {000..010} pattern names; None where it names no tar files.

    Where words in their names, or in those of the folders that differ, stand for several splits, as in
    cc3m-train-0001.tar and train/0001.tar, only those of `split` are returned.

    Raises:
        UserError: the pattern matches nothing, a shard that it names is missing, or the shards have several splits,
            but not the one that is asked for, or some of them have none.
    """
    found = _named_shards(data)
    if not found:
        return None
    top = os.path.commonpath([os.path.abspath(path.parent) for path in found])
    split_of = {path: _split_of(path, top) for path in found}
    splits = set(split_of.values())
    if len(splits) < 2:
        return found
    if None in splits:
        odd = next(path for path in found if split_of[path] is None)
        raise UserError(f"{data}: {odd.name} names no split, other shards do; name the shards of one split")
    if split not in splits:
        raise no_split(data, split, filter(None, splits))
    return [path for path in found if split_of[path] == split]


def _split_of(path: Path, top: str) -> str | None:
    """Return the split that a shard's name stands for, or the nearest folder's below `top`."""
    folders = Path(os.path.relpath(os.path.abspath(path.parent), top)).parts
    return next(filter(None, map(split_within, (path.stem, *reversed(folders)))), None)


def _named_shards(data: str) -> list[Path] | None:
    if Path(data).is_dir():
        return _tars(Path(data)) or [
            tar
            for path in sorted(Path(data).iterdir())
            if path.is_dir() and split_named(path.name)
            for tar in _tars(path)
        ]
    if not data.lower().endswith(".tar"):
        return None
    if Path(data).is_file():
        return [Path(data)]
    names = [Path(name) for name in expand(data)]
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


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar" and not ignored(path.name))


def expand(pattern: str) -> list[str]:
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
    """Open shards. Members with the same key belong together: an image, and its .txt, .json or .cls file.

    A key is a path up to the first dot of its basename, as in the webdataset library. If a file classes.txt (one class
    name per line) lies beside the first shard, the .cls files give labels and captions are ignored. Otherwise the .txt
    or .json files give captions. What cannot be paired is left out and listed in `skipped`: an image without its label
    or caption, a text without an image, a key with several members of one kind, and an image with a dot in its name.

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
    total = images = 0
    for number, shard in enumerate(shards):
        check_text(str(shard))
        for sample in _samples(shard, caption_column, cache):
            text = sample.label if closed else sample.caption
            if sample.image is None and text is None and not sample.problem:
                continue
            total += 1
            images += sample.image is not None
            problem = sample.problem or (f"has no {'.cls label' if closed else 'caption'}" if text is None else "")
            if problem or sample.image is None:
                skipped.append(f"{shard}: {sample.member}: {problem or 'has a text, but no image'}")
                continue
            for column, value in zip(columns, (number, *sample.image, sample.member, text), strict=True):
                column.append(value)
    if not images:
        raise UserError(f"{name}: the shards hold no {', '.join(SUFFIXES)} members")
    if not columns[0] and all(line.endswith((": has no caption", ": has no .cls label")) for line in skipped):
        raise UserError(
            f"{name}: {total} images have neither .txt or .json captions (column {caption_column!r}) "
            f"nor .cls labels with a classes.txt beside the shards"
        )
    if len(skipped) > LIMIT * total:
        raise UserError(f"{name}: {len(skipped)} of {total} samples cannot be paired; the first: {skipped[0]}")
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


@dataclass
class _Member:
    """A member of a shard: its printable name, its place and its size in bytes, and its text where it is one."""

    name: str
    offset: int
    size: int
    text: str | None = None


@contextmanager
def open_tar(name: str, opened: Callable[[], IO[bytes]]) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
    """Open a plain tar file with `opened`, and give it with the file that it is read from.

    Raises:
        UserError: it cannot be read, or is compressed or no tar file; also where that is found within the block.
    """
    try:
        with opened() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar, file
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise UserError(f"{name}: cannot be read as a plain, uncompressed tar file ({first_line(error)})") from None


def plain_files(name: str, tar: tarfile.TarFile, file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield each plain file of a tar file with the key and the extension that the webdataset library gives it.

    A key is the path up to the first dot of its last part. Names that start with __ are left out, as they are there.

    Raises:
        UserError: the tar file is damaged or cut short.
    """
    length = file.seek(0, os.SEEK_END)
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        # A sparse member's bytes are not in one piece; a link or device has none. Only plain files count.
        if not member.isreg() or member.sparse is not None or not stem or stem.startswith("__"):
            continue
        if any(ignored(part) for part in folder.split("/") if part not in (".", "..")):
            continue
        if member.offset_data + member.size > length:
            raise UserError(f"{name}: is cut short within {without_surrogates(member.name)}")
        yield member, f"{folder}/{stem}", extension
    check_end(name, file, tar.offset)  # tarfile takes a damaged or cut header for the end of the file


def check_end(name: str, file: IO[bytes], offset: int | None = None) -> None:
    """Raise UserError unless a tar file has its end marker, a block of zeros, at an offset; None: as its last block."""
    length = file.seek(0, os.SEEK_END)
    at = max(length - 512, 0) if offset is None else offset
    file.seek(at)
    if (offset is None and length % 512) or file.read(512) != bytes(512):
        raise UserError(f"{name}: is cut short or damaged after {at} bytes (no end marker)")


def _scan(shard: Path, caption_column: str) -> Iterator[_Sample]:
    keys: dict[str, dict[str, list[_Member]]] = {}  # key -> extension -> members
    with open_tar(str(shard), lambda: open(shard, "rb")) as (tar, file):
        for member, key, extension in plain_files(str(shard), tar, file):
            kind = "." + extension.lower()
            if not kind.endswith((*SUFFIXES, *TEXTS)):
                continue
            found = _Member(without_surrogates(member.name), member.offset_data, member.size)
            if kind in TEXTS:
                file.seek(member.offset_data)
                found.text = decoded(file.read(min(member.size, MAX_TEXT + 1)))
            keys.setdefault(key, {}).setdefault(kind, []).append(found)
    for key, kinds in keys.items():
        yield from _samples_of(without_surrogates(key.lstrip("/")), kinds, caption_column)


def _samples_of(key: str, kinds: dict[str, list[_Member]], caption_column: str) -> Iterator[_Sample]:
    """Yield the sample of a key, and one with a problem for each image that is left out."""
    images = [kind for kind in kinds if kind in SUFFIXES]
    for kind, members in kinds.items():
        # "left.jpg" beside a plain "jpg" is another view, which has no text of its own.
        own_text = any(kind.rpartition(".")[0] + suffix in kinds for suffix in TEXTS)
        if kind.endswith(SUFFIXES) and kind not in SUFFIXES and (own_text or not images):
            for one in members:
                problem = f"has the key {key!r}, which ends at the first dot of a name; rename it without the dot"
                yield _Sample(one.name, (one.offset, one.size), problem=problem)
    texts = {kind: members[0].text for kind, members in kinds.items() if kind in TEXTS}
    if not images and not texts:
        return
    repeated = next((kind for kind in (*images, *texts) if len(kinds[kind]) > 1), None)
    if repeated is not None:
        problem = f"its key {key!r} has {len(kinds[repeated])} {repeated} members, so its text is not known"
        members = [one for kind in images[:1] for one in kinds[kind]]
        for one in members or kinds[repeated][:1]:
            yield _Sample(one.name, (one.offset, one.size) if members else None, problem=problem)
        return
    sample = _Sample(key)
    if images:
        image = kinds[images[0]][0]
        sample.member, sample.image = image.name, (image.offset, image.size)
    if any(text is None for text in texts.values()):
        sample.problem = f"its text is not UTF-8, or longer than {MAX_TEXT} bytes"
    sample.caption = texts.get(".txt") or _caption(texts.get(".json") or "", caption_column)
    if re.fullmatch(r"\d{1,9}", texts.get(".cls") or "", re.ASCII):
        sample.label = int(texts[".cls"] or "")
    yield sample


def decoded(data: bytes) -> str | None:
    """Return a member's text; None where it is too long or not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip() if len(data) <= MAX_TEXT else None
    except UnicodeDecodeError:
        return None


def _caption(text: str, column: str) -> str | None:
    try:
        value = json.loads(text)[column]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return (without_surrogates(value).strip() or None) if isinstance(value, str) else None
