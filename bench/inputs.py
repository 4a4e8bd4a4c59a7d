"""What the speed benchmarks answer: photographs as JPEG, and a checkpoint for a CLIP that has none."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench.head_forms import Case
from vilu import Checkpoint
from vilu.class_set import ClassSet
from vilu.clip import Clip
from vilu.data.image_files import image_files
from vilu.preprocess.image import decode

CLASSES = 1000
LEAD = 0.02  # of the similarity that a stand-in's answer has over the next
SIZE = (500, 375)


def photos(count: int, folder: Path | None = None, seed: int = 0) -> list[bytes]:
    """`count` JPEGs (quality 90, 500 x 375) of real photographs: crops, mirrored and of varied brightness.

    From scikit-learn's and matplotlib's samples; the files of `folder` are taken as they are, and repeat where too few.
    """
    if folder is not None:
        files = image_files(folder)
        return [files[i % len(files)].read_bytes() for i in range(count)]
    from matplotlib import cbook
    from PIL import ImageEnhance
    from sklearn.datasets import load_sample_images

    sources: list[Image.Image] = [Image.fromarray(image) for image in load_sample_images().images]
    sources.append(Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB"))
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        source = sources[i % len(sources)]
        width = int(min(source.width, source.height * SIZE[0] / SIZE[1]) * draw.uniform(0.5, 1))
        height = int(width * SIZE[1] / SIZE[0])
        left = int(draw.integers(source.width - width + 1))
        top = int(draw.integers(source.height - height + 1))
        image = source.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(draw.uniform(0.7, 1.3))
        made.append(jpeg(image))
    return made


def jpeg(image: Image.Image) -> bytes:
    """An image as JPEG, quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def stand_in(clip: Clip, images: Sequence[bytes]) -> Checkpoint:
    """A checkpoint for a CLIP that has none: made-up classes and an untrained head, whose answers on `images` spread.

    Random text embeddings would give all images one class, and no error could show. So class vectors scatter around
    the images as these do themselves, and only such are taken as leave every image a clear first among them.
    """
    v = clip.embed_images([np.stack([decode(image, clip.transform) for image in images])])
    generator = torch.Generator().manual_seed(1)
    centre = v.mean(dim=0)
    scatter = torch.randn(32 * CLASSES, len(v), generator=generator) @ (v - centre) / math.sqrt(len(v))
    beside = torch.randn(scatter.shape, generator=generator) / math.sqrt(v.shape[1])
    away = torch.linspace(0, 2, len(scatter))[:, None]
    candidates = F.normalize(centre + scatter + away * beside, dim=1)
    taken: list[int] = []
    first = torch.full((len(v),), -2.0)
    for i, similarity in enumerate(candidates @ v.T):
        if ((similarity - first).abs() >= LEAD).all() and len(taken) < CLASSES:
            first = torch.maximum(first, similarity)
            taken.append(i)
    t = candidates[taken]
    head, _, _ = Case(1, CLASSES, v.shape[1], torch.float32).data("cpu")
    with torch.no_grad():
        logit = head(v, t)
        last: Any = head.mlp[-1]
        gain = 1.5 / float(logit.std())
        last.bias.copy_(gain * (last.bias - logit.median()))
        last.weight.mul_(gain)
    names = tuple(f"class {i}" for i in range(len(t)))
    return Checkpoint(head.eval(), clip.spec, ClassSet(names, ("{}",), t), meta={"trained": False})
