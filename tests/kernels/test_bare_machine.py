"""A machine that is lent for its GPU may have torch, Triton and pytest, and nothing else that this project uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Refuses every module of a package that neither is one of these nor is required by one of them.
BARE = """
import re, runpy, sys
from importlib import metadata

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

todo = ["numpy", "torch", "triton", "safetensors", "pytest"]
present = set()
while todo:
    name = plain(todo.pop())
    if name not in present:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        present.add(name)
        todo += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra ==" not in need]
homes = metadata.packages_distributions()

class Absent:
    def find_spec(self, name, path=None, target=None):
        module = name.split(".")[0]
        packages = {plain(package) for package in homes.get(module, ())} - {"vilu"}
        if packages and not packages & present:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_module("pytest", run_name="__main__") if sys.argv[0] == "pytest" else runpy.run_path(
    sys.argv[0], run_name="__main__"
)
"""


def run_bare(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."}
    python = (sys.executable, "-c", BARE)
    return subprocess.run([*python, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_kernels_tests_need_nothing_but_triton_and_pytest():
    done = run_bare("pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_parity", "test_emulated", "test_budget", "test_tuning"):
        assert f"tests/kernels/{name}.py::" in done.stdout
    skipped = {line.split(":")[0].split("/")[-1] for line in done.stdout.splitlines() if line.startswith("SKIPPED")}
    assert skipped <= {"test_any_shape.py", "test_gpu_repository.py"}


def test_the_model_of_the_head_starts():
    done = run_bare("bench/head_model.py", "--help")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_benchmark_of_the_head_keeps_its_rows(tmp_path):
    sizes = ("--images", "1", "--classes", "10", "--seconds", "0.01", "--contenders", "eager,folded")
    done = run_bare("bench/head.py", "--output", str(tmp_path / "head-cpu.json"), *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["gate"] for row in json.loads((tmp_path / "head-cpu.json").read_text("utf-8"))["rows"]] == [True] * 2


def test_without_a_gpu_the_script_says_so_in_one_line(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = ["bench/gpu.sh", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "gpu.sh: torch finds no CUDA GPU here, and every step needs one\n"
    assert done.stdout == ""
