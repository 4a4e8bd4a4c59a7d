"""The fused kernels against the float64 eager head, at shapes that Hypothesis chooses."""

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.reference import INTERPRETED, check, make_head, runs_kernels
from tests.support.embeddings import unit_rows

pytestmark = runs_kernels


@settings(max_examples=10 if INTERPRETED else 100, deadline=None)
@given(
    B=st.integers(1, 20),
    K=st.integers(1, 100),
    D=st.integers(64, 130),
    first=st.integers(1, 70),
    layout=st.sampled_from(["folded", "plain"]),
    projection=st.sampled_from(["identity", "shared", "separate"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(B, K, D, first, layout, projection, seed):
    head = make_head(D, seed, projection=projection, hidden=(first, 8))
    check(head, unit_rows(B, D, seed), unit_rows(K, D, seed + 1), dtype=torch.float32, layout=layout)
