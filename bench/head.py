"""The head, measured: every way to compute it, side by side, correctness first.

    python bench/head.py [--quick] [--tune] [--output bench/results/head-cpu.json]

On a CPU it sets the folded head against the eager ones; on a GPU the fused kernel, with that device's own copy
bandwidth and matrix rate measured in the same run, cold and warm L2 apart, and three times apart: of the GPU, of the
host until the call returns, and of the caller until the answer is there. A time is reported only where the answers
pass the gate against float64. `--tune` (GPU) writes kernels/tuning.json, an entry at a time.

On a GPU, in this order; every command takes a few minutes (compilation above all) and keeps what it has where it is
cut off. Rows are added to the output, in the place of older ones of the same shape:

    pytest -q -m gpu tests/kernels                                            # parity, graphs, cubins on this chip
    python bench/head.py --quick                                              # the targets' shapes, before tuning
    python bench/head.py --tune --kernels attend_image --shapes none                # tune, measuring nothing
    python bench/head.py --tune --kernels attend_tile --dtypes bfloat16 --shapes none
    python bench/head.py --tune --kernels attend_tile --dtypes float32 --shapes none
    python bench/head.py --tune --kernels combine --shapes none
    pytest -q -m gpu tests/kernels                                            # again, as tuned
    for d in 512 768; do for t in float32 float16 bfloat16; do for k in 10,1000 65536 1048576; do
        python bench/head.py --dims $d --dtypes $t --classes $k
    done; done; done
    pytest -q tests/kernels/test_aot.py                                       # the table compiles, fits, no spills
    git add kernels/tuning.json bench/results/head-cuda.*
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilu import ViLUHead
from vilu.kernels import FoldedHead, fold, fused_head
from vilu.kernels.plan import tuned

ROOT = Path(__file__).parents[1]
SCALE = 100.0
# Largest error of P(failure), CLIP's prediction equal wherever its lead is beyond rounding: the gate, by storage type.
GATE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # image_embedding -> P(failure), class_index


class AuthorsHead(nn.Module):
    """The authors' released forward (ykrmm/ViLU): all K texts projected for every batch, both softmaxes whole, topk."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.in_proj_v, self.in_proj_t, self.mlp = head.query, head.key, head.mlp

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(SCALE * v @ t.T, dim=-1)
        index = p.topk(1, dim=-1).indices.squeeze(-1)
        q, k = self.in_proj_v(v), self.in_proj_t(t)
        z = torch.softmax(SCALE * q @ k.T, dim=-1) @ k
        # Their column order is [v, z, t_pred]; ours is kept, so that the weights are the same.
        return torch.sigmoid(self.mlp(torch.cat([v, t[index], z], dim=-1)).squeeze(-1)), index


class EagerHead(nn.Module):
    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.failure_probability(v, t), (v @ t.T).argmax(-1)


class AttentionHead(nn.Module):
    """Eager, with torch's own fused attention (one key and value of width D, every query its own head)."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        index = (v @ t.T).argmax(-1)
        k = self.head.key(t)
        z = F.scaled_dot_product_attention(self.head.query(v)[None], k[None], k[None], scale=SCALE)[0]
        return torch.sigmoid(self.head.mlp(torch.cat([v, t[index], z], dim=-1)).squeeze(-1)), index


class WithText(nn.Module):
    """A head with its text embeddings as a buffer: an argument would be copied at every replay of a compiled graph."""

    def __init__(self, module: nn.Module, text_embeddings: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("text_embeddings", text_embeddings)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(v, self.text_embeddings)


@dataclass(frozen=True)
class Case:
    images: int
    classes: int
    dim: int
    dtype: torch.dtype

    def bytes_read(self, folded: FoldedHead) -> int:
        """Bytes that one pass cannot avoid: every bank the layout has, once."""
        banks = (folded.text_embeddings, folded.keys, folded.attended if folded.layout == "folded" else None)
        return sum(bank.numel() * bank.element_size() for bank in banks if bank is not None)

    def products(self) -> int:
        """Floating-point operations of the necessary products: v · t, u · t and the weighted sum."""
        return 3 * 2 * self.images * self.classes * self.dim

    def data(self, device: str) -> tuple[ViLUHead, Tensor, Tensor]:
        """A head whose answers spread, and embeddings crowded around a common direction, as CLIP's are."""
        torch.manual_seed(0)
        head: Any = ViLUHead(self.dim)
        with torch.no_grad():
            for layer in (head.query, head.key):
                layer.weight += 0.1 * torch.randn(self.dim, self.dim) / math.sqrt(self.dim)
            for layer in head.mlp[::2]:
                layer.weight.normal_(std=1.4 / math.sqrt(layer.in_features))
            head.mlp[0].weight *= math.sqrt(self.dim)
        # Made where they are used: a million rows would take the host longer than all measurements of them.
        centre = torch.randn(self.dim, device=device)
        v = torch.randn(self.images, self.dim, device=device).add_(centre)
        t = torch.randn(self.classes, self.dim, device=device).add_(centre)
        v, t = (F.normalize(x, dim=1, out=x).to(self.dtype) for x in (v, t))
        return head.to(device).requires_grad_(False), v, t


