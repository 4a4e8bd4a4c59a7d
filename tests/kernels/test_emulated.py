"""The compiled kernels themselves, run by ptx_emulator.py: right answers in every order of events, and no race.

`attend_tile` in 16 bits uses wgmma on 9.0 in the plain layout, and mma.sync everywhere else. The kernels of large
batches are in test_emulated_large.py.
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

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DIM = 64
WIDE = 320  # several chunks, the last one ragged: loops over the width, which DIM leaves out


@functools.cache
def built(arch, dtype, layout, projection, dim=DIM):
    """A folded head, its settings, and name -> Compiled."""
    folded = fold(make_head(dim, projection=projection), unit_rows(70, dim, 2).to(dtype), layout=layout)
    return folded, tuned(arch, folded.variant), functools.cache(dict(aot.variants(folded, arch, [dtype])).get)


@functools.cache
def compiled(arch, dtype, layout, projection, name, dim=DIM):
    _, _, make = built(arch, dtype, layout, projection, dim)
    return make(name)()


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def memory_of(folded, plan, v):
    """Memory before a batch, where each value lies in it, and the sizes of what the kernels write."""
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
    return memory, values, sizes


def run_batch(arch, dtype, layout, projection, v, *, seed=0, multiprocessors=3, only=None, change=None, **options):
    """Memory after a batch, and where each value lies in it.

    only: one kernel to run; change: kernel -> its PTX; options: `offsets` of a class set per image,
    and `at_once` of `Kernel.run`.
    """
    offsets, at_once, dim = options.get("offsets"), options.get("at_once", 0), v.shape[1]
    folded, settings, make = built(arch, dtype, layout, projection, dim)
    plan = plan_launches(
        folded.variant, len(v), len(folded.text_embeddings), ragged=offsets is not None, settings=settings,
        multiprocessors=multiprocessors, pdl=arch >= 90,
        shared_softmax=folded.variant.shares_softmax(folded.logit_scale, folded.attention_scale),
    )  # fmt: skip
    memory, values, sizes = memory_of(folded, plan, v)
    if offsets is not None:
        values["offsets"] = memory.put(np.array(offsets, np.int32))
    for place, kernel in enumerate(plan.kernels):
        if only in (None, kernel.name):
            name = kernel.name if make(kernel.name) else f"{kernel.name}-{aot.TYPES[dtype]}"
            done = compiled(arch, dtype, layout, projection, name, dim)
            ptx = (change or {}).get(kernel.name, done.ptx)
            arguments = [values[argument] for argument, _ in done.arguments] + [0, 0]
            dependent = kernel.waits and place > 0
            Kernel(ptx).run(
                memory, kernel.grid, arguments, done.shared, seed=seed, dependent=dependent, at_once=at_once
            )
    return memory, values, sizes


def answers(memory, values, sizes):
    """scores (4, B) and index (B,)."""
    images = sizes["index"] // 4
    scores = memory.get(values["scores"], np.float32, 4 * images).reshape(4, -1)
    return scores, memory.get(values["index"], np.int32, images)


def assert_right(scores, index, want, dtype):
    """The answers of a batch are those of the folded head."""
    assert index.tolist() == want.class_index.tolist()
    np.testing.assert_allclose(scores[0], want.failure_probability, rtol=0, atol=STORED[dtype])
    np.testing.assert_allclose(scores[1], want.confidence, rtol=0, atol=2e-5)
    np.testing.assert_allclose(scores[2], want.entropy, rtol=0, atol=2e-5)


CASES = [(90, F32, "folded", "shared", 1), (90, BF16, "plain", "shared", 1)]
MORE = [
    (90, F32, "plain", "separate", 2),
    (90, F32, "plain", "identity", 10),
    (80, BF16, "folded", "shared", 18),
    (90, BF16, "folded", "shared", 2),
    (80, BF16, "plain", "shared", 18),
    (80, F32, "folded", "shared", 18),
    (90, F32, "folded", "shared", 18),
    (80, F16, "plain", "separate", 18),
    (90, BF16, "plain", "shared", 18),
    (90, F16, "folded", "shared", 70),
    (90, F16, "folded", "identity", 3),
    (86, F32, "folded", "identity", 1),
    (89, F16, "folded", "shared", 10),
    (100, F32, "folded", "shared", 1),
    (100, F32, "plain", "shared", 18),
    (100, BF16, "plain", "shared", 1),
    (100, F16, "folded", "shared", 18),
    (120, F32, "plain", "separate", 10),
    (120, F16, "folded", "shared", 2),
    (120, BF16, "plain", "shared", 18),
]


@pytest.mark.parametrize(
    ("arch", "dtype", "layout", "projection", "B"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE],
)
def test_compiled_kernels_are_right_in_every_order(arch, dtype, layout, projection, B):
    v = unit_rows(B, DIM, 1).to(dtype)
    folded, _, _ = built(arch, dtype, layout, projection)
    want = folded(v)
    first = None
    for seed in range(2):
        scores, index = answers(*run_batch(arch, dtype, layout, projection, v, seed=seed))
        assert_right(scores, index, want, dtype)
        assert first is None or np.array_equal(first, scores), "the same bits in every order"
        first = scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "layout", "B"),
    [(90, F32, "folded", 18), (90, BF16, "plain", 18), (90, F16, "plain", 2), (80, F32, "plain", 1)],
)
def test_wide_heads(arch, dtype, layout, B):
    v = unit_rows(B, WIDE, 1).to(dtype)
    folded, _, _ = built(arch, dtype, layout, "shared", WIDE)
    scores, index = answers(*run_batch(arch, dtype, layout, "shared", v))
    assert_right(scores, index, folded(v), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "layout", "B"),
    [(90, F32, "folded", 3), (90, BF16, "plain", 3), (80, F32, "plain", 10), (120, F16, "folded", 10)],
)
def test_a_class_set_for_each_image(arch, dtype, layout, B):
    v = unit_rows(B, DIM, 1).to(dtype)
    folded, _, _ = built(arch, dtype, layout, "shared")
    bounds = np.linspace(0, len(folded.text_embeddings), B + 1).astype(int).tolist()
    scores, index = answers(*run_batch(arch, dtype, layout, "shared", v, offsets=bounds))
    for i in range(B):
        want = folded.answer(v[i : i + 1], slice(bounds[i], bounds[i + 1]))
        assert index[i] == want.class_index
        np.testing.assert_allclose(scores[0, i], want.failure_probability[0], rtol=0, atol=STORED[dtype])
        np.testing.assert_allclose(scores[1:3, i], [want.confidence[0], want.entropy[0]], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_an_image_that_is_not_finite():
    v = unit_rows(3, DIM, 1).float()
    v[1, 5] = np.nan
    scores, index = answers(*run_batch(90, F32, "folded", "shared", v))
    assert np.isnan(scores).tolist() == [[False, True, False]] * 4
    assert index[1] == 0


def mutants(ptx, pattern, replacement=None):
    """(number, PTX) without each line that matches, or with the match replaced there."""
    lines = ptx.split("\n")
    found = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    assert found
    for number, i in enumerate(found):
        put = [] if replacement is None else [re.sub(pattern, replacement, lines[i])]
        yield number, "\n".join(lines[:i] + put + lines[i + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "B"), [("tail_few", 1), ("attend_few", 9), ("tail", 9)])
def test_every_wait_for_earlier_kernels_is_needed(kernel, B):
    """Without it a kernel meets the one before; or, of the attention, `tail` no longer waits for `project`."""
    head = (90, F32, "folded", "shared")
    ptx = compiled(*head, f"{kernel}-fp32").ptx
    for number, changed in mutants(ptx, r"griddepcontrol\.wait"):
        if (kernel, number) == ("tail_few", 2):
            continue  # of programs for images beyond the batch: there are none where a program has one image
        with pytest.raises(RaceError, match="may still run"):
            run_batch(*head, unit_rows(B, DIM, 1).float(), change={kernel: changed})


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["wgmma.wait_group", "wgmma.fence", "fence.proxy.async", "cp.async.wait_group", "griddepcontrol.wait"]
)
def test_every_wait_and_fence_of_wide_tiles_is_needed(what):
    """Of `attend_tile` with wgmma, whose factors come from registers and from shared memory, filled in two ways."""
    head = (90, BF16, "plain", "shared")
    ptx = compiled(*head, "attend_tile-bf16", WIDE).ptx
    for _, changed in mutants(ptx, r"^\s*" + what.replace(".", r"\.")):
        with pytest.raises(RaceError):
            run_batch(*head, unit_rows(18, WIDE, 1).to(BF16), multiprocessors=1, change={"attend_tile": changed})


def races(*arguments, **options):
    try:
        run_batch(*arguments, **options)
    except RaceError as error:
        return "at the same time" in str(error)
    return False


# The ways in which a program of `tail` that waits for others can fail to: (what is taken away, what it becomes).
ORDER = {
    "acquire": (r"ld\.acquire", "ld.relaxed"),
    "release": (r"atom\.global\.gpu\.release", "atom.global.gpu.relaxed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["acquire", "release"])
@pytest.mark.parametrize(("kernel", "layout", "B"), [("tail_few", "plain", 1), ("tail", "folded", 9)])
def test_every_acquire_and_release_is_needed(what, kernel, layout, B):
    head = (90, F32, layout, "shared")
    v = unit_rows(B, DIM, 1).float()
    for number, changed in mutants(compiled(*head, f"{kernel}-fp32").ptx, *ORDER[what]):
        # Whether the first look at a counter suffices depends on the order.
        assert any(races(*head, v, seed=seed, change={kernel: changed}) for seed in range(8)), number


@pytest.mark.slow
def test_programs_need_not_all_fit_on_the_gpu_at_once():
    """Blocks one at a time, in the order in which a GPU starts them, never wait for a later one."""
    head = (90, F32, "folded", "shared")
    v = unit_rows(1, DIM, 1).float()
    run_batch(*head, v, at_once=1)
    with pytest.raises(AssertionError, match="wait for each other for ever"):
        run_batch(*head, v, at_once=-1)  # from the last to the first


# Barriers of a kernel that may go, by number, and why: a block's warps need no other warp there.
REDUNDANT: dict[str, dict[int, str]] = {
    "project": {},
    "attend_tile": {},
    "tail": {
        2: "what was read before lies elsewhere in shared memory than what is written",
        32: "before a count: at these widths warp 0 alone has stored columns, and a lane of it counts",
        36: "at these widths a layer's numbers fill the slice of warp 0: what the others still read there are zeros, "
        "and zeros are written again",
    },
    "attend_image": {
        0: "the first copies are under way: nobody has read a buffer that the next ones fill",
        1: "in the loop, a warp waits for its own copies and reads no other's",
        2: "in the loop, a warp's next copies go where this warp alone has read",
        10: "the last one: every warp has itself written all that it reads, as the layout is replicated",
    },
    "attend_few": {
        14: "before the sums are exchanged: what was read before lies elsewhere in shared memory than what is written",
    },
    "tail_few": {
        17: "h's columns of the first layer: every warp has itself written all that it reads",
        19: "before a count: warp 0 alone has stored outputs, and a lane of it counts",
        21: "before a count: as above, a layer later",
        25: "what was read before lies elsewhere in shared memory than what is written after",
        28: "before a count: warp 0 alone has stored the scores or columns, and a lane of it counts",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "dtype", "B"),
    [
        ("attend_image", F32, 1),
        ("attend_few", BF16, 1),
        ("tail_few", F32, 1),
        ("project", F32, 9),
        ("attend_tile", F32, 18),
        ("tail", F32, 9),
    ],
)
def test_every_barrier_is_needed(kernel, dtype, B):
    """A barrier that is missing is a race, or a wrong number in scratch or the answer, in the order of a few seeds."""
    head = (90, dtype, "folded", "shared")
    v = unit_rows(B, DIM, 1).to(dtype)
    only = None if kernel.startswith("tail") else kernel
    seen: tuple[str, ...] = ("scores", "h") if kernel.startswith("tail") else ("state", "sums")
    if kernel == "project":
        seen = ("hidden",)

    def outcome(**options):
        memory, values, sizes = run_batch(*head, v, multiprocessors=1, only=only, **options)
        return [memory.get(values[name], np.uint32, sizes[name] // 4).tolist() for name in seen]

    ptx = compiled(*head, f"{kernel}-{aot.TYPES[dtype]}").ptx
    survivors = []
    for number, changed in mutants(ptx, r"^\s*bar\.sync"):
        try:
            for seed in range(3):
                if outcome(seed=seed, change={kernel: changed}) != outcome(seed=seed):
                    break
            else:
                survivors.append(number)
        except AssertionError:  # a race among them
            continue
    assert survivors == list(REDUNDANT[kernel])
