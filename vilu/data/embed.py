"""`embed` turns a Source into an EmbeddedSet. It decodes and encodes at the same time, and can cache the result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vilu.class_set import DEFAULT_TEMPLATES, check_templates, prompts
from vilu.data.cache import Memory, Skipped, Stored, Writer, read
from vilu.data.pipeline import Pixels, cores, in_batches, ordered, reader, too_many, transformed
from vilu.data.source import Source
from vilu.embeddings import EmbeddedSet, Embeddings
from vilu.errors import UserError
from vilu.preprocess.image import ImageError

if TYPE_CHECKING:
    from vilu.clip import Clip

FORMAT = 1  # format of the cache, raised when the same identity would give other embeddings
FIELDS = ("normalised", "activation", "output")
TEXTS = 256  # prompts in one run of the text tower
COPIED = 8192  # rows that are copied at a time from another entry of the cache
MAX_TOWERS = 8  # batches that a CPU encodes at the same time. Each has its own activations in memory
# The texts are short, because a small context would cut off the part in which two tokenizers differ.
PROBE = ["a photo of a cat.", "the quick brown fox", "jumps over a lazy dog", "0123456789", "naïve café!"]

Progress = Callable[[str, int, int], None]
Block = tuple[int, dict[str, np.ndarray], Skipped]


def embed(
    source: Source,
    clip: Clip,
    *,
    cache: Path | None = None,
    dtype: str = "float16",
    projection: bool = False,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    progress: Progress | None = None,
    batch_size: int = 64,
    workers: int | None = None,
) -> EmbeddedSet:
    """Embed N images, and their captions or the prompts of their K classes.

    With a cache, the embeddings are kept in a folder whose name depends on everything that changes them: CLIP's name,
    weights and tokenizer, the transform, dtype, projection and the data's key. A change of these gets a new folder.
    A killed run continues where it was and, with the same batch size and workers, ends with the same bytes. The result
    is mapped from disk, so memory does not grow with N. What another folder holds already, in float32 or beside
    projections, is copied from there.

    Args:
        source: the images.
        clip: the CLIP that embeds them.
        cache: folder that keeps embeddings; None keeps them in memory.
        dtype: type of the kept image and caption embeddings, "float16" or "float32". Class embeddings are float32.
        projection: whether to keep the input and output of CLIP's last projections, which BayesVLM needs.
        templates: prompts for class names with exactly one {} each. Several are averaged as in `Clip.class_set`.
        progress: called with (what, done, total) after each batch.
        batch_size: number of images per batch.
        workers: number of threads that decode; on a CPU they also encode. None stands for one per core,
            but for at most eight if CLIP is on a CPU.

    Returns:
        The EmbeddedSet of the images that could be read; it lists the others in `skipped`.

    Raises:
        UserError: more than a tenth of the images cannot be read, an embedding is not finite, the data changed
            meanwhile, CLIP has no linear projection to keep, or the cache is damaged, in use or full.

    Examples:
        >>> from vilu import load_clip
        >>> from vilu.data.source import ArraySource
        >>> source = ArraySource(
        ...     name="two", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 1]), class_names=("cat", "dog")
        ... )
        >>> data = embed(source, load_clip())
        >>> data.image.normalised.shape, data.text.normalised.shape
        (torch.Size([2, 128]), torch.Size([2, 128]))
    """
    if dtype not in ("float16", "float32"):
        raise UserError(f"dtype must be float16 or float32, got {dtype!r}")
    check_templates(templates)
    tower = _Tower(clip, projection)
    key = source.key()
    identity = {**tower.identity(), "kind": "images", "dtype": dtype, "data": key}

    def images(start: int, skipped: Skipped) -> Iterator[Block]:
        for block in _embed_images(source, tower, np.dtype(dtype), start, skipped, batch_size, workers):
            yield block
            if progress:
                progress("embedding", block[0], len(source))
        if source.key() != key:
            raise UserError(f"{source.name}: changed while it was being embedded; run this again")

    stored = _kept(cache, source.name, identity, len(source), images)
    lines = tuple(line for _, line in stored.skipped)
    kept = np.delete(np.arange(len(source)), [i for i, _ in stored.skipped])
    image = _embeddings(stored, "image")
    if source.labels is None:
        return EmbeddedSet(
            source.name,
            image,
            _embeddings(stored, "text"),
            logit_scale=clip.spec.logit_scale,
            skipped=source.skipped + lines,
            rows=torch.from_numpy(kept),
        )

    def classes(start: int, _: Skipped) -> Iterator[Block]:
        yield from _embed_classes(source.class_names, templates, tower, start)

    identity = {
        **tower.identity(),
        "kind": "classes",
        "dtype": "float32",
        "data": [list(source.class_names), list(templates)],
    }
    text = _embeddings(_kept(cache, "classes", identity, len(source.class_names), classes), "text")
    return EmbeddedSet(
        source.name,
        image,
        text,
        torch.from_numpy(source.labels[kept]),
        source.class_names,
        clip.spec.logit_scale,
        source.skipped + lines,
        torch.from_numpy(kept),
    )


def _kept(
    cache: Path | None,
    name: str,
    identity: Mapping[str, Any],
    rows: int,
    blocks: Callable[[int, Skipped], Iterator[Block]],
) -> Stored:
    """Return what the cache holds for this identity. Blocks that are missing are made first."""
    writer: Writer | Memory = Memory()
    if cache is not None:
        folder = _folder(cache, name, identity)
        stored = read(folder, identity)
        if stored is not None:
            return stored
        writer = Writer(folder, identity, rows)
    with writer:
        # Another process may have finished the folder since the read above.
        stored = read(folder, identity) if cache is not None else None
        if stored is not None:
            return stored
        known = None if cache is None else _known(cache, name, identity)
        start = writer.position
        made = blocks(start, list(writer.skipped)) if known is None else _copied(known, identity, rows, start)
        for position, arrays, skipped in made:
            writer.append(position, arrays, skipped)
        return writer.finish()


def _folder(cache: Path, name: str, identity: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:40]}-{digest[:20]}"


def _known(cache: Path, name: str, identity: Mapping[str, Any]) -> Stored | None:
    """A whole entry with these embeddings and more: in float32, or with the projections beside them."""
    if identity["projection"]:
        return None  # in float16 what is projected may be too large
    for dtype in (identity["dtype"], "float32"):
        for projection in (False, True):
            other = {**identity, "dtype": dtype, "projection": projection}
            with suppress(UserError):  # a damaged one is no help
                found = read(_folder(cache, name, other), other)
                if found is not None:
                    return found
    return None


def _copied(known: Stored, identity: Mapping[str, Any], rows: int, start: int) -> Iterator[Block]:
    """The blocks from `start` on, out of an entry that holds more."""
    skipped = sorted(known.skipped)
    for first in range(start, rows, COPIED):
        last = min(first + COPIED, rows)
        before = sum(i < first for i, _ in skipped)
        bad = [(i, line) for i, line in skipped if first <= i < last]
        part = slice(first - before, last - before - len(bad))
        named = known.arrays.items() if part.start < part.stop else ()
        arrays = {name: array[part].astype(identity["dtype"]) for name, array in named if name.endswith(FIELDS[0])}
        yield last, arrays, bad


def _embed_images(
    source: Source,
    tower: _Tower,
    dtype: np.dtype,
    start: int,
    skipped: Skipped,
    batch_size: int,
    workers: int | None,
) -> Iterator[Block]:
    lines = [*source.skipped, *(line for _, line in skipped)]
    read_one = reader(source, transformed(tower.clip.transform))

    def block(rows: Sequence[int], pixels: Sequence[Pixels]) -> Block:
        good = [(row, image) for row, image in zip(rows, pixels, strict=True) if isinstance(image, np.ndarray)]
        bad = [
            (row, f"{source.where(row)}: {image}")
            for row, image in zip(rows, pixels, strict=True)
            if isinstance(image, ImageError)
        ]
        arrays = {}
        if good:
            names = [source.where(row) for row, _ in good]
            arrays = _named("image", tower.images(np.stack([image for _, image in good])), dtype, names)
            if source.captions is not None:
                captions = [source.captions[row] for row, _ in good]
                arrays |= _named("text", tower.texts(captions), dtype, [f"the caption of {name}" for name in names])
        return rows[-1] + 1, arrays, bad

    with closing(_blocks(source, tower, block, read_one, start, batch_size, workers)) as blocks:
        for position, arrays, bad in blocks:
            lines += [line for _, line in bad]
            too_many(source.name, lines, len(source) + len(source.skipped))
            yield position, arrays, bad


def _blocks(
    source: Source,
    tower: _Tower,
    block: Callable[[Sequence[int], Sequence[Pixels]], Block],
    read_one: Callable[[int], Pixels],
    start: int,
    batch_size: int,
    workers: int | None,
) -> Generator[Block, None, None]:
    rows = range(start, len(source))
    if tower.device.type != "cpu":
        yield from (block(*batch) for batch in in_batches(read_one, rows, batch_size, workers))
        return
    # On a CPU each thread decodes and encodes a whole batch on its own core. If decoding ran beside a tower that uses
    # every core, the tower's threads would wait for each other at every layer, which is slower.
    workers = workers or min(cores(), MAX_TOWERS)
    before = torch.get_num_threads()
    share = max(1, min(before, cores() // workers))
    batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    try:
        yield from ordered(
            lambda batch: block(batch, [read_one(row) for row in batch]),
            batches,
            workers + 1,
            workers,
            lambda: torch.set_num_threads(share),
        )
    finally:
        torch.set_num_threads(before)  # otherwise later threads would inherit our share


def _embed_classes(names: Sequence[str], templates: Sequence[str], tower: _Tower, start: int) -> Iterator[Block]:
    """Embed classes. Each field is the mean over a class's prompts, and the mean embedding is normalised again."""
    step = max(1, TEXTS // len(templates))
    for first in range(start, len(names), step):
        some = names[first : first + step]
        texts = prompts(some, templates)
        parts = [tower.texts(texts[i : i + TEXTS]) for i in range(0, len(texts), TEXTS)]
        means = [torch.cat(field).view(len(some), len(templates), -1).mean(dim=1) for field in zip(*parts, strict=True)]
        means[0] = F.normalize(means[0], dim=-1)
        yield first + len(some), _named("text", means, np.dtype("float32"), [f"class {name!r}" for name in some]), []


def _named(side: str, fields: Sequence[Tensor], dtype: np.dtype, rows: Sequence[str]) -> dict[str, np.ndarray]:
    """Return arrays by their names in the cache. Raises UserError for a value that is not finite in dtype."""
    arrays = {}
    for name, field in zip(FIELDS, fields, strict=False):
        exact = field.float().cpu().numpy()
        with np.errstate(over="ignore"):
            array = exact.astype(dtype)
        bad = ~np.isfinite(array).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            lost = "too large for float16: use float32" if np.isfinite(exact[row]).all() else "not finite"
            raise UserError(f"{rows[row]}: CLIP's {side} {name} is {lost}")
        arrays[f"{side}.{name}"] = array
    return arrays


def _embeddings(stored: Stored, side: str) -> Embeddings:
    arrays = {name: stored.arrays.get(f"{side}.{name}") for name in FIELDS}
    return Embeddings(**{name: torch.from_numpy(array) for name, array in arrays.items() if array is not None})


class _Tower:
    """CLIP's two towers. They return (normalised,), or (normalised, activation, output) where `projection` is set."""

    def __init__(self, clip: Clip, projection: bool) -> None:
        self.clip = clip
        self.projection = projection
        self.device = clip.mean.device
        self.lock = Lock()

    @torch.no_grad()
    def images(self, pixels: np.ndarray) -> tuple[Tensor, ...]:
        batch = torch.from_numpy(pixels).to(self.device)
        return self.clip.project_pixels(batch) if self.projection else (self.clip.encode_pixels(batch),)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        with self.lock:  # Hugging Face's fast tokenizers fail when two threads use them at once
            tokens = self.clip.tokenize(list(texts)).to(self.device)
        return self.clip.project_tokens(tokens) if self.projection else (self.clip.encode_tokens(tokens),)

    def identity(self) -> dict[str, Any]:
        """Return everything that the embeddings depend on, besides the data.

        The weights' fingerprint is not enough: the name and tag decide about QuickGELU, mean and std are not among the
        weights, and a tokenizer is identified by the token ids of a few texts.
        """
        clip = self.clip
        return {
            "format": FORMAT,
            "clip": [clip.spec.name, clip.spec.pretrained, clip.spec.fingerprint],
            "transform": asdict(clip.transform),
            "mean_std": [clip.mean.tolist(), clip.std.tolist()],
            "tokens": hashlib.sha256(clip.tokenize(PROBE).cpu().numpy().tobytes()).hexdigest()[:16],
            "projection": self.projection,
        }