def contenders(
    case: Case, head: ViLUHead, v: Tensor, t: Tensor, folded: FoldedHead
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """(name, build); building is left to the caller, so that one that cannot be built costs only its own row."""
    cast = copy.deepcopy(head).to(case.dtype)

    def compiled() -> Run:
        # Else what was compiled for other shapes is kept, made dynamic, and at the eighth given up for eager.
        torch.compiler.reset()
        mode = "max-autotune" if v.is_cuda else "default"
        return torch.compile(WithText(EagerHead(cast), t), mode=mode, dynamic=False)

    yield "authors", lambda: WithText(AuthorsHead(cast), t)
    yield "eager", lambda: WithText(EagerHead(cast), t)
    yield "compile", compiled
    yield "sdpa", lambda: WithText(AttentionHead(cast), t)
    if case.dtype == torch.float32:
        yield "onnxruntime", lambda: onnx_session(EagerHead(cast), v, t)

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        out = fused_head(x, folded)
        return out.failure_probability, out.class_index

    yield "fused" if v.is_cuda else "folded", lambda: answer


def onnx_session(module: nn.Module, v: Tensor, t: Tensor) -> Run:
    """The eager head with its text embeddings, exported and run by ONNX Runtime (CUDA where it can)."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = f"{folder}/head.onnx"
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.cpu().eval(), (v.cpu(), t.cpu()), path, dynamo=True, verbose=False,
            input_names=["v", "t"], output_names=["p", "i"],
        )  # fmt: skip
        wanted, settings = "CPUExecutionProvider", {}
        if v.is_cuda:
            # On this stream, where the events are; tf32 would fail the gate, and is this provider's default.
            wanted = "CUDAExecutionProvider"
            settings = {"use_tf32": "0", "user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
        if wanted not in onnxruntime.get_available_providers():
            raise RuntimeError(f"onnxruntime has no {wanted}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=[(wanted, settings)])
        if session.get_providers()[0] != wanted:
            raise RuntimeError(f"onnxruntime could not start its {wanted}")
    how = onnxruntime.RunOptions()
    if v.is_cuda:  # else every run ends by waiting for the GPU, and the wait would be counted as the GPU's
        how.add_run_config_entry("disable_synchronize_execution_providers", "1")
    module.to(v.device)
    binding = session.io_binding()
    where = (v.device.type, v.device.index or 0)
    binding.bind_input("t", *where, np.float32, tuple(t.shape), t.data_ptr())
    p = torch.empty(len(v), device=v.device)
    i = torch.empty(len(v), dtype=torch.int64, device=v.device)
    binding.bind_output("p", *where, np.float32, tuple(p.shape), p.data_ptr())
    binding.bind_output("i", *where, np.int64, tuple(i.shape), i.data_ptr())

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        binding.bind_input("v", *where, np.float32, tuple(x.shape), x.data_ptr())
        session.run_with_iobinding(binding, how)
        return p, i

    return run


class Exact(NamedTuple):
    """float64 answers of a case's first images: at most 16, so that a million classes stay affordable."""

    failure: Tensor
    similarity: Tensor

    @staticmethod
    def of(head: ViLUHead, v: Tensor, t: Tensor) -> Exact:
        exact, x, rows = copy.deepcopy(head).double(), v[:16].double(), t.double()
        with torch.no_grad():
            return Exact(exact.failure_probability(x, rows), x @ rows.T)

    def error(self, run: Run, v: Tensor) -> float:
        """Largest error of P(failure); infinite where CLIP's prediction differs although its lead is clear."""
        failure, index = (column[:16] for column in run(v))
        lead = self.similarity.amax(1) - self.similarity.gather(1, index[:, None]).squeeze(1)
        if not torch.isfinite(failure).all() or (lead > 2 * torch.finfo(v.dtype).eps).any():
            return math.inf
        same = index == self.similarity.argmax(1)
        return float((failure.double() - self.failure)[same].abs().max()) if same.any() else math.inf


def wall(run: Callable[[], Any], *, seconds: float) -> list[float]:
    """Seconds of each call, after a warm-up, until the time is spent (2 calls at least, 2,000 at most)."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or (time.perf_counter() < end and len(times) < 2000):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def answered(run: Callable[[], Any]) -> None:
    run()
    torch.cuda.synchronize()


def host(run: Callable[[], Any], repeats: int = 200) -> list[float]:
    """Seconds until each call returns, its work only queued (or less is repeated, where the queue fills)."""
    times: list[float] = []
    end = time.perf_counter() + 1
    while len(times) < 5 or (time.perf_counter() < end and len(times) < repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return times


def gpu(run: Callable[[], Any], *, cold: bool, repeats: int = 50, seconds: float = 1.0) -> list[float]:
    """Seconds of each call on the GPU; cold: L2 is overwritten before each. Slow calls are repeated less, 5 times."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = min(repeats, max(5, int(seconds / (time.perf_counter() - began))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        if cold:
            flush.zero_()
        # The GPU idles about 0.5 ms, in which the host issues the call: its own time stays out of the GPU's.
        torch.cuda._sleep(1_000_000)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def graph(run: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=side):
        run()
    return captured.replay


def quantiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=10)
    return {"median_us": 1e6 * statistics.median(times), "q20_us": 1e6 * cuts[1], "q80_us": 1e6 * cuts[7]}


