"""Runs the tests of the kernels under Triton's interpreter where there is no GPU.

Triton reads TRITON_INTERPRET once, so the tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MORE = "large_batches or real_sizes or half_precision or hidden_widths or extreme_logits"
SUITES = [
    pytest.param("test_parity.py", f"not ({MORE})", id="parity"),
    pytest.param("test_parity.py", MORE, marks=pytest.mark.slow, id="parity-more"),
    *(
        pytest.param(f"test_{suite}.py", "", marks=pytest.mark.slow, id=suite)
        for suite in ("any_shape", "ragged", "operator", "tuning")
    ),
]


@pytest.mark.parametrize(("suite", "chosen"), SUITES)
def test_kernels_interpreted(suite, chosen):
    pytest.importorskip("triton")
    if suite == "test_any_shape.py":
        pytest.importorskip("hypothesis")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(here / suite)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
