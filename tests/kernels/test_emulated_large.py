"""The compiled kernels of large batches, run by ptx_emulator.py: wgmma's waits, copies and barriers, in several orders."""

import functools
import os
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.reference import STORED, make_head
from tests.support.embeddings import unit_rows
from vilu.kernels import fold

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests.kernels.ptx_emulator import Kernel, Memory, RaceError
from tests.kernels.test_emulated import answers, bits, mutants
from vilu.kernels import aot
from vilu.kernels.plan import plan_launches, tuned

BF16, F16 = torch.bfloat16, torch.float16
DIM, CLASSES, IMAGES = 128, 600, 5  # two chunks, three tiles of which one is ragged, a tile that is nearly empty


@functools.cache
def built(dtype, layout, projection):
    """A folded head, settings by which every batch is large, and name -> Compiled."""
    folded = fold(make_head(DIM, projection=projection), unit_rows(CLASSES, DIM, 2).to(dtype), layout=layout)
    settings = {role: dict(values) for role, values in tuned(90, folded.variant)}
    settings["score_tile"] |= {"images": 1, "classes": 1}
    hashable = tuple((role, tuple(sorted(values.items()))) for role, values in settings.items())
    makers = dict(aot.variants(folded, 90, [dtype]))
    return (
        folded,
        hashable,
        functools.cache(lambda name: makers[name if name in makers else f"{name}-{aot.TYPES[dtype]}"]()),
    )


def run_batch(head, v, *, seed=0, multiprocessors=4, only=None, change=None):
    """Memory after a batch, where each value lies in it, and the values' sizes."""
    folded, settings, compiled = built(*head)
    plan = plan_launches(
        folded.variant, len(v), CLASSES, ragged=False, settings=settings, multiprocessors=multiprocessors, pdl=True,
        shared_softmax=False,
    )  # fmt: skip
    memory = Memory()
    values: dict[str, Any] = {name: memory.put(bits(x)) for name, x in folded.kernel_tensors().items() if x is not None}
    values["t"] = values.pop("text_embeddings")
    ends = [start for _, start in plan.regions[1:]] + [plan.scratch]
    sizes = {name: 4 * (end - start) for (name, start), end in zip(plan.regions, ends, strict=True)}
    sizes |= {"scores": 16 * len(v), "index": 4 * len(v)}
    values |= {"v": memory.put(bits(v))} | {name: memory.new(size) for name, size in sizes.items()}
    values |= {"B": len(v), "K": CLASSES, "n_s": plan.splits, "prior": folded.prior or 0.0}
    values |= {"logit_scale": folded.logit_scale, "attention_scale": folded.attention_scale}
    assert [kernel.name for kernel in plan.kernels] == ["project_large", "score_tile", "sum_tile", "tail"]
    for place, kernel in enumerate(plan.kernels):
        done = compiled(kernel.name)
        arguments = [values[argument] for argument, _ in done.arguments] + [0, 0]
        ptx = (change or {}).get(kernel.name, done.ptx)
        Kernel(ptx).run(memory, kernel.grid, arguments, done.shared, seed=seed, dependent=kernel.waits and place > 0)
        if kernel.name == only:
            break
    return memory, values, sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout", "projection"),
    [(BF16, "plain", "shared"), (F16, "plain", "identity"), (F16, "folded", "shared")],
)
def test_compiled_kernels_of_large_batches_are_right_in_every_order(dtype, layout, projection):
    v = unit_rows(IMAGES, DIM, 1).to(dtype)
    folded, _, _ = built(dtype, layout, projection)
    want = folded(v)
    first = None
    for seed in range(2):
        scores, index = answers(*run_batch((dtype, layout, projection), v, seed=seed))
        assert index.tolist() == want.class_index.tolist()
        np.testing.assert_allclose(scores[0], want.failure_probability, rtol=0, atol=STORED[dtype])
        np.testing.assert_allclose(scores[1], want.confidence, rtol=0, atol=2e-5)
        np.testing.assert_allclose(scores[2], want.entropy, rtol=0, atol=2e-5)
        assert first is None or np.array_equal(first, scores), "the same bits in every order"
        first = scores
