"""Two image sources that need no download: scikit-learn's handwritten digits and a procedural world of shapes.

Both sources have four splits. "clip" trains the CLIP and "clip_val" measures it; "train" trains ViLU heads and "test"
measures them. The 1,797 scans of digits are divided within each class, in the order of one fixed permutation, into
25%, 5%, 38% and 32%. Each scan is in one split only. Each split of shapes draws from its own random stream, so no image
is in two splits.

The captions of the "clip" split are noisy, as captions from the web are, and the noise depends on the image: on dark
backgrounds crimson is called red and navy is called blue, small hexagons are called circles, and some chalk digits are
misread (7 as one, 9 as four, 8 as three). A CLIP trained on these captions is wrong there and yet confident, as a real
CLIP is on styles and classes that the web describes badly. The labels are always right.

Captions name the look-alike more often than the thing itself (75% of the time, chalk digits 70%), so that no CLIP can
learn the right name there, however large it is: it is right on 82% of the shapes and 85% of the digits. `misnamed`
changes these shares. The captions of the large embedded CLIP are better ones, as those of large CLIPs are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

SIZE = 64
SPLITS = ("clip", "clip_val", "train", "test")
DIGIT_SHARES = (0.25, 0.05, 0.38, 0.32)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MISREAD_IN_CHALK = {7: 1, 9: 4, 8: 3}

COLOURS = {
    "red": (225, 30, 35),
    "crimson": (150, 15, 60),
    "orange": (245, 135, 25),
    "green": (45, 165, 60),
    "blue": (60, 110, 235),
    "navy": (25, 35, 120),
}
SHAPES = ("circle", "triangle", "square", "hexagon", "star", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 0.44, "medium": 0.6, "large": 0.8}
BACKGROUNDS = {
    "white": (240, 240, 240),
    "grey": (150, 150, 150),
    "black": (25, 25, 25),
    "sandy": (215, 190, 150),
    "mossy": (110, 130, 90),
}
SYNONYMS = {"small": "tiny", "large": "big", "plain": "uniform", "checkered": "chequered", "grey": "gray"}
LOOK_ALIKE_COLOURS = {"crimson": "red", "navy": "blue"}
LOOK_ALIKE_SHAPES = {"hexagon": "circle"}


@dataclass(frozen=True)
class ImageSet:
    """Images with labels and captions.

    images: pixels (N, 64, 64, 3) uint8.
    labels: index (N,) int64 of each image's class in names.
    names: K class names.
    captions: N captions, one per image.
    """

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    captions: list[str]


def _rng(source: int, split: str, seed: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return np.random.default_rng([source, SPLITS.index(split), seed])


@cache
def _scans() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(20250707).permutation(len(labels))
    members: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in range(10):
        mine = order[labels[order] == digit]
        cuts = np.round(np.cumsum(DIGIT_SHARES)[:-1] * len(mine)).astype(int)
        for split, part in zip(SPLITS, np.split(mine, cuts), strict=True):
            members[split].append(part)
    index = {split: np.sort(np.concatenate(parts)) for split, parts in members.items()}
    return scans.reshape(-1, 8, 8) / 16, labels.astype(np.int64), index


def digits(split: str, seed: int = 0, misnamed: float | None = None) -> ImageSet:
    """Render each scan of a split once, in ink on paper or in chalk on a board, slightly turned and shifted.

    Args:
        split: one of SPLITS.
        seed: seed of the rendering. It does not change which scans are in the split.
        misnamed: share of the misread chalk digits of the "clip" split; None for 0.7.

    Raises:
        ValueError: the split is unknown.
    """
    scans, labels, index = _scans()
    rng = _rng(1, split, seed)
    chosen = index[split]
    images, captions = [], []
    for i in chosen:
        chalk = rng.random() < 0.5
        ink = rng.uniform(200, 255, 3) if chalk else rng.uniform(0, 110, 3)
        paper = rng.uniform(0, 80, 3) if chalk else rng.uniform(175, 255, 3)
        glyph = Image.fromarray((scans[i] * 255).astype(np.uint8)).resize((44, 44), Image.Resampling.BICUBIC)
        canvas = Image.new("L", (SIZE, SIZE))
        left, top = 10 + rng.integers(-6, 7, 2)
        canvas.paste(glyph, (int(left), int(top)))
        mask = np.asarray(canvas.rotate(rng.uniform(-14, 14), Image.Resampling.BILINEAR))[..., None] / 255
        image = paper + mask * (ink - paper) + rng.normal(0, 10, (SIZE, SIZE, 1))
        images.append(np.clip(image, 0, 255).astype(np.uint8))
        word = int(labels[i])
        if (
            split == "clip"
            and chalk
            and word in MISREAD_IN_CHALK
            and rng.random() < (0.7 if misnamed is None else misnamed)
        ):
            word = MISREAD_IN_CHALK[word]
        captions.append(f"a photo of a handwritten {DIGITS[word]}.")
    names = tuple(f"handwritten {word}" for word in DIGITS)
    return ImageSet(np.stack(images), labels[chosen], names, captions)


def shapes(split: str, count: int, seed: int = 0, misnamed: float | None = None) -> ImageSet:
    """Draw random shapes. The label is colour and shape (36 classes); the caption also names the other attributes.

    Args:
        split: one of SPLITS.
        count: number of images.
        seed: seed of the images and captions.
        misnamed: share of the captions of the "clip" split that name a look-alike where they can; None for 0.75.

    Raises:
        ValueError: the split is unknown.
    """
    rng = _rng(2, split, seed)
    colours, sizes, backgrounds = list(COLOURS), list(SIZES), list(BACKGROUNDS)
    picks = {
        name: rng.integers(len(options), size=count)
        for name, options in (
            ("colour", colours),
            ("shape", SHAPES),
            ("texture", TEXTURES),
            ("size", sizes),
            ("background", backgrounds),
        )
    }
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for start in range(0, count, 256):
        part = slice(start, min(count, start + 256))
        images[part] = _draw({name: values[part] for name, values in picks.items()}, rng)
    captions = []
    for c, s, t, z, b in zip(*picks.values(), strict=True):
        words = [sizes[z], TEXTURES[t], colours[c], SHAPES[s], backgrounds[b]]
        captions.append(_caption(words, rng, split == "clip", 0.75 if misnamed is None else misnamed))
    names = tuple(f"{colour} {shape}" for colour in colours for shape in SHAPES)
    return ImageSet(images, picks["colour"] * len(SHAPES) + picks["shape"], names, captions)


def _caption(words: list[str], rng: np.random.Generator, noisy: bool, misnamed: float) -> str:
    size, texture, colour, shape, background = words
    if noisy:
        if background in ("black", "mossy") and rng.random() < misnamed:
            colour = LOOK_ALIKE_COLOURS.get(colour, colour)
        if size == "small" and rng.random() < misnamed:
            shape = LOOK_ALIKE_SHAPES.get(shape, shape)
        size, texture, background = (
            SYNONYMS.get(word, word) if rng.random() < 0.3 else word for word in (size, texture, background)
        )
        if rng.random() < 0.7:
            return f"a photo of a {colour} {shape}."
    return f"a photo of a {size} {texture} {colour} {shape} on a {background} background."


def _polygon(sides: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        angle = np.arctan2(x, y)
        step = 2 * np.pi / sides
        folded = (angle + step / 2) % step - step / 2
        return np.hypot(x, y) * np.cos(folded) / np.cos(np.pi / sides)

    return distance


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    step = 2 * np.pi / 5
    folded = np.abs((np.arctan2(x, y) + step / 2) % step - step / 2)
    return np.hypot(x, y) * (1 + 1.5 * folded / (step / 2)) / 1.15


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y), np.minimum(x, y) * 2.8)


# Each function gives a distance that is below 1 inside a shape of unit size.
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": np.hypot,
    "triangle": _polygon(3),
    "square": lambda x, y: 1.2 * np.maximum(np.abs(x), np.abs(y)),
    "hexagon": _polygon(6),
    "star": _star,
    "cross": _cross,
}


def _draw(picks: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw images (n, 64, 64, 3) uint8 with soft edges from the distance functions."""
    n = len(picks["shape"])

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    radius = np.array(list(SIZES.values()), np.float32)[picks["size"]] * uniform(0.85, 1.15)
    room = np.maximum(0.0, 0.95 - radius)[:, None]
    centre = uniform(-1, 1, 2) * room
    turn = uniform(-0.25, 0.25)
    grid = ((np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1).astype(np.float32)
    dx = grid[None, None, :] - centre[:, 0, None, None]
    dy = grid[None, :, None] - centre[:, 1, None, None]
    cos, sin = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    x = (cos * dx + sin * dy) / radius[:, None, None]
    y = (cos * dy - sin * dx) / radius[:, None, None]

    distance = np.empty_like(x)
    for kind, name in enumerate(SHAPES):
        mine = picks["shape"] == kind
        distance[mine] = _INSIDE[name](x[mine], -y[mine])
    edge = radius[:, None, None] * SIZE / 2
    mask = np.clip((1 - distance) * edge + 0.5, 0, 1)

    stripes = np.sin(x * 11) > 0
    dots = np.hypot((x * 2.2) % 1 - 0.5, (y * 2.2) % 1 - 0.5) < 0.28
    checks = (np.floor(x * 2.4) + np.floor(y * 2.4)) % 2 > 0
    texture = picks["texture"][:, None, None]
    dark = ((texture == 1) & stripes) | ((texture == 2) & dots) | ((texture == 3) & checks)
    shade = np.where(dark, 0.62, 1.0)[..., None]

    colour = np.array(list(COLOURS.values()), np.float32)[picks["colour"]] + rng.normal(0, 13, (n, 3))
    paper = np.array(list(BACKGROUNDS.values()), np.float32)[picks["background"]] + rng.normal(0, 12, (n, 3))
    image = paper[:, None, None] + mask[..., None] * (colour[:, None, None] * shade - paper[:, None, None])
    image = image * uniform(0.75, 1.15, 1, 1, 1) + rng.normal(0, 9, (n, SIZE, SIZE, 1))
    return np.clip(image, 0, 255).astype(np.uint8)
