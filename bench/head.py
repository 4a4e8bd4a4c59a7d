"""Measures every way to compute the ViLU head side by side; only what passes the gate against float64 is timed.

    python bench/head.py [--quick] [--tune] [--output bench/results/head-cpu.json]

On a CPU it sets the folded head against the eager ones; on a GPU the fused kernel, with that device's own copy
bandwidth and matrix rate measured in the same run, cold and warm L2 apart, and three times apart: of the GPU, of the
host until the call returns, and of the caller until the answer is there. A time is reported only where the answers
pass the gate against float64. `--tune` (GPU) writes kernels/tuning.json, an entry at a time.

On a GPU, in this order; every command takes a few minutes (compilation above all) and keeps what it has where it is
cut off. Rows are added to the output, in the place of older ones of the same shape:

    pytest -q -m gpu tests/kernels                                            # parity, graphs, cubins on this chip
    python bench/head.py --quick                                              # the targets' shapes, before tuning
    python bench/head.py --tune --kernels attend_image --shapes none          # tune, measuring nothing
    python bench/head.py --tune --kernels attend_tile --dtypes bfloat16 --shapes none
    python bench/head.py --tune --kernels attend_tile --dtypes float32 --shapes none
    python bench/head.py --tune --kernels attend_few --shapes none
    python bench/head.py --tune --kernels score_tile,sum_tile --shapes none
    python bench/head.py --tune --kernels tail,tail_few --shapes none
    pytest -q -m gpu tests/kernels                                            # again, as tuned
    for d in 512 768; do for t in float32 float16 bfloat16; do for k in 10,1000 65536 1048576; do
        python bench/head.py --dims $d --dtypes $t --classes $k
    done; done; done
    pytest -q tests/kernels/test_budget.py                                    # the table compiles, fits, no spills
    git add kernels/tuning.json bench/results/head-cuda.*
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.authors import SCALE
from bench.common import RESULTS, ROOT, machine, png, quantiles, write_results
from bench.head_forms import CONTENDERS, GATE, Case, Exact, Run, contenders
from bench.head_timing import (
    GRAPH_CALLS,
    DeviceFailedError,
    answered,
    device_limits,
    gpu,
    graph,
    host,
    raise_if_failed,
    wall,
)
from bench.head_tuning import CANDIDATES, tune
from vilu.kernels import FoldedHead, fold


def microseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 20/80 quantiles of seconds, in microseconds."""
    return quantiles(seconds, unit="_us", scale=1e6, method="weibull")


