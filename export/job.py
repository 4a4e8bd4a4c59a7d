"""One export: what is written and measured, as all its steps read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from vilu.checkpoint import Checkpoint, digest
from vilu.class_set import ClassSet
from vilu.clip import Clip
from vilu.export.cache import NO_CACHE, Cache
from vilu.export.graphs import HeadGraph
from vilu.export.limits import Limits
from vilu.export.model_config import Runtime, Tensors
from vilu.export.outlier import OutlierGraph
from vilu.export.repository import Served
from vilu.export.sample import Sample, texts
from vilu.export.towers import Towers
from vilu.kernels import FoldedHead, fold

# How many inputs measure what needs no more: the provider that servers fall back to, the joined graph, and texts in
# float32. An error there shows on any input, whereas a reduced precision is judged by how many inputs it changes.
FEW_INPUTS = 32
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        checkpoint: the head and its threshold.
        clip: the loaded CLIP.
        class_set: what the server answers from unless a request says otherwise.
        sample: images to measure on, and to calibrate on.
        max_batch_size: the largest batch the server forms.
        runtime: what runs the graphs.
        limits: what the server refuses.
        cuda_archs: compute capabilities of the fused head; empty for a head in ONNX.
        preprocess: "exact" or "fast", how images are decoded.
        cache: what earlier exports kept of their towers.
    """

    checkpoint: Checkpoint
    clip: Clip
    class_set: ClassSet
    sample: Sample
    max_batch_size: int
    runtime: Runtime
    limits: Limits
    cuda_archs: tuple[int, ...]
    preprocess: str
    cache: Cache = NO_CACHE

    @property
    def precision(self) -> str:
        return self.runtime.precision

    @property
    def served(self) -> Served:
        threshold, fingerprint = self.checkpoint.threshold, self.clip.spec.fingerprint
        known = (self.checkpoint.meta.get("calibration") or {}).get("reference")
        return Served(
            self.class_set,
            threshold,
            fingerprint,
            self.max_batch_size,
            self.limits,
            digest(self.checkpoint),
            json.dumps(known) if known else "",
            self.checkpoint.outlier,
        )

    @cached_property
    def towers(self) -> Towers:
        return Towers(self.clip, self.cache)

    @cached_property
    def folded(self) -> FoldedHead:
        text = self.class_set.text_embeddings
        return fold(self.checkpoint.head, text, logit_scale=self.clip.spec.logit_scale)

    @cached_property
    def head(self) -> HeadGraph:
        return HeadGraph(self.folded, self.checkpoint.threshold)

    @cached_property
    def outlier(self) -> OutlierGraph | None:
        return None if self.checkpoint.outlier is None else OutlierGraph(self.checkpoint.outlier)

    @cached_property
    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (N, L) to measure on, and others to calibrate on."""
        measured, others = texts(self.class_set.names, self.class_set.templates)
        count = FEW_INPUTS if self.precision == "float32" else len(measured)
        return self.clip.tokenize(measured[:count]), self.clip.tokenize(others)

    @cached_property
    def tensors(self) -> Tensors:
        """Type and shape of what goes into and out of the towers."""
        side, dim, length = self.clip.transform.size, self.checkpoint.head.dim, self.tokens[0].shape[1]
        return {
            "PIXELS": ("TYPE_UINT8", [side, side, 3]),
            "IMAGE_EMBEDDING": ("TYPE_FP32", [dim]),
            "TOKENS": ("TYPE_INT64", [length]),
            "TEXT_EMBEDDING": ("TYPE_FP32", [dim]),
        }


class Ticker:
    """Counts steps for a progress bar whose total is an estimate."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress or (lambda *_: None), total, 0

    def __call__(self, what: str) -> None:
        self.done += 1
        self.progress(what, min(self.done, self.total), self.total)
