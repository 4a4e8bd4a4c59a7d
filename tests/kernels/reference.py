"""What the kernel tests share: heads whose answers spread, the float64 reference, and the comparison with it.

The kernels run on a GPU, or, with TRITON_INTERPRET=1, interpreted on the CPU.
"""

import copy
import math
import os
from collections.abc import Sequence

import pytest
import torch

from tests.support.embeddings import TOLERANCE
from vilu import ViLUHead
from vilu.kernels import FoldedHead, HeadOutput, fold, fused_head

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: see test_interpreter.py"),
    pytest.mark.usefixtures("poisoned_memory"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]

# Largest error of P(failure), whose weights and class set are rounded to the storage type. CLIP's own scores are held
# to float32's tolerance everywhere.
STORED = TOLERANCE | {torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_head(dim: int, seed: int = 0, **options) -> ViLUHead:
    """A head whose answers spread over (0, 1), with projections away from the identity."""
    torch.manual_seed(seed)
    head = ViLUHead(dim, **{"hidden": (48, 40, 24)} | options)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            if (layer := getattr(head, name)) is not None:
                layer.weight += 0.3 * torch.randn(dim, dim) / math.sqrt(dim)
        linears = [layer for layer in head.mlp if isinstance(layer, torch.nn.Linear)]
        for layer in linears:
            layer.weight.normal_(std=1.4 / math.sqrt(layer.in_features))
        linears[0].weight *= math.sqrt(dim)
    return head


def reference(head: ViLUHead, v: torch.Tensor, t: torch.Tensor, logit_scale: float) -> HeadOutput:
    head, v, t = copy.deepcopy(head).double(), v.double().cpu(), t.double().cpu()
    with torch.no_grad():
        similarity = v @ t.T
        log_p = torch.log_softmax(logit_scale * similarity, dim=1)
        g = log_p.exp().square().sum(1)
        return HeadOutput(
            head.failure_probability(v, t),
            similarity.argmax(1),
            log_p.exp().amax(1),
            (log_p.exp() * log_p).sum(1) / (math.log(len(t)) if len(t) > 1 else 1),
            -(1 - g) / g,
        )


def assert_close(got: HeadOutput, want: HeadOutput, dtype: torch.dtype, scale: float = 100.0) -> None:
    """`scale`: the largest of the logit scales; a float32 logit's own rounding grows with it."""
    slack = max(1.0, scale / 100)
    assert got.class_index.dtype == torch.int64
    assert got.class_index.tolist() == want.class_index.tolist()
    for name, tolerance in {
        "failure_probability": STORED[dtype],
        "confidence": TOLERANCE[torch.float32],
        "entropy": TOLERANCE[torch.float32],
    }.items():
        value = getattr(got, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.cpu().double(), getattr(want, name), rtol=0, atol=tolerance * slack)
    torch.testing.assert_close(got.doctor.cpu().double(), want.doctor, rtol=1e-4 * slack, atol=1e-5 * slack)


def assert_equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def check(head: ViLUHead, v: torch.Tensor, t: torch.Tensor, *, dtype, layout, scale: float = 100.0) -> HeadOutput:
    v, t = v.to(DEVICE, dtype), t.to(DEVICE, dtype)
    folded = fold(copy.deepcopy(head).to(DEVICE), t, logit_scale=scale, layout=layout)
    got = fused_head(v, folded)
    assert_close(got, reference(head, v, t, scale), dtype, max(scale, head.attention_scale))
    return got


def operator_arguments(folded: FoldedHead, offsets: torch.Tensor | None = None) -> dict[str, object]:
    """What `fused_head` gives the operator besides the image embedding."""
    scales: dict[str, object] = {"logit_scale": 100.0, "attention_scale": 100.0, "prior": 0.0}
    return folded.kernel_tensors() | {"offsets": offsets, "variant": folded.variant_json} | scales
