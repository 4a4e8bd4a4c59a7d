"""Runs the tests of the kernels under Triton's interpreter where there is no GPU.

Triton reads TRITON_INTERPRET once, so the tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = ("test_parity.py", "test_ragged.py", "test_operator.py", "test_tuning.py")


def test_kernels_interpreted():
    pytest.importorskip("triton")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(here / name) for name in SUITES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
