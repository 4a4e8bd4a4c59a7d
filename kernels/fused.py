"""Launch the fused head's kernels from PyTorch: one plan of launches a batch, on the current stream.

The kernels are in attention.py, tile_attention.py, large_batch.py and mlp.py; plan.py says which run. They pass
intermediate values in scratch memory that belongs to one call, counters included, which its own kernels zero: calls on
several streams, in CUDA graphs and in torch.compile do not meet.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vilu.kernels import attention, large_batch, mlp, tile_attention
from vilu.kernels.plan import Variant, plan_launches, tuned
from vilu.kernels.softmax_state import INTERPRETED

KERNELS: dict[str, Any] = {
    "project": attention.project,
    "attend_image": attention.attend_image,
    "attend_tile": tile_attention.attend_tile,
    "score_tile": large_batch.score_tile,
    "sum_tile": large_batch.sum_tile,
    "tail": mlp.tail,
}


@functools.cache
def device_of(index: int) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and multiprocessors; a small made-up device under the interpreter."""
    if INTERPRETED:
        return 0, 3
    p = torch.cuda.get_device_properties(index)
    return p.major * 10 + p.minor, p.multi_processor_count


class Scales(NamedTuple):
    """The numbers of a folded head: CLIP's factor on v · t, the attention's, and the weight of the prior."""

    logit_scale: float
    attention_scale: float
    prior: float


def launch(
    image_embedding: Tensor, tensors: Mapping[str, Tensor | None], variant: Variant, scales: Scales
) -> tuple[Tensor, Tensor]:
    """scores (4, B) float32 (failure_probability, confidence, entropy, doctor) and class_index (B,) int64.

    Args:
        image_embedding: (B, D), contiguous.
        tensors: those of `FoldedHead.kernel_tensors`, and "offsets", (B + 1,) integers or None; all contiguous and on
            the image embedding's device.
    """
    t = tensors["text_embeddings"]
    assert t is not None
    B, K, device = len(image_embedding), len(t), image_embedding.device
    arch, multiprocessors = device_of(device.index or 0)
    plan = plan_launches(
        variant,
        B,
        K,
        ragged=tensors["offsets"] is not None,
        settings=tuned(arch, variant),
        multiprocessors=multiprocessors,
        shared_softmax=variant.shares_softmax(scales.logit_scale, scales.attention_scale),
        pdl=arch >= 90,
    )
    scores = torch.empty((4, B), dtype=torch.float32, device=device)
    index = torch.empty((B,), dtype=torch.int64, device=device)
    scratch = torch.empty((plan.scratch,), dtype=torch.float32, device=device)
    values: dict[str, Any] = dict(tensors) | scales._asdict() | {name: scratch[start:] for name, start in plan.regions}
    values |= {"v": image_embedding, "t": t, "scores": scores, "index": index, "B": B, "K": K, "n_s": plan.splits}
    for place, kernel in enumerate(plan.kernels):
        function, constants = KERNELS[kernel.function], dict(kernel.constants)
        arguments = {name: values[name] for name in function.arg_names if name not in constants}
        options: dict[str, Any] = {}
        if not INTERPRETED:
            options = {"num_warps": kernel.num_warps, "maxnreg": kernel.registers}
            options["launch_pdl"] = kernel.waits and place > 0
        function[kernel.grid](**arguments, **constants, **options)
    return scores, index
