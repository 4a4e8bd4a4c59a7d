"""A machine that is lent for its GPU may have torch, triton and pytest, but neither CLIP nor anything of the server."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLLECT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("open_clip", "tritonclient", "starlette", "uvicorn", "grpc_health", "schemathesis"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import pytest
without = ["-p", "no:cacheprovider", "-p", "no:schemathesis"]
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", *without, "tests/kernels"]))
"""


def test_the_kernels_tests_need_neither_clip_nor_server():
    command = [sys.executable, "-c", COLLECT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "tests/kernels/test_parity.py" in done.stdout
