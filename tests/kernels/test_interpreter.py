"""Runs the tests of the kernels under Triton's interpreter where there is no GPU.

Triton reads TRITON_INTERPRET once, so the tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW_SUITES = ("test_ragged.py", "test_operator.py", "test_tuning.py")


@pytest.mark.parametrize("suite", ["test_parity.py", *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW_SUITES)])
def test_kernels_interpreted(suite):
    pytest.importorskip("triton")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / suite)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
