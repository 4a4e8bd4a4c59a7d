"""The compiled kernels of large batches, run by ptx_emulator.py: right in several orders, with no wait to spare."""

import copy
import functools
import os

import numpy as np
import pytest
import torch

from tests.kernels.reference import make_head
from tests.support.embeddings import unit_rows
from vilu.kernels import fold

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests.kernels.ptx_emulator import Kernel, RaceError
from tests.kernels.test_emulated import answers, assert_right, memory_of, mutants
from vilu.kernels import aot
from vilu.kernels.plan import plan_launches, tuned

BF16, F16 = torch.bfloat16, torch.float16
DIM, CLASSES, IMAGES = 128, 600, 5  # two chunks, three tiles of which one is ragged, a tile that is nearly empty


@functools.cache
def built(dtype, layout, projection, classes=CLASSES, dim=DIM):
    """A folded head, settings by which every batch is large, and name -> Compiled."""
    folded = fold(make_head(dim, projection=projection), unit_rows(classes, dim, 2).to(dtype), layout=layout)
    settings = {role: dict(values) for role, values in tuned(90, folded.variant)}
    settings["score_tile"] |= {"images": 1, "classes": 1}
    hashable = tuple((role, tuple(sorted(values.items()))) for role, values in settings.items())
    makers = dict(aot.variants(folded, 90, [dtype]))
    return (
        folded,
        hashable,
        functools.cache(lambda name: makers[name if name in makers else f"{name}-{aot.TYPES[dtype]}"]()),
    )


def start(head, v, multiprocessors):
    """The plan of a batch, memory before it, where each value lies there, and the values' sizes."""
    folded, settings, _ = built(*head)
    plan = plan_launches(
        folded.variant, len(v), len(folded.text_embeddings), ragged=False, settings=settings,
        multiprocessors=multiprocessors, pdl=True, shared_softmax=False,
    )  # fmt: skip
    assert [kernel.name for kernel in plan.kernels] == ["project_large", "score_tile", "sum_tile", "tail"]
    return plan, *memory_of(folded, plan, v)


def launch(head, kernel, memory, values, *, seed, ptx=None):
    done = built(*head)[2](kernel.name)
    arguments = [values[argument] for argument, _ in done.arguments] + [0, 0]
    dependent = kernel.name != "project_large"
    Kernel(ptx or done.ptx).run(memory, kernel.grid, arguments, done.shared, seed=seed, dependent=dependent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout", "projection", "dim"),
    # Three chunks: their number, 12 at 768, is divided by another way than powers of two.
    [(BF16, "plain", "shared", DIM), (F16, "plain", "identity", DIM), (F16, "folded", "shared", 192)],
)
def test_compiled_kernels_of_large_batches_are_right_in_every_order(dtype, layout, projection, dim):
    v = unit_rows(IMAGES, dim, 1).to(dtype)
    head = (dtype, layout, projection, CLASSES, dim)
    folded, _, _ = built(*head)
    want = folded(v)
    first = None
    for seed in range(2):
        plan, memory, values, sizes = start(head, v, multiprocessors=4)
        assert plan.splits == 2
        for kernel in plan.kernels:
            launch(head, kernel, memory, values, seed=seed)
        scores, index = answers(memory, values, sizes)
        assert_right(scores, index, want, dtype)
        assert first is None or np.array_equal(first, scores), "the same bits in every order"
        first = scores


# What may go, by number, and why.
REDUNDANT = {
    ("score_tile", "wgmma.wait_group"): {2: "after the loop: its last step ends a tile, and has waited"},
    ("sum_tile", "wgmma.wait_group"): {2: "after the loop: its last step ends a tile, and has waited"},
    ("score_tile", "bar.sync"): {0: "the first copies are under way: nobody has read a buffer that the next ones fill"},
    ("sum_tile", "bar.sync"): {
        0: "the first copies are under way: nobody has read a buffer that the next ones fill",
        1: "as above, a stage later",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["score_tile", "sum_tile"])
@pytest.mark.parametrize(
    "what", ["wgmma.wait_group", "wgmma.fence", "cp.async.wait_group", "bar.sync", "griddepcontrol.wait"]
)
def test_every_wait_and_fence_of_large_batches_is_needed(kernel, what):
    """Without it there is a race, or a wrong number in scratch. (Neither kernel needs a fence.proxy.async.)"""
    # After two tiles the last copies lie where nothing else is written; after three they do not.
    head = (BF16, "plain", "shared", CLASSES if what == "cp.async.wait_group" else 300)
    v = unit_rows(3, DIM, 1).to(BF16)
    plan, memory, values, sizes = start(head, v, multiprocessors=2)
    names = [one.name for one in plan.kernels]
    place = names.index(kernel)
    for one in plan.kernels[:place]:
        launch(head, one, memory, values, seed=0)
    seen = {"score_tile": ("state", "weights", "bases"), "sum_tile": ("sums",)}[kernel]

    def outcome(ptx=None):
        mine = copy.deepcopy(memory)
        launch(head, plan.kernels[place], mine, values, seed=1, ptx=ptx)
        return [mine.get(values[name], np.uint32, sizes[name] // 4).tolist() for name in seen]

    ptx = built(*head)[2](kernel).ptx
    assert "fence.proxy" not in ptx
    want, survivors = outcome(), []
    for number, changed in mutants(ptx, r"^\s*" + what.replace(".", r"\.")):
        try:
            if outcome(changed) == want:
                survivors.append(number)
        except RaceError:
            continue
    assert survivors == list(REDUNDANT.get((kernel, what), {}))
