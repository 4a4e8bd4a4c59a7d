"""What all benchmarks share: where results go, what they were measured on, quantiles, and how results are written."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vilu import __version__, atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def commit(digits: int = 40) -> str | None:
    """The commit that is measured, with "-dirty" where files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", f"--abbrev={digits}"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def package_versions(*packages: str) -> dict[str, str | None]:
    """Package to installed version; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def cpu_name() -> str:
    """The CPU's model name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The vector instructions that this CPU has and that decide a speed, as /proc/cpuinfo names them."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return sorted({flag for flag in flags if flag in wanted or flag.startswith("amx")})


def machine(device: str) -> dict[str, Any]:
    """What a speed belongs to: the device ("cpu" or "cuda"), its load, the commit and the versions that matter."""
    cpu = cpu_name()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for package in ("onnxruntime", "triton"):
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            found[package] = None
    return found


def origin() -> dict[str, Any]:
    """What a quality figure belongs to: the commit, two versions and the kind of machine."""
    return {
        "commit": commit(7),
        "vilu": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def quantiles(
    values: Sequence[float], *, unit: str = "", scale: float = 1.0, method: Literal["linear", "weibull"] = "linear"
) -> dict[str, float]:
    """Median and the 20% and 80% quantiles of `scale · values`, under "median", "q20" and "q80" followed by `unit`.

    Args:
        method: numpy's name of the interpolation between two values.
    """
    q20, q80 = np.quantile(values, (0.2, 0.8), method=method)
    found = {"median": statistics.median(values), "q20": q20, "q80": q80}
    return {name + unit: scale * float(value) for name, value in found.items()}


def percentiles(latencies: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99 of seconds, in milliseconds; None where there is no value."""
    cuts = np.percentile(latencies, (50, 90, 99)) * 1e3 if len(latencies) else (None, None, None)
    return {name: None if cut is None else float(cut) for name, cut in zip(("p50", "p90", "p99"), cuts, strict=True)}


def png(figure: Figure, dpi: int) -> bytes:
    """A matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()


def write_results(output: Path, contents: Mapping[str, Any]) -> None:
    """Write OUTPUT + suffix for each suffix, every file whole or not at all.

    Args:
        output: path without suffix; its folder is made where it is missing.
        contents: suffix (".json", ".md", ".png") to text, bytes, or an object that is written as JSON.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        if not isinstance(content, str | bytes):
            content = json.dumps(content, indent=1) + "\n"
        atomic.write(output.with_name(output.name + suffix), content)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table in Markdown, without an empty line at the end."""
    return [f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows)]


def ticker(bar: Callable[[str, int, int], None]) -> Callable[[str], None]:
    """A function tick(what) for a progress bar whose number of steps is not known."""
    steps = itertools.count(1)

    def tick(what: str) -> None:
        step = next(steps)
        bar(what, step, step + 1)

    return tick
