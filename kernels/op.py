"""`fused_head`: the fused kernel as an operator of PyTorch, and the folded eager path where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vilu.kernels.folding import FoldedHead, HeadOutput
from vilu.kernels.plan import Variant

# Under the interpreter the real kernels run on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def fused_head(
    image_embedding: Tensor, folded: FoldedHead, *, offsets: Sequence[int] | Tensor | None = None
) -> HeadOutput:
    """CLIP's answer, its scores and P(failure) in one pass over the class set, on any device.

    Args:
        image_embedding: (B, D), L2-normalised, on the folded head's device; read at the bank's precision.
            A row that is not finite gets NaN and class 0, and disturbs no other.
        folded: what `fold` gave.
        offsets: (B + 1,) integers, rising from 0 to K: image b has rows offsets[b]:offsets[b+1] as its own class
            set, class_index counts from there, and the batch is still one launch. A tensor on the GPU is taken as
            it is (checking it would stall the stream): an empty set gives NaN, and no row beyond K is ever read.

    Raises:
        ValueError: shapes or devices that do not fit, an empty batch, or offsets that do not rise from 0 to K.
    """
    t = folded.text_embeddings
    if image_embedding.ndim != 2 or image_embedding.shape[1] != t.shape[1] or not image_embedding.shape[0]:
        raise ValueError(f"image_embedding must be (B, {t.shape[1]}), got {tuple(image_embedding.shape)}")
    if image_embedding.device != t.device:
        raise ValueError(f"image_embedding is on {image_embedding.device}, the folded head on {t.device}")
    if offsets is not None:
        offsets = _offsets(offsets, image_embedding.shape[0], t)
    kernel = t.is_cuda or INTERPRETED
    if not kernel or t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        if offsets is None:
            return folded.answer(image_embedding)
        bounds = offsets.tolist()
        each = [folded.answer(v[None], slice(*bounds[i : i + 2])) for i, v in enumerate(image_embedding)]
        return HeadOutput(*(torch.cat(column) for column in zip(*each, strict=True)))

    scores, index = torch.ops.vilu.fused_head(
        image_embedding.contiguous(),
        t,
        folded.keys if folded.layout == "folded" else folded.query_map,
        folded.predicted if folded.layout == "folded" else None,
        folded.attended if folded.layout == "folded" else None,
        folded.packed,
        offsets,
        folded.widths,
        folded.packed_offsets(),
        ",".join(folded.parts),
        folded.layout == "folded",
        folded.logit_scale,
        folded.attention_scale,
        folded.prior or 0.0,
    )
    failure, confidence, entropy, doctor = scores.unbind(0)
    return HeadOutput(failure, index, confidence, entropy, doctor)


def _offsets(offsets: Sequence[int] | Tensor, images: int, bank: Tensor) -> Tensor:
    given, rows = torch.as_tensor(offsets), bank.shape[0]
    if given.shape != (images + 1,) or given.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be {images + 1} integers for {images} images, got {tuple(given.shape)}")
    unread = given.is_cuda and bank.is_cuda
    if not unread and (given[0] != 0 or given[-1] != rows or bool((given.diff() < 1).any())):
        raise ValueError(f"offsets must rise from 0 to {rows}, every class set with a row: {given.tolist()}")
    return given.to(bank.device).contiguous()


@torch.library.custom_op("vilu::fused_head", mutates_args=(), device_types=("cuda", "cpu"))
def _fused_head(
    image_embedding: Tensor,
    text_embeddings: Tensor,
    query: Tensor | None,
    predicted: Tensor | None,
    attended: Tensor | None,
    packed: Tensor,
    offsets: Tensor | None,
    widths: Sequence[int],
    at: Sequence[int],
    parts: str,
    folded: bool,
    logit_scale: float,
    attention_scale: float,
    prior: float,
) -> tuple[Tensor, Tensor]:
    from vilu.kernels import fused

    variant = Variant(
        dim=text_embeddings.shape[1],
        widths=tuple(widths),
        at=tuple(at),
        parts=tuple(parts.split(",")),
        projected=query is not None,
        folded=folded,
        itemsize=text_embeddings.element_size(),
    )
    banks = (text_embeddings, query, predicted, attended, packed)
    if image_embedding.device.type == "cpu":
        return fused.launch(image_embedding, *banks, offsets, variant, logit_scale, attention_scale, prior)
    with torch.cuda.device(image_embedding.device):
        return fused.launch(image_embedding, *banks, offsets, variant, logit_scale, attention_scale, prior)


@_fused_head.register_fake
def _(
    image_embedding: Tensor,
    text_embeddings: Tensor,
    query: Tensor | None,
    predicted: Tensor | None,
    attended: Tensor | None,
    packed: Tensor,
    offsets: Tensor | None,
    widths: Sequence[int],
    at: Sequence[int],
    parts: str,
    folded: bool,
    logit_scale: float,
    attention_scale: float,
    prior: float,
) -> tuple[Tensor, Tensor]:
    images = image_embedding.shape[0]
    return (
        image_embedding.new_empty((4, images), dtype=torch.float32),
        image_embedding.new_empty((images,), dtype=torch.int64),
    )
