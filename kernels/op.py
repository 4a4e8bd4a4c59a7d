"""`fused_head`: the fused kernels as one PyTorch operator, with the folded PyTorch path where there is no GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vilu.kernels.folding import FoldedHead, HeadOutput
from vilu.kernels.plan import Variant

# Triton's interpreter runs the same kernels on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def fused_head(
    image_embedding: Tensor, folded: FoldedHead, *, offsets: Sequence[int] | Tensor | None = None
) -> HeadOutput:
    """P(failure), CLIP's prediction and its confidence scores, in one pass over the class set.

    The formulas are those of `FoldedHead`. A GPU runs the fused Triton kernels, a CPU runs `FoldedHead.answer`.

    Args:
        image_embedding: (B, D), L2-normalised, on the folded head's device, of any floating-point type. It is
            rounded to the class set's type. A row with NaN or infinity gets NaN scores and class 0; the other rows
            are not affected.
        folded: the head and class set, from `fold`.
        offsets: (B + 1,) integers that rise from 0 to K, for a class set per image: image b has the rows
            offsets[b]:offsets[b + 1], and its class_index counts from offsets[b]. The kernels read a tensor on the
            GPU without a check, because a check would stall the stream: an empty set then gives NaN, and no row
            beyond K is read.

    Returns:
        HeadOutput, each field (B,): class_index int64, the rest float32 (float64 for a float64 head).

    Raises:
        ValueError: shapes or devices that do not fit, an empty batch, or offsets that do not rise from 0 to K.

    Example:
        >>> import torch
        >>> from vilu import ViLUHead
        >>> from vilu.kernels import fold, fused_head
        >>> text_embeddings = torch.eye(3, 8)
        >>> folded = fold(ViLUHead(8, hidden=(16, 4)), text_embeddings)
        >>> output = fused_head(text_embeddings[[2, 0]], folded)
        >>> output.class_index
        tensor([2, 0])
        >>> output.failure_probability.shape
        torch.Size([2])
    """
    t = folded.text_embeddings
    if image_embedding.ndim != 2 or image_embedding.shape[1] != t.shape[1] or not image_embedding.shape[0]:
        raise ValueError(f"image_embedding must be (B, {t.shape[1]}), got {tuple(image_embedding.shape)}")
    if image_embedding.device != t.device:
        raise ValueError(f"image_embedding is on {image_embedding.device}, the folded head on {t.device}")
    if offsets is not None:
        offsets = _checked_offsets(offsets, image_embedding.shape[0], t)
    if not (t.is_cuda or INTERPRETED) or t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        if offsets is None:
            return folded.answer(image_embedding)
        bounds = offsets.tolist()
        each = [folded.answer(v[None], slice(*bounds[i : i + 2])) for i, v in enumerate(image_embedding)]
        return HeadOutput(*(torch.cat(column) for column in zip(*each, strict=True)))
    scores, index = torch.ops.vilu.fused_head(
        image_embedding.contiguous(),
        **folded.kernel_tensors(),
        offsets=offsets,
        variant=folded.variant_json,
        logit_scale=folded.logit_scale,
        attention_scale=folded.attention_scale,
        prior=folded.prior or 0.0,
    )
    failure, confidence, entropy, doctor = scores.unbind(0)
    return HeadOutput(failure, index, confidence, entropy, doctor)


def _checked_offsets(offsets: Sequence[int] | Tensor, images: int, text_embeddings: Tensor) -> Tensor:
    given, classes = torch.as_tensor(offsets), text_embeddings.shape[0]
    if given.shape != (images + 1,) or given.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be {images + 1} integers for {images} images, got {tuple(given.shape)}")
    on_gpu = given.is_cuda and text_embeddings.is_cuda
    if not on_gpu and (given[0] != 0 or given[-1] != classes or bool((given.diff() < 1).any())):
        raise ValueError(f"offsets must rise from 0 to {classes}, every class set with a row: {given.tolist()}")
    return given.to(text_embeddings.device).contiguous()


@torch.library.custom_op("vilu::fused_head", mutates_args=(), device_types=("cuda", "cpu"))
def _fused_head(
    image_embedding: Tensor,
    text_embeddings: Tensor,
    query: Tensor | None,
    predicted: Tensor | None,
    attended: Tensor | None,
    packed: Tensor,
    offsets: Tensor | None,
    variant: str,
    logit_scale: float,
    attention_scale: float,
    prior: float,
) -> tuple[Tensor, Tensor]:
    """scores (4, B) float32 and class_index (B,) int64; the tensors are those of `FoldedHead.kernel_tensors`."""
    from vilu.kernels import fused

    tensors = {
        "text_embeddings": text_embeddings,
        "query": query,
        "predicted": predicted,
        "attended": attended,
        "packed": packed,
        "offsets": offsets,
    }
    scales = fused.Scales(logit_scale, attention_scale, prior)
    compiled_for = replace(Variant.from_json(variant), itemsize=text_embeddings.element_size())
    on_gpu = image_embedding.is_cuda
    with torch.cuda.device(image_embedding.device) if on_gpu else contextlib.nullcontext():
        return fused.launch(image_embedding, tensors, compiled_for, scales)


@_fused_head.register_fake
def _(image_embedding: Tensor, *_others: object, **_named: object) -> tuple[Tensor, Tensor]:
    images = image_embedding.shape[0]
    return (
        image_embedding.new_empty((4, images), dtype=torch.float32),
        image_embedding.new_empty((images,), dtype=torch.int64),
    )