def measure(
    case: Case, device: str, seconds: float, limits: dict[str, float], wanted: Sequence[str] = (),
    end: float = math.inf, layout: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every contender, with its speed as a multiple of the authors' head where both pass the gate.

    Args:
        seconds: for each wall time.
        wanted: names of the contenders; none: all.
        end: no contender begins after it (time.monotonic).
        layout: of the folded head, as in `fold`.

    Raises:
        DeviceFailedError: the GPU reported an error.
    """
    head, v, t = case.data(device)
    folded = fold(head, t, logit_scale=SCALE, layout=layout)
    exact = Exact.of(head, v, t)
    rows, passed = [], []
    for name, build in contenders(case, head, v, t, folded):
        if wanted and name not in wanted:
            continue
        row: dict[str, Any] = {
            "contender": name, "B": case.images, "K": case.classes, "D": case.dim, "dtype": str(case.dtype)[6:],
        }  # fmt: skip
        if name == "fused" or (name == "folded" and layout):
            row["layout"] = folded.layout
        try:
            if time.monotonic() > end:
                raise TimeoutError("no time left")
            run = build()
            with torch.inference_mode():
                row["error"] = exact.error(run, v)
                row["gate"] = bool(row["error"] <= GATE[case.dtype])
                if row["gate"] and device == "cuda":
                    gpu_timings(row, lambda run=run: run(v), case, folded, seconds, limits)  # type: ignore[misc]
                elif row["gate"]:
                    passed.append((row, run))
        except Exception as error:
            raise_if_failed(error)
            row["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if not math.isfinite(row.get("error", 0.0)):
            row["error"] = None
        rows.append(row)
    cpu_timings(passed, v, seconds)
    authors = next((row for row in rows if row["contender"] == "authors"), {})
    for row in rows:
        # Like against like: the first kind of time that both have.
        kind = next((kind for kind in TIMES if kind in row and kind in authors), None)
        if kind is not None:
            row["times_authors"] = authors[kind]["median_us"] / row[kind]["median_us"]
            row["times_authors_in"] = kind
    return rows


TIMES = ("graph_warm", "gpu_warm", "wall")  # from the one that says most about the GPU to the one that says least


def best_of(row: dict[str, Any]) -> float:
    """A row's time in microseconds: replayed as a CUDA graph where that was measured; 0 where none is reported."""
    return float(next((row[kind]["median_us"] for kind in TIMES if kind in row), 0.0))


def cpu_timings(passed: list[tuple[dict[str, Any], Run]], v: Tensor, seconds: float) -> None:
    """Wall times in turns, ten rounds of all, so that what else the machine does falls on every contender alike."""
    times: list[list[float]] = [[] for _ in passed]
    with torch.inference_mode():
        for _ in range(10):
            for taken, (_, run) in zip(times, passed, strict=True):
                taken += wall(lambda run=run: run(v), seconds=seconds / 10)  # type: ignore[misc]
    for taken, (row, _) in zip(times, passed, strict=True):
        row["wall"] = microseconds(taken)


def gpu_timings(
    row: dict[str, Any], run: Callable[[], Any], case: Case, folded: FoldedHead, seconds: float,
    limits: dict[str, float],
) -> None:  # fmt: skip
    row["wall"] = microseconds(wall(lambda: answered(run), seconds=seconds))
    row["host"] = microseconds(host(run))
    row["gpu_warm"], row["gpu_cold"] = (microseconds(gpu(run, cold=cold)) for cold in (False, True))
    if row["contender"] in ("fused", "eager", "authors", "sdpa"):
        replay = graph(run)
        row["graph_warm"], row["graph_cold"] = (microseconds(gpu(replay, cold=cold)) for cold in (False, True))
        many = graph(run, GRAPH_CALLS)
        row["graph_of_many_warm"] = microseconds([took / GRAPH_CALLS for took in gpu(many, cold=False)])
    best = min(row[key]["median_us"] for key in ("gpu_cold", "graph_cold") if key in row) / 1e6
    row["of_bandwidth"] = case.bytes_read(folded) / best / limits["bandwidth"]
    row["of_matrix_rate"] = case.products() / best / limits[str(case.dtype)[6:]]


def picture(rows: list[dict[str, Any]], title: str) -> bytes:
    """A PNG: the time of a batch by shape and contender, of the first row's width and type."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if (r["D"], r["dtype"]) == (rows[0]["D"], rows[0]["dtype"])]
    shapes = sorted({(r["B"], r["K"]) for r in rows})
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure = Figure(figsize=(1.3 * len(shapes) + 3, 4.5), layout="tight")
    axes = figure.subplots()
    for place, name in enumerate(names):
        for x, (B, K) in enumerate(shapes):
            chosen = [r for r in rows if (r["B"], r["K"], r["contender"]) == (B, K, name) and "wall" in r]
            if chosen:
                timing = chosen[0].get("graph_warm", chosen[0].get("gpu_warm", chosen[0]["wall"]))
                at = x + 0.8 * (place / len(names) - 0.5)
                axes.bar(
                    at, timing["median_us"], 0.8 / len(names), color=f"C{place}", align="edge",
                    label=name if x == 0 else None,
                    yerr=[[timing["median_us"] - timing["q20_us"]], [timing["q80_us"] - timing["median_us"]]],
                )  # fmt: skip
    axes.set(yscale="log", ylabel="median time of a batch (µs), 20/80 quantiles", title=title)
    axes.set_xticks(range(len(shapes)), [f"B={B}\nK={K:,}" for B, K in shapes])
    axes.legend(title=f"D={rows[0]['D']}, {rows[0]['dtype']}")
    return png(figure, 120)


def shapes(device: str, given: argparse.Namespace) -> list[Case]:
    """The grid of a device, or its quick part, cut down to what was asked for; a size outside the grid is taken too."""
    if device == "cpu":
        images, classes, dims, dtypes = [1, 16], [1000] if given.quick else [10, 1000, 20000], [512], [torch.float32]
    elif given.quick:
        images, classes, dims, dtypes = [1, 512], [1000, 65536], [512], [torch.float32, torch.bfloat16]
    else:
        images, classes, dims, dtypes = [1, 8, 64, 512], [10, 1000, 65536, 1048576], [512, 768], list(GATE)
    sizes = itertools.product(
        given.images or images, given.classes or classes, given.dims or dims, given.dtypes or dtypes
    )
    return [Case(*size) for size in sizes] if given.shapes == "all" else []


def write(path: Path, limits: dict[str, float], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add rows to the file, in the place of older ones of the same shape and contender; all that it has then."""

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return *(row[key] for key in ("device", "threads", "dtype", "D", "K", "B", "contender")), row.get("layout")

    kept = json.loads(path.read_text("utf-8")) if path.exists() else {"limits": {}, "rows": []}
    found = list({identity(row): row for row in [*kept["rows"], *rows]}.values())
    write_results(path.with_suffix(""), {".json": {"limits": limits or kept["limits"], "rows": found}})
    return found


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    numbers, names = (lambda text: [int(n) for n in text.split(",")]), {str(dtype)[6:]: dtype for dtype in GATE}
    parser.add_argument("--output", type=Path, default=RESULTS / f"head-{device}.json")
    parser.add_argument("--seconds", type=float, default=2.0 if device == "cpu" else 0.5, help="for a wall-clock row")
    parser.add_argument("--quick", action="store_true", help="few shapes, a quarter of the time on each")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 on a machine that others use")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin nothing after it")
    parser.add_argument(
        "--contenders", type=lambda text: text.split(","), default=[], metavar="NAME,...",
        help=f"of {', '.join(CONTENDERS)}; all by default",
    )  # fmt: skip
    parser.add_argument("--tune", action="store_true", help="find launch settings for this GPU first")
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=list(CANDIDATES), help="to tune")
    parser.add_argument("--images", type=numbers, metavar="B,...")
    parser.add_argument("--classes", type=numbers, metavar="K,...")
    parser.add_argument("--dims", type=numbers, metavar="D,...")
    parser.add_argument("--dtypes", type=lambda text: [names[name] for name in text.split(",")], metavar="NAME,...")
    parser.add_argument(
        "--layout", choices=["folded", "plain"], help="of the folded head; by default as `fold` chooses"
    )
    parser.add_argument("--shapes", choices=["all", "none"], default="all", help="none: only tune")
    given = parser.parse_args()
    unknown = sorted({*given.contenders} - {*CONTENDERS}) or sorted({*given.kernels} - {*CANDIDATES})
    if unknown:
        parser.error(f"{unknown[0]}: expected names of {', '.join(CONTENDERS)}; kernels of {', '.join(CANDIDATES)}")
    end = time.monotonic() + given.budget
    torch.backends.cuda.matmul.allow_tf32 = False
    if given.threads:
        torch.set_num_threads(given.threads)
    if device == "cuda":
        # Not the default stream: its handle is 0, on which ONNX Runtime cannot run.
        torch.cuda.set_stream(torch.cuda.Stream())
    if given.tune:
        if device != "cuda":
            parser.error("--tune needs a GPU")
        dtypes = given.dtypes or [torch.bfloat16, torch.float32]
        tune(device, given.kernels, given.dims or [512, 768], dtypes, ROOT / "kernels/tuning.json", end)
    cases = shapes(device, given)
    if not cases:
        return
    limits = device_limits() if device == "cuda" else {}
    about = machine(device)
    rows: list[dict[str, Any]] = []
    everything: list[dict[str, Any]] = []
    for case in cases:
        if time.monotonic() > end:
            print(f"B={case.images} K={case.classes} and what follows: no time left", flush=True)
            break
        seconds = given.seconds / (4 if given.quick else 1)
        for row in measure(case, device, seconds, limits, given.contenders, end, given.layout):
            rows.append(row | about)
            shown = row.get("skipped", "gate is red: no time")
            if best_of(row):
                shown = (
                    f"{best_of(row):12.1f} us  {row.get('times_authors', 0):8.1f}x authors "
                    f"({row.get('times_authors_in', 'not measured')})  error {row['error']:.1e}"
                )
            print(
                f"B={row['B']:<4} K={row['K']:<8} D={row['D']} {row['dtype']:9} {row['contender']:12} {shown}",
                flush=True,
            )
        everything = write(given.output, limits, rows)
        if device == "cuda":
            torch.cuda.empty_cache()
    threads = f", {about['threads']} thread(s)" if device == "cpu" else ""
    shown = [row for row in everything if row["device"] == about["device"]]
    if not shown:
        return
    try:
        write_results(given.output.with_suffix(""), {".png": picture(shown, about["device"] + threads)})
    except ImportError as error:  # a machine that is lent for its GPU may have no matplotlib
        print(f"no picture: {error}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except DeviceFailedError as error:
        sys.exit(f"head.py: {error}; what was measured before is kept")
