"""The search for the fused head's launch settings on this GPU, which writes kernels/tuning.json."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.authors import SCALE
from bench.common import commit, cpu_name
from bench.head_forms import GATE, Case, Exact
from bench.head_timing import DeviceFailedError, gpu, raise_if_failed
from vilu import atomic
from vilu.errors import UserError
from vilu.kernels import FoldedHead, fold, fused_head
from vilu.kernels.launch import PDL_ARCH
from vilu.kernels.plan import SOURCE, Settings, all_kernels, plan_launches, tuned

CANDIDATES: dict[str, dict[str, list[int]]] = {
    "attend_image": {
        "TILE": [2048, 4096, 8192, 16384], "STAGES": [1, 2, 3, 4], "num_warps": [4, 8, 16], "waves": [1, 2],
    },
    "attend_few": {
        "BLOCK_N": [16, 32, 64], "BLOCK_D": [64, 128, 256, 512], "BLOCK_W": [64, 128, 256, 512], "SLICES": [1, 4, 8],
        "RESIDENT": [0, 1], "STAGES": [1, 2, 3], "num_warps": [4, 8], "waves": [1, 2],
    },
    "attend_tile": {
        "BLOCK_M": [16, 32, 64], "BLOCK_N": [16, 32, 64], "BLOCK_D": [64, 128, 256],
        "BLOCK_W": [64, 128, 256, 512], "SLICES": [1, 4, 8], "RESIDENT": [0, 1], "STAGES": [1, 2, 3],
        "num_warps": [4, 8], "waves": [1, 2],
    },
    "score_tile": {"STAGES": [2, 3], "waves": [1, 2], "BLOCK_D": [32, 64]},
    "sum_tile": {"STAGES": [2, 3, 4], "BLOCK_D": [32, 64], "BLOCK_N": [128, 256]},
    "tail": {
        "BLOCK_N": [8, 16, 32], "CHUNK": [64, 128, 256, 512], "BLOCK_S": [16, 32, 64], "BLOCK_D": [128, 256],
        "SLICES": [4, 8], "num_warps": [4, 8],
    },
    "tail_few": {"BLOCK_N": [4, 8, 16], "CHUNK": [4, 8, 16], "num_warps": [4, 8]},
}  # fmt: skip
# By bytes of an element: up to 8 images run `attend_image` in float32, and `attend_few` in 16 bits.
TUNED_IMAGES: dict[str, dict[int, int]] = {
    "attend_image": {4: 1}, "attend_few": {2: 1, 4: 16}, "attend_tile": {2: 64, 4: 64}, "score_tile": {2: 512},
    "sum_tile": {2: 512}, "tail": {2: 64, 4: 64}, "tail_few": {2: 1, 4: 1},
}  # fmt: skip
TUNED_CLASSES = {"folded": 1000, "plain": 65536}


def tune(
    device: str, kernels: Iterable[str], dims: Iterable[int], dtypes: Iterable[torch.dtype], path: Path,
    end: float = math.inf,
) -> None:  # fmt: skip
    """Write the fastest settings that pass the gate and never spill into the table at `path`, one coordinate at a time.

    The table is written after each search. A plain bank is tuned at K = 65,536, a folded one at K = 1,000: where each
    is used. float16 takes bfloat16's settings. No search begins after `end` (time.monotonic), and one that it cuts
    short keeps the best that it has found.

    Raises:
        DeviceFailedError: the GPU reported an error; what was found before is written.
    """
    from vilu.kernels import fused

    arch, multiprocessors = fused.device_of(0)
    for name, dtype, dim, layout in itertools.product(kernels, dtypes, dims, TUNED_CLASSES):
        if time.monotonic() > end:
            print(f"{name} {layout} {str(dtype)[6:]} D={dim}: no time left", file=sys.stderr)
            continue
        if dtype.itemsize not in TUNED_IMAGES[name]:
            continue
        case = Case(TUNED_IMAGES[name][dtype.itemsize], TUNED_CLASSES[layout], dim, dtype)
        head, v, t = case.data(device)
        folded = fold(head, t, logit_scale=SCALE, layout=layout)
        exact, variant = Exact.of(head, v, t), folded.variant
        settings = {kernel: dict(values) for kernel, values in tuned(arch, variant)}
        if not runs(name, case, folded, arch, multiprocessors):
            continue  # so few classes, or this compute capability, do without the kernel
        best = cost(settings, folded, exact, v)
        for key, values in CANDIDATES[name].items():
            for value in values:
                if time.monotonic() > end:
                    break
                trial = copy.deepcopy(settings)
                trial[name][key] = value
                if trial[name].get("RESIDENT"):
                    trial[name]["BLOCK_W"] = trial[name]["BLOCK_D"]
                took = cost(trial, folded, exact, v) if trial != settings else math.inf
                if took < best and never_spills(name, trial, folded, arch):
                    best, settings = took, trial
        found = f"{name} {layout} {str(dtype)[6:]} D={dim}"
        if not math.isfinite(best):
            print(f"{found}: nothing compiles, fits and passes the gate; left as it was", file=sys.stderr)
            continue
        condition = {"bytes": variant.itemsize, "width": dim, "projected": True, "folded": variant.folded}
        table = json.loads(path.read_text("utf-8"))
        entries = table.setdefault(str(arch), {})
        others = [e for e in entries.get(name, []) if any(e.get(key) != condition[key] for key in condition)]
        source = {SOURCE: f"{device_name(device)}, {1e6 * best:.1f} us, {commit(12)}, {time.strftime('%Y-%m-%d')}"}
        entries[name] = sorted([condition | settings[name] | source, *others], key=lambda e: e.get("width", math.inf))
        atomic.write(path, one_line_an_entry(table))
        tuned.cache_clear()
        print(f"{found}: {1e6 * best:.1f} us with {settings[name]}", file=sys.stderr, flush=True)


def runs(role: str, case: Case, folded: FoldedHead, arch: int, multiprocessors: int) -> bool:
    """Whether a batch of the case launches the role's kernel: else its time would say nothing about the settings."""
    plan = plan_launches(
        folded.variant, case.images, case.classes, ragged=False, settings=tuned(arch, folded.variant),
        multiprocessors=multiprocessors, pdl=arch >= PDL_ARCH,
        shared_softmax=folded.variant.shares_softmax(folded.logit_scale, folded.attention_scale),
    )  # fmt: skip
    return role in {kernel.name for kernel in plan.kernels}


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