def measure(case: Case, device: str, seconds: float, limits: dict[str, float]) -> list[dict[str, Any]]:
    """A row for every contender, with its speed as a multiple of the authors' head where both pass the gate."""
    head, v, t = case.data(device)
    folded = fold(head, t, logit_scale=SCALE)
    exact = Exact.of(head, v, t)
    rows, passed = [], []
    for name, build in contenders(case, head, v, t, folded):
        row: dict[str, Any] = {
            "contender": name, "B": case.images, "K": case.classes, "D": case.dim, "dtype": str(case.dtype)[6:],
        }  # fmt: skip
        try:
            run = build()
            with torch.inference_mode():
                row["error"] = exact.error(run, v)
                row["gate"] = bool(row["error"] <= GATE[case.dtype])
                if row["gate"] and device == "cuda":
                    gpu_timings(row, lambda run=run: run(v), case, folded, seconds, limits)  # type: ignore[misc]
                elif row["gate"]:
                    passed.append((row, run))
        except Exception as error:
            row["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if not math.isfinite(row.get("error", 0.0)):
            row["error"] = None
        rows.append(row)
    cpu_timings(passed, v, seconds)
    for row in rows:
        if best_of(row) and best_of(rows[0]):
            row["times_authors"] = best_of(rows[0]) / best_of(row)
    return rows


def best_of(row: dict[str, Any]) -> float:
    """A row's time in microseconds: replayed as a CUDA graph where that was measured; 0 where none is reported."""
    return row.get("graph_warm", row.get("gpu_warm", row.get("wall", {}))).get("median_us", 0.0)


def cpu_timings(passed: list[tuple[dict[str, Any], Run]], v: Tensor, seconds: float) -> None:
    """Wall times in turns, ten rounds of all, so that what else the machine does falls on every contender alike."""
    times: list[list[float]] = [[] for _ in passed]
    with torch.inference_mode():
        for _ in range(10):
            for taken, (_, run) in zip(times, passed, strict=True):
                taken += wall(lambda run=run: run(v), seconds=seconds / 10)  # type: ignore[misc]
    for taken, (row, _) in zip(times, passed, strict=True):
        row["wall"] = quantiles(taken)


def gpu_timings(
    row: dict[str, Any], run: Callable[[], Any], case: Case, folded: FoldedHead, seconds: float,
    limits: dict[str, float],
) -> None:  # fmt: skip
    row["wall"] = quantiles(wall(lambda: answered(run), seconds=seconds))
    row["host"] = quantiles(host(run))
    row["gpu_warm"], row["gpu_cold"] = (quantiles(gpu(run, cold=cold)) for cold in (False, True))
    if row["contender"] in ("fused", "eager", "authors", "sdpa"):
        replay = graph(run)
        row["graph_warm"], row["graph_cold"] = (quantiles(gpu(replay, cold=cold)) for cold in (False, True))
    best = min(row[key]["median_us"] for key in ("gpu_cold", "graph_cold") if key in row) / 1e6
    row["of_bandwidth"] = case.bytes_read(folded) / best / limits["bandwidth"]
    row["of_matrix_rate"] = case.products() / best / limits[str(case.dtype)[6:]]


def device_limits() -> dict[str, float]:
    """This GPU's copy bandwidth (bytes/s, read plus written) and matrix rate (operations/s) by type, measured."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = {"bandwidth": 2 * source.numel() / statistics.median(gpu(lambda: target.copy_(source), cold=False))}
    for dtype in GATE:
        a = torch.randn(8192, 8192, device="cuda").to(dtype)
        took = statistics.median(gpu(lambda a=a: a @ a, cold=False, repeats=20))  # type: ignore[misc]
        found[str(dtype)[6:]] = 2 * 8192**3 / took
    return found


def machine(device: str) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu, "cpu": cpu,
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": commit or None, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    for package in ("onnxruntime", "triton"):
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            found[package] = None
    return found


def picture(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if (r["D"], r["dtype"]) == (rows[0]["D"], rows[0]["dtype"])]
    shapes = sorted({(r["B"], r["K"]) for r in rows})
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = plt.subplots(figsize=(1.3 * len(shapes) + 3, 4.5))
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
    figure.tight_layout()
    figure.savefig(path, dpi=120)


CANDIDATES: dict[str, dict[str, list[int]]] = {
    "attend_image": {
        "TILE": [2048, 4096, 8192, 16384], "STAGES": [1, 2, 3, 4], "num_warps": [4, 8, 16], "waves": [1, 2],
    },
    "attend_tile": {
        "BLOCK_M": [32, 64], "BLOCK_N": [16, 32, 64], "BLOCK_D": [32, 64, 128], "BLOCK_W": [64, 128],
        "RESIDENT": [0, 1], "STAGES": [1, 2, 3], "num_warps": [4, 8], "waves": [1, 2],
    },
    "combine": {"BLOCK_M": [16, 32], "BLOCK_N": [32, 64], "BLOCK_D": [32, 64], "STAGES": [2, 3], "num_warps": [4, 8]},
}  # fmt: skip


TUNED_IMAGES = {"attend_image": 1, "attend_tile": 512, "combine": 512}
TUNED_CLASSES = {"folded": 1000, "plain": 65536}


def tune(device: str, kernels: Iterable[str], dims: Iterable[int], dtypes: Iterable[torch.dtype], path: Path) -> None:
    """Fastest settings that pass the gate, one coordinate at a time, into the table at `path` after each search.

    A plain bank is tuned at K = 65,536, a folded one at K = 1,000: where each is used. float16 takes bfloat16's.
    """
    from vilu.kernels import fused

    arch, _ = fused._device(0)
    for name, dtype, dim, layout in itertools.product(kernels, dtypes, dims, TUNED_CLASSES):
        case = Case(TUNED_IMAGES[name], TUNED_CLASSES[layout], dim, dtype)
        head, v, t = case.data(device)
        folded = fold(head, t, logit_scale=SCALE, layout=layout)
        exact, variant = Exact.of(head, v, t), folded.variant
        settings = {kernel: dict(values) for kernel, values in tuned(arch, variant)}
        best = cost(settings, folded, exact, v)
        for key, values in CANDIDATES[name].items():
            for value in values:
                trial = copy.deepcopy(settings)
                trial[name][key] = value
                if trial[name].get("RESIDENT"):
                    trial[name]["BLOCK_W"] = trial[name]["BLOCK_D"]
                took = cost(trial, folded, exact, v) if trial != settings else math.inf
                if took < best:
                    best, settings = took, trial
        found = f"{name} {layout} {str(dtype)[6:]} D={dim}"
        if not math.isfinite(best):
            print(f"{found}: nothing compiles, fits and passes the gate; left as it was", file=sys.stderr)
            continue
        condition = {"bytes": variant.itemsize, "width": dim, "projected": True, "folded": variant.folded}
        table = json.loads(path.read_text("utf-8"))
        entries = table.setdefault(str(arch), {})
        others = [e for e in entries.get(name, []) if any(e.get(key) != condition[key] for key in condition)]
        entries[name] = sorted([condition | settings[name], *others], key=lambda e: e.get("width", math.inf))
        work = path.with_suffix(".new")
        work.write_text(one_line_an_entry(table), "utf-8")
        work.rename(path)
        tuned.cache_clear()
        print(f"{found}: {1e6 * best:.1f} us with {settings[name]}", file=sys.stderr, flush=True)


def one_line_an_entry(table: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """kernels/tuning.json as it is committed, so that a search shows as the lines it changed."""
    archs = []
    for arch, kernels in table.items():
        lists = []
        for name, entries in kernels.items():
            lines = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
            lists.append(f'    "{name}": [\n{lines}\n    ]')
        archs.append(f'  "{arch}": {{\n' + ",\n".join(lists) + "\n  }")
    return "{\n" + ",\n".join(archs) + "\n}\n"


def cost(settings: dict[str, dict[str, int]], folded: FoldedHead, exact: Exact, v: Tensor) -> float:
    """Seconds of the fused head with these settings, cold; infinite where it does not compile, fit or pass the gate."""
    from vilu.kernels import fused

    chosen = tuple((kernel, tuple(sorted(values.items()))) for kernel, values in settings.items())

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out = fused_head(x, folded)
        return out.failure_probability, out.class_index

    fused.tuned = lambda arch, variant: chosen
    try:
        if exact.error(run, v) > GATE[v.dtype]:
            return math.inf
        return statistics.median(gpu(lambda: fused_head(v, folded), cold=True))
    except Exception:
        return math.inf
    finally:
        fused.tuned = tuned


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
        return tuple(row[key] for key in ("device", "threads", "dtype", "D", "K", "B", "contender"))

    kept = json.loads(path.read_text("utf-8")) if path.exists() else {"limits": {}, "rows": []}
    found = list({identity(row): row for row in [*kept["rows"], *rows]}.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".new")
    work.write_text(json.dumps({"limits": limits or kept["limits"], "rows": found}, indent=1) + "\n", "utf-8")
    work.rename(path)
    return found


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    numbers, names = (lambda text: [int(n) for n in text.split(",")]), {str(dtype)[6:]: dtype for dtype in GATE}
    parser.add_argument("--output", type=Path, default=ROOT / f"bench/results/head-{device}.json")
    parser.add_argument("--seconds", type=float, default=2.0 if device == "cpu" else 0.5, help="for a wall-clock row")
    parser.add_argument("--quick", action="store_true", help="few shapes, a quarter of the time on each")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 on a machine that others use")
    parser.add_argument("--tune", action="store_true", help="find launch settings for this GPU first")
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=list(CANDIDATES), help="to tune")
    parser.add_argument("--images", type=numbers, metavar="B,...")
    parser.add_argument("--classes", type=numbers, metavar="K,...")
    parser.add_argument("--dims", type=numbers, metavar="D,...")
    parser.add_argument("--dtypes", type=lambda text: [names[name] for name in text.split(",")], metavar="NAME,...")
    parser.add_argument("--shapes", choices=["all", "none"], default="all", help="none: only tune")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if given.threads:
        torch.set_num_threads(given.threads)
    if device == "cuda":
        # Not the default stream: its handle is 0, which ONNX Runtime cannot be told to run on.
        torch.cuda.set_stream(torch.cuda.Stream())
    if given.tune:
        if device != "cuda":
            parser.error("--tune needs a GPU")
        dtypes = given.dtypes or [torch.bfloat16, torch.float32]
        tune(device, given.kernels, given.dims or [512, 768], dtypes, ROOT / "kernels/tuning.json")
    cases = shapes(device, given)
    if not cases:
        return
    limits = device_limits() if device == "cuda" else {}
    about = machine(device)
    rows: list[dict[str, Any]] = []
    for case in cases:
        for row in measure(case, device, given.seconds / (4 if given.quick else 1), limits):
            rows.append(row | about)
            shown = row.get("skipped", "gate is red: no time")
            if best_of(row):
                shown = (
                    f"{best_of(row):12.1f} us  {row.get('times_authors', 0):8.1f}x authors  error {row['error']:.1e}"
                )
            print(
                f"B={row['B']:<4} K={row['K']:<8} D={row['D']} {row['dtype']:9} {row['contender']:12} {shown}",
                flush=True,
            )
        everything = write(given.output, limits, rows)
        if device == "cuda":
            torch.cuda.empty_cache()
    threads = f", {about['threads']} thread(s)" if device == "cpu" else ""
    picture(
        [row for row in everything if row["device"] == about["device"]],
        given.output.with_suffix(".png"),
        about["device"] + threads,
    )


if __name__ == "__main__":
    main()
