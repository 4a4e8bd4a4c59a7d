"""A class set per image: `offsets`."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.kernels.reference import (
    DEVICE,
    assert_close,
    assert_equal,
    make_head,
    operator_arguments,
    reference,
    runs_kernels,
)
from tests.support.embeddings import unit_rows
from vilu.kernels import HeadOutput, fold, fused_head

pytest.importorskip("triton")
pytestmark = runs_kernels


@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        ((5, 1, 90, 33), torch.float32),
        ((5, 1, 90, 33), torch.bfloat16),
        ((1,) * 9, torch.float32),
        ((100,), torch.float16),
    ],
    ids=str,
)
def test_ragged_class_sets(lengths, dtype, layout):
    head = make_head(64)
    v, t = unit_rows(len(lengths), 64, 17).to(DEVICE, dtype), unit_rows(sum(lengths), 64, 18).to(DEVICE, dtype)
    offsets = [0, *np.cumsum(lengths).tolist()]
    folded = fold(copy.deepcopy(head).to(DEVICE), t, layout=layout)
    got = fused_head(v, folded, offsets=offsets)
    each = [reference(head, v[i : i + 1], t[a:b], 100.0) for i, (a, b) in enumerate(pairwise(offsets))]
    assert_close(got, HeadOutput(*map(torch.cat, zip(*each, strict=True))), dtype)
    assert_equal(got, fused_head(v, folded, offsets=torch.tensor(offsets)))


@pytest.mark.parametrize("layout", ["folded", "plain"])
def test_offsets_on_the_gpu_are_not_trusted(layout):
    """They are not read on the host: a set that is empty, falls back or leaves the bank is NaN, or cut to the bank."""
    head = make_head(64)
    v, t = unit_rows(5, 64, 27).float().to(DEVICE), unit_rows(20, 64, 28).float().to(DEVICE)
    folded = fold(copy.deepcopy(head).to(DEVICE), t, layout=layout)
    offsets = torch.tensor([0, 7, 7, 3, 20, 99], device=DEVICE)  # 7 rows, none, less than none, 17, none
    scores, index = torch.ops.vilu.fused_head(v, **operator_arguments(folded, offsets))
    assert scores.isnan().tolist() == [[False, True, True, False, True]] * 4
    assert index[[1, 2, 4]].tolist() == [0, 0, 0]
    for i, rows in ((0, slice(0, 7)), (3, slice(3, 20))):
        want = reference(head, v[i : i + 1], t[rows], 100.0)
        failure, confidence, entropy, doctor = scores[:, i : i + 1]
        assert_close(HeadOutput(failure, index[i : i + 1], confidence, entropy, doctor), want, torch.float32)
    every_second = torch.tensor([0, 9, 4, 9, 9, 9, 12, 9, 15, 9, 20, 9])[::2]
    assert_equal(fused_head(v, folded, offsets=every_second), fused_head(v, folded, offsets=[0, 4, 9, 12, 15, 20]))