def never_spills(role: str, settings: dict[str, dict[str, int]], folded: FoldedHead, arch: int) -> bool:
    """Whether the role's kernel, built ahead of time, fits and keeps all its numbers in registers.

    tests/kernels/test_budget.py asks as much of the committed table. True where no such build is made: for other
    compute capabilities, and under the interpreter.
    """
    from vilu.kernels import aot

    if aot.fused.INTERPRETED or arch not in aot.SHARED_LIMIT:
        return True
    variant, dtype = folded.variant, folded.text_embeddings.dtype
    shared_softmax = variant.shares_softmax(folded.logit_scale, folded.attention_scale)
    kernels = all_kernels(variant, hashable(settings), shared_softmax=shared_softmax, pdl=arch >= PDL_ARCH)
    kernel = next(kernel for kernel in kernels if kernel.name == role)
    try:
        return aot.compile_kernel(kernel, variant, arch, stored=dtype, image=dtype).spilled == 0
    except UserError:  # it does not fit
        return False


def hashable(settings: dict[str, dict[str, int]]) -> Settings:
    return tuple((role, tuple(sorted(values.items()))) for role, values in settings.items())


def cost(settings: dict[str, dict[str, int]], folded: FoldedHead, exact: Exact, v: Tensor) -> float:
    """Seconds of the fused head with these settings, cold; infinite where it does not compile, fit or pass the gate.

    Raises:
        DeviceFailedError: the GPU reported an error, after which no later time means anything.
    """
    from vilu.kernels import fused

    chosen = hashable(settings)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out = fused_head(x, folded)
        return out.failure_probability, out.class_index

    fused.tuned = lambda arch, variant: chosen  # type: ignore[assignment]
    try:
        if exact.error(run, v) > GATE[v.dtype]:
            return math.inf
        return statistics.median(gpu(lambda: fused_head(v, folded), cold=True))
    except DeviceFailedError:
        raise
    except Exception as error:
        raise_if_failed(error)
        return math.inf
    finally:
        fused.tuned = tuned


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()
