"""The estimate from machine code, and the script for a GPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.head_model import GOALS, Shape, estimate, executed, measured
from vilu.kernels.machine_code import Instruction

ROOT = Path(__file__).parents[2]


def code(*names):
    """Instructions at 0, 16, 32 ...; "BRA 0x10" branches to the second."""
    parts = [name.partition(" ") for name in names]
    return [Instruction(16 * i, name, operands, guarded=False) for i, (name, _, operands) in enumerate(parts)]


def test_executed_counts_loops_times_their_iterations():
    straight = code("LDG.E.128", "FADD", "EXIT")
    assert executed(straight, 7, 9) == 3
    loop = code("MOV", "LDG.E.128", "BAR.SYNC", "BRA 0x10", "EXIT")
    assert executed(loop, 5, 9) == 2 + 5 * 3
    assert executed(loop, 5, 9, "BAR") == 5
    nested = code("MOV", "MOV", "FFMA", "BRA 0x20", "BAR.SYNC", "BRA 0x10", "EXIT")
    assert executed(nested, 2, 4) == 2 + 2 * (3 + 4 * 2)
    assert executed(nested, 2, 4, "FFMA") == 8


def test_a_measured_time_stands_beside_its_own_layout(tmp_path):
    row = {"contender": "fused", "B": 1, "K": 1000, "D": 512, "dtype": "float32", "graph_warm": {"median_us": 7}}
    path = tmp_path / "head-cuda.json"
    path.write_text(json.dumps({"rows": [row | {"layout": "folded"}]}))
    shapes = [Shape(1, 1000, torch.float32, layout, "shared", 10) for layout in ("folded", "plain")]
    assert [measured(path, shape) for shape in shapes] == [7, None]


@pytest.mark.slow
@pytest.mark.parametrize("shape", GOALS, ids=lambda shape: f"{shape.images}-{shape.classes}-{shape.layout}")
def test_an_estimate_reaches_its_goal_and_stands_in_the_docs(shape):
    took = sum(took for _, took in estimate(shape))
    assert round(took, 1) <= shape.goal
    row = (
        f"| {shape.images} | {shape.classes:,} | {str(shape.dtype)[6:]} | {shape.layout} | {took:.1f} | {shape.goal} |"
    )
    assert row in (ROOT / "docs" / "gpu.md").read_text("utf-8")


def test_the_gpu_script_goes_on_and_writes_into_one_folder(tmp_path):
    script = [str(ROOT / "bench" / "gpu.sh"), str(tmp_path / "out")]
    fails = tmp_path / "python"
    # It finds a GPU, as the script first asks, and then fails.
    fails.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho $*\nexit 3\n')
    fails.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fails)}
    run = subprocess.run([*script, "tests", "goals"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    steps = (tmp_path / "out" / "steps.txt").read_text().splitlines()
    assert steps == ["3 tests", "3 goal-1-1000", "3 goal-1-1000-plain", "3 goal-1-1048576", "3 goal-512-65536"]
    assert "--classes 65536 --dims 512 --dtypes bfloat16" in (tmp_path / "out" / "goal-512-65536.log").read_text()
    subprocess.run([*script, "tune-tail"], env=environment, check=True)
    assert (tmp_path / "out" / "steps.txt").read_text().splitlines()[len(steps) :] == ["3 tune-tail"]
    for wrong in ("nonsense", "goal-2-1000"):
        assert subprocess.run([*script, wrong], env=environment, capture_output=True).returncode == 2
