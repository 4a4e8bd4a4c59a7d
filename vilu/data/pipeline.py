"""Threads that read and decode images ahead of the caller. The results keep the order of the items."""

from __future__ import annotations

import io
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from PIL import Image

from vilu.data.source import LIMIT, Source
from vilu.errors import UserError
from vilu.preprocess.image import FORMATS, ImageError, Transform, decode, pixels

S = TypeVar("S")
T = TypeVar("T")
Pixels = np.ndarray | ImageError  # an ImageError says why there are no pixels
AHEAD = 3  # batches that threads decode before the caller asks for them
SLICE = 8  # images per task, because a task for each would cost more than decoding a small image


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(
    work: Callable[[S], T],
    items: Iterable[S],
    ahead: int,
    workers: int | None = None,
    initializer: Callable[[], None] | None = None,
) -> Generator[T, None, None]:
    """Yield `work(item)` for each item, in order. Threads work at most `ahead` items ahead of the caller.

    Args:
        work: function that the threads call.
        items: its arguments.
        ahead: number of items that are computed or waiting.
        workers: number of threads; None stands for one per core.
        initializer: function that each thread calls once when it starts.
    """
    pool = ThreadPoolExecutor(workers or cores(), thread_name_prefix="decode", initializer=initializer)
    waiting: deque[Future[T]] = deque()
    rest = iter(items)
    try:
        while True:
            waiting.extend(pool.submit(work, item) for item in islice(rest, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_batches(
    work: Callable[[int], T], order: Sequence[int], batch_size: int, workers: int | None = None
) -> Generator[tuple[list[int], list[T]], None, None]:
    """Yield (rows, results of `work(row)`) batch by batch. Threads work AHEAD batches ahead of the caller."""
    spans = [
        (start, min(start + SLICE, last))
        for first in range(0, len(order), batch_size)
        for last in [min(first + batch_size, len(order))]
        for start in range(first, last, SLICE)
    ]

    def several(span: tuple[int, int]) -> list[T]:
        return [work(row) for row in order[slice(*span)]]

    parts = ordered(several, spans, AHEAD * -(-batch_size // SLICE), workers)
    with closing(parts):
        for first in range(0, len(order), batch_size):
            rows = list(order[first : first + batch_size])
            yield rows, [result for part in islice(parts, -(-len(rows) // SLICE)) for result in part]


def reader(source: Source, convert: Callable[[bytes | np.ndarray, int], np.ndarray]) -> Callable[[int], Pixels]:
    """Return a function from a row to its pixels, or to the ImageError that says why there are none."""

    def work(row: int) -> Pixels:
        try:
            return convert(source.read(row), row)
        except ImageError as error:
            return error
        except OSError as error:
            return ImageError(error.strerror or type(error).__name__)

    return work


def transformed(transform: Transform) -> Callable[[bytes | np.ndarray, int], np.ndarray]:
    """Return a function that preprocesses encoded images and images in memory as the server does."""

    def convert(data: bytes | np.ndarray, row: int) -> np.ndarray:
        return pixels(Image.fromarray(data), transform) if isinstance(data, np.ndarray) else decode(data, transform)

    return convert


def too_many(name: str, skipped: Sequence[str], total: int) -> None:
    """Raise UserError where more than a tenth of the images cannot be read."""
    if len(skipped) > LIMIT * total:
        raise UserError(f"{name}: {len(skipped)} of {total} images cannot be read; the first: {skipped[0]}")


def batches(
    source: Source,
    transform: Callable[[Image.Image], np.ndarray],
    order: Iterable[int],
    batch_size: int,
    workers: int | None = None,
    *,
    skipped: list[str] | None = None,
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """Yield batches of pixels for training on images. Threads decode and transform them in the given order.

    Args:
        source: the images.
        transform: function from a Pillow image of any mode to uint8 pixels of one shape, such as `augment(size, rng)`.
        order: rows of the images to yield.
        batch_size: largest number B of images per batch.
        workers: number of threads; None stands for one per core.
        skipped: list that gets a line for each image that could not be read. Such an image is in no batch.

    Yields:
        rows (B,) int64 and pixels (B, S, S, 3) uint8, with 1 <= B <= batch_size.

    Raises:
        UserError: more than a tenth of the images cannot be read.
    """

    def convert(data: bytes | np.ndarray, row: int) -> np.ndarray:
        image = Image.fromarray(data) if isinstance(data, np.ndarray) else _opened(data)
        try:
            return transform.at(row, image) if isinstance(transform, Augment) else transform(image)
        except ImageError:
            raise
        except Exception as error:  # as in vilu.preprocess.image.decode; Pillow decodes the pixels only here
            raise ImageError(f"image cannot be decoded ({type(error).__name__})") from None

    rows = [int(row) for row in order]
    lines: list[str] = [] if skipped is None else skipped
    before = len(lines)
    for batch, results in in_batches(reader(source, convert), rows, batch_size, workers):
        kept = [(row, result) for row, result in zip(batch, results, strict=True) if isinstance(result, np.ndarray)]
        lines += [
            f"{source.where(row)}: {result}"
            for row, result in zip(batch, results, strict=True)
            if isinstance(result, ImageError)
        ]
        too_many(source.name, lines[before:], len(rows))
        if kept:
            yield np.array([row for row, _ in kept], np.int64), np.stack([result for _, result in kept])


def _opened(data: bytes) -> Image.Image:
    """Open a Pillow image within the server's limits. Pillow decodes its pixels when they are first used."""
    limits = Transform(1)
    if not 0 < len(data) <= limits.max_bytes:
        raise ImageError(f"image has {len(data)} bytes, the limit is {limits.max_bytes}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # as in vilu.preprocess.image.decode
        raise ImageError(f"not a {', '.join(FORMATS)} image ({type(error).__name__})") from None
    if image.width * image.height > limits.max_pixels:
        raise ImageError(f"image has {image.width}x{image.height} pixels, the limit is {limits.max_pixels}")
    return image


@dataclass(frozen=True)
class Augment:
    """A random resized crop (scale 0.08 to 1, ratio 3/4 to 4/3, bicubic), then a horizontal flip with probability 1/2.

    This is the authors' training transform, made of torchvision's. As there, the image becomes RGB after the crop. The
    result depends only on the image, `seed` and the image's row, so threads and order do not change it.

    size: side of the pixels.
    seed: seed of all crops and flips.
    """

    size: int
    seed: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        return self.at(0, image)

    def at(self, row: int, image: Image.Image) -> np.ndarray:
        """Augment the image of this row. Return pixels (size, size, 3) uint8."""
        rng = np.random.default_rng([self.seed, row])
        left, top, width, height = self._box(image.width, image.height, rng)
        crop = image.crop((left, top, left + width, top + height))
        result = np.asarray(crop.resize((self.size, self.size), Image.Resampling.BICUBIC).convert("RGB"))
        return np.ascontiguousarray(result[:, ::-1]) if rng.random() < 0.5 else result

    def _box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * rng.uniform(0.08, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        # The image is too long or too thin for all ten draws, so it gets the largest centre crop of an allowed ratio.
        w = min(width, max(1, round(height * 4 / 3)))
        h = min(height, max(1, round(width / (3 / 4))))
        return (width - w) // 2, (height - h) // 2, w, h


def augment(size: int, rng: np.random.Generator) -> Augment:
    """Make one epoch's training augmentation, as in `augment(size, np.random.default_rng([seed, epoch]))`."""
    return Augment(size, int(rng.integers(1 << 63)))
