"""The compiled kernels themselves, run by ptx_emulator.py: right answers in every order of events, and no race.

The kernels that use wgmma or tensor memory (16-bit batches on 9.0 and 10.0) are not among them; the same source
compiled for 8.0 is.
"""

import functools
import os
import re
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
from vilu.kernels import aot
from vilu.kernels.plan import plan_launches, tuned

F32, BF16 = torch.float32, torch.bfloat16
DIM = 64


@functools.cache
def built(arch, dtype, layout, projection):
    """A folded head, its settings, and name -> Compiled."""
    folded = fold(make_head(DIM, projection=projection), unit_rows(70, DIM, 2).to(dtype), layout=layout)
    return folded, tuned(arch, folded.variant), functools.cache(dict(aot.variants(folded, arch, [dtype])).get)


@functools.cache
def compiled(arch, dtype, layout, projection, name):
    _, _, make = built(arch, dtype, layout, projection)
    return make(name)()


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def run_batch(arch, dtype, layout, projection, v, *, seed=0, multiprocessors=3, only=None, change=None):
    """Memory after a batch, and where each value lies in it. only: one kernel to run; change: kernel -> its PTX."""
    folded, settings, make = built(arch, dtype, layout, projection)
    plan = plan_launches(
        folded.variant, len(v), len(folded.text_embeddings), ragged=False, settings=settings,
        multiprocessors=multiprocessors, pdl=arch >= 90,
        shared_softmax=folded.variant.shares_softmax(folded.logit_scale, folded.attention_scale),
    )  # fmt: skip
    memory = Memory()
    values: dict[str, Any] = {name: memory.put(bits(x)) for name, x in folded.kernel_tensors().items() if x is not None}
    values["t"] = values.pop("text_embeddings")
    # Each region is a tensor of its own, so that a kernel which leaves its region is found.
    ends = [start for _, start in plan.regions[1:]] + [plan.scratch]
    sizes = {name: 4 * (end - start) for (name, start), end in zip(plan.regions, ends, strict=True)}
    sizes |= {"scores": 16 * len(v), "index": 4 * len(v)}
    values |= {"v": memory.put(bits(v))} | {name: memory.new(size) for name, size in sizes.items()}
    values |= {"B": len(v), "K": len(folded.text_embeddings), "n_s": plan.splits, "prior": folded.prior or 0.0}
    values |= {"logit_scale": folded.logit_scale, "attention_scale": folded.attention_scale}
    for place, kernel in enumerate(plan.kernels):
        if only in (None, kernel.name):
            name = kernel.name if make(kernel.name) else f"{kernel.name}-{aot.TYPES[dtype]}"
            done = compiled(arch, dtype, layout, projection, name)
            ptx = (change or {}).get(kernel.name, done.ptx)
            arguments = [values[argument] for argument, _ in done.arguments] + [0, 0]
            dependent = kernel.waits and place > 0
            Kernel(ptx).run(memory, kernel.grid, arguments, done.shared, seed=seed, dependent=dependent)
    return memory, values, sizes


def answers(memory, values, sizes):
    """scores (4, B) and index (B,)."""
    images = sizes["index"] // 4
    scores = memory.get(values["scores"], np.float32, 4 * images).reshape(4, -1)
    return scores, memory.get(values["index"], np.int32, images)


CASES = [
    (90, F32, "folded", "shared", 1),
    (90, F32, "plain", "separate", 2),
    (90, F32, "plain", "identity", 10),
    (90, BF16, "plain", "shared", 1),
    (90, BF16, "folded", "shared", 2),
    (80, BF16, "plain", "shared", 18),
    (80, F32, "folded", "shared", 18),
]


@pytest.mark.parametrize(("arch", "dtype", "layout", "projection", "B"), CASES)
def test_compiled_kernels_are_right_in_every_order(arch, dtype, layout, projection, B):
    v = unit_rows(B, DIM, 1).to(dtype)
    folded, _, _ = built(arch, dtype, layout, projection)
    want = folded(v)
    first = None
    for seed in range(2):
        scores, index = answers(*run_batch(arch, dtype, layout, projection, v, seed=seed))
        assert index.tolist() == want.class_index.tolist()
        np.testing.assert_allclose(scores[0], want.failure_probability, rtol=0, atol=STORED[dtype])
        np.testing.assert_allclose(scores[1], want.confidence, rtol=0, atol=2e-5)
        np.testing.assert_allclose(scores[2], want.entropy, rtol=0, atol=2e-5)
        assert first is None or np.array_equal(first, scores), "the same bits in every order"
        first = scores


def test_an_image_that_is_not_finite():
    v = unit_rows(3, DIM, 1).float()
    v[1, 5] = np.nan
    scores, index = answers(*run_batch(90, F32, "folded", "shared", v))
    assert np.isnan(scores).tolist() == [[False, True, False]] * 4
    assert index[1] == 0


def mutants(ptx, pattern):
    """(number, PTX) without each line that matches."""
    lines = ptx.split("\n")
    found = [i for i, line in enumerate(lines) if re.match(pattern, line.strip())]
    assert found
    for number, i in enumerate(found):
        yield number, "\n".join(lines[:i] + lines[i + 1 :])


@pytest.mark.parametrize(
    "kernel", ["attend_image", "combine_few", "mlp_layer2_few", "mlp_layer3_few", "mlp_output_few"]
)
def test_every_wait_for_earlier_kernels_is_needed(kernel):
    """Without it a kernel meets the one before; or, of `attend_image`, `combine` no longer waits for `project`."""
    head = (90, F32, "folded", "shared")
    _, _, make = built(*head)
    ptx = compiled(*head, kernel if make(kernel) else f"{kernel}-fp32").ptx
    for _, changed in mutants(ptx, r"griddepcontrol\.wait"):
        with pytest.raises(RaceError, match="may still run"):
            run_batch(*head, unit_rows(1, DIM, 1).float(), change={kernel: changed})


# Barriers of a kernel that may go, by number, and why: a block's warps need no other warp there.
REDUNDANT: dict[str, dict[int, str]] = {
    "attend_image": {
        0: "the first copies are under way: nobody has read a buffer that the next ones fill",
        1: "in the loop, a warp waits for its own copies and reads no other's",
        2: "in the loop, a warp's next copies go where this warp alone has read",
        34: "the last one: every warp has itself written all that it reads, as the layout is replicated",
    },
    "attend_few": {},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "dtype"), [("attend_image", F32), ("attend_few", BF16)])
def test_every_barrier_is_needed(kernel, dtype):
    """A barrier that is missing in the attention is a race, or a wrong state or sum, in the order of one seed."""
    head = (90, dtype, "folded", "shared")
    v = unit_rows(1, DIM, 1).to(dtype)

    def outcome(**options):
        memory, values, sizes = run_batch(*head, v, multiprocessors=1, only=kernel, **options)
        return [memory.get(values[name], np.uint32, sizes[name] // 4).tolist() for name in ("state", "sums")]

    want = outcome()
    ptx = compiled(*head, f"{kernel}-{aot.TYPES[dtype]}").ptx
    survivors = []
    for number, changed in mutants(ptx, r"bar\.sync"):
        try:
            if outcome(change={kernel: changed}) == want:
                survivors.append(number)
        except AssertionError:  # a race among them
            continue
    assert survivors == list(REDUNDANT[kernel])
