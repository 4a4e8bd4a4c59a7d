"""Blocks of rows for an offline job: each row's number, the name of its image, and the image's bytes or its path."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vilu.data.image_files import SUFFIXES
from vilu.data.shards import MAX_TEXT, check_end, decoded, open_tar, plain_files
from vilu.data.source import READ_LIMIT
from vilu.data.tables import first_line, without_surrogates
from vilu.errors import UserError
from vilu.serving.offline.files import resolve
from vilu.serving.offline.listing import Unit

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

IMAGE, PATH = "__image", "__path"  # a row's encoded image, else its file; never written
KEPT = "kept"  # column of the output that parts it where only accepted rows stay
BLOCK_ROWS, BLOCK_BYTES = 128, 32 << 20  # a block of rows ends at the first of these
UNIT_BITS = 32  # a row's number: the file's place in the order, then the row's place in the file


def row_id(place: int, row: int) -> int:
    """Return the number of a row: unique in the input, and the same in every run over it."""
    return place << UNIT_BITS | row


def place_of(ids: np.ndarray) -> list[int]:
    """Return a number for each row id (N,) that counts up by one from row to row of a file, or of a folder."""
    places: list[int] = ((ids >> UNIT_BITS) + (ids & ((1 << UNIT_BITS) - 1))).tolist()
    return places


def block(
    numbers: Iterable[int],
    sources: Iterable[str | None],
    kept: dict[str, Any] | None = None,
    *,
    images: Any = None,
    paths: Sequence[str | None] | None = None,
) -> pa.Table:
    """Return rows with their number and the name for people, the columns carried along, and IMAGE, PATH or both.

    Args:
        numbers: row ids.
        sources: what names each image for people.
        kept: columns of the input that are carried along.
        images: encoded images, as a sequence or an Arrow array; a row with none is read from its path.
        paths: files of the images. Their names may hold bytes that are no UTF-8.
    """
    import pyarrow as pa

    columns = {"row_id": pa.array(numbers, pa.int64()), "source": pa.array(sources, pa.string()), **(kept or {})}
    if images is not None:
        given = isinstance(images, pa.Array)
        columns[IMAGE] = images.cast(pa.large_binary()) if given else pa.array(images, pa.large_binary())
    if paths is not None:
        columns[PATH] = pa.array([path and path.encode("utf-8", "surrogateescape") for path in paths], pa.binary())
    return pa.table(columns)


def list_images(start: int, names: Sequence[str]) -> Iterator[pa.Table]:
    """Yield blocks of a folder's images; `start` is the place of the first in the input."""
    for first in range(0, len(names), BLOCK_ROWS):
        some = names[first : first + BLOCK_ROWS]
        numbers = [row_id(start + first + i, 0) for i in range(len(some))]
        yield block(numbers, list(map(without_surrogates, some)), paths=some)


def members(unit: Unit, cap: int, texts: Sequence[str] = ()) -> Iterator[tuple[str, bytes, dict[str, str | None]]]:
    """Yield the name, the bytes and the texts of each image of a shard, `cap` images at most; a negative cap is none.

    An image is named STEM.jpg, without a dot in STEM. No more bytes are read than the preprocessing accepts, and one,
    so that it refuses a larger image. As in the webdataset library, files with one key lie together.

    Args:
        unit: the shard.
        cap: how many images are read.
        texts: extensions of the files with the image's key that are read as UTF-8, such as cls and txt; None stands for
            a file that is missing or no such text.

    Raises:
        UserError: the shard is damaged or cut short, or cannot be read.
    """
    system, path = resolve(unit.name)
    count, last = 0, ""
    waiting: list[tuple[str, bytes]] = []  # images whose texts may still follow
    found: dict[str, str | None] = dict.fromkeys(texts)
    with open_tar(unit.name, lambda: io.BufferedReader(system.open_input_file(path), 4 << 20)) as (tar, file):
        for member, key, ending in plain_files(unit.name, tar, file):
            extension = ending.lower()
            if key != last:
                yield from ((*image, found) for image in waiting)
                waiting, found, last = [], dict.fromkeys(texts), key
                if count == cap:
                    return
            if extension in found:
                file.seek(member.offset_data)
                found[extension] = decoded(file.read(min(member.size, MAX_TEXT + 1)))
            if f".{extension}" in SUFFIXES and count != cap:
                file.seek(member.offset_data)
                waiting.append((without_surrogates(member.name), file.read(min(member.size, READ_LIMIT))))
                count += 1
        yield from ((*image, found) for image in waiting)


def read_shard(place: int, unit: Unit, cap: int, texts: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Yield blocks of a shard's images, `cap` at most, with their texts as columns; see `members`."""
    import pyarrow as pa

    numbers: list[int] = []
    sources: list[str] = []
    images: list[bytes] = []
    columns: dict[str, list[str | None]] = {name: [] for name in texts}
    held = 0

    def made() -> pa.Table:
        kept = {name: pa.array(values, pa.string()) for name, values in columns.items()}
        return block(numbers, sources, kept, images=images)

    for row, (name, data, found) in enumerate(members(unit, cap, texts)):
        numbers.append(row_id(place, row))
        sources.append(f"{without_surrogates(unit.name)}: {name}")
        images.append(data)
        for text, value in found.items():
            columns[text].append(value)
        held += len(data)
        if len(numbers) == BLOCK_ROWS or held >= BLOCK_BYTES:
            yield made()
            numbers, sources, images, held = [], [], [], 0
            columns = {name: [] for name in texts}
    if numbers:
        yield made()


def check_texts(unit: Unit, texts: Sequence[str]) -> None:
    """Raise UserError where no image of a shard has a text with one of these extensions."""
    missing = set(texts)
    for _, _, found in members(unit, -1, texts):
        missing -= {name for name, value in found.items() if value is not None}
        if not missing:
            return
    raise UserError(f"{unit.name}: no image has a .{min(missing)} file of UTF-8 text")


def check_shard(unit: Unit) -> None:
    """Raise UserError for a shard whose last block is no end of a tar file: a download or a writer was cut short."""
    system, path = resolve(unit.name)
    try:
        with system.open_input_file(path) as file:
            check_end(unit.name, file)
    except OSError as error:
        raise UserError(f"{unit.name}: cannot be read ({first_line(error)})") from None
