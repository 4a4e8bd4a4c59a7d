"""Estimate the fused head's time on an H100 from its compiled machine code. No GPU is needed, and nothing is measured.

    python bench/head_model.py [--output FILE]

For every launch of a plan the estimate is

    gap + max(round trips · trip + barriers · barrier + max(instructions / issue rate, products / matrix rate),
              bytes / bandwidth)

(with the bytes' time added instead, where a loop is too short to overlap it, and the partial sums' bytes in either
case). Instructions and barriers are counted in
the SASS, loops times their iterations. `tail` is the sum of its stages, each compiled alone, with a hand-over between:
a fence that waits for stores (a round trip), the count's way to L2 (half), and the look that meets it (half a round
trip late on average, and half a round trip back). The constants are below: data-sheet numbers and assumptions, none
fitted to a run. Where bench/results/head-cuda.json has the measured time of a shape (`python bench/head.py` on a GPU),
it stands beside the estimate.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import ROOT
from vilu import ViLUHead
from vilu.kernels import FoldedHead, aot, fold
from vilu.kernels.machine_code import Instruction, count, disassemble, longest_way, loops, within
from vilu.kernels.plan import Kernel, Plan, plan_launches, tuned

ARCH, MULTIPROCESSORS, CLOCK = 90, 132, 1.9e9
MEMORY, L2, L2_BYTES = 4.3e12, 5.5e12, 30 << 20  # bytes/s and the part of L2 that a class set may fill
MMA, WGMMA = 600e12, 660e12  # operations/s that 16-bit mma.sync and wgmma are taken to reach, of a peak of 989e12
TF32 = 300e12  # and mma.sync in tf32, of which a product of float32 numbers takes three, of 495e12
TRIP = 0.24e-6  # a load's way to L2 and back when nothing overlaps it
BARRIER = 40 / CLOCK
HANDOVER = 2.5 * TRIP
REGISTERS, SHARED, L2_TO_SM = 1 << 16, 227 << 10, 64 * CLOCK  # of a multiprocessor; bytes/s
FIRST, GAP = 2.0e-6, 0.7e-6  # from a graph's start to the first kernel; between kernels, with dependent launch
# Loads that wait for each other: its inputs, and what their values point to.
ROUND_TRIPS = {"project": 1, "attend_image": 2, "attend_tile": 2, "score_tile": 2, "sum_tile": 2}


@dataclass(frozen=True)
class Shape:
    """A batch of the goals. goal: microseconds."""

    images: int
    classes: int
    dtype: torch.dtype
    layout: str
    projection: str
    goal: float


GOALS = (
    Shape(1, 1000, torch.float32, "folded", "shared", 10),
    Shape(1, 1000, torch.bfloat16, "folded", "shared", 10),
    Shape(1, 1000, torch.float32, "plain", "shared", 20),
    Shape(9, 1000, torch.float32, "folded", "shared", 15),
    Shape(64, 1000, torch.float32, "folded", "shared", 15),
    Shape(64, 1000, torch.bfloat16, "folded", "shared", 15),
    Shape(1, 1 << 20, torch.bfloat16, "plain", "shared", 294),
    Shape(512, 65536, torch.bfloat16, "plain", "shared", 261),
)


def executed(code: Sequence[Instruction], outer: int, inner: int, *opcodes: str) -> int:
    """Instructions (of these opcodes) that a warp executes: the longest loop `outer` times, loops in it `inner` times.

    Loops beside the longest run `inner` times as well.
    """

    def number(part: Sequence[Instruction]) -> int:
        return count(part, *opcodes) if opcodes else len(part)

    spans = loops(code)
    if not spans:
        return number(code)
    main, others = spans[0], spans[1:]
    nested = [span for span in others if main[0] <= span[0] and span[1] <= main[1]]
    beside = [span for span in others if span[1] < main[0] or span[0] > main[1]]
    body = number(within(code, main))
    inside = sum(number(within(code, span)) for span in nested)
    outside = sum(number(within(code, span)) for span in beside)
    once = number(code) - body - outside
    return once + outer * (body - inside + inner * inside) + inner * outside


def iterations(kernel: Kernel, plan: Plan, classes: int) -> tuple[int, int]:
    """(outer, inner) iterations of a kernel's loops."""
    constants = dict(kernel.constants)
    if kernel.function.startswith("attend"):
        block = constants.get("BLOCK_N") or max(
            constants["TILE"] // max(_power(constants["D"]), _power(constants["W"])), 1
        )
        return -(-classes // (plan.splits * block)), -(-constants["D"] // constants.get("BLOCK_D", constants["D"]))
    width = constants.get("N_IN", constants.get("D", 0))
    return -(-width // constants["BLOCK_D"]), -(-width // constants["BLOCK_D"])


def seconds(kernel: Kernel, plan: Plan, folded: FoldedHead, shape: Shape) -> float:
    """The estimate for one launch, without the gap before it."""
    dtype = folded.text_embeddings.dtype
    done = aot.compile_kernel(kernel, folded.variant, ARCH, stored=dtype, image=dtype)
    code = disassemble(done.cubin)
    outer, inner = iterations(kernel, plan, shape.classes)
    programs = 1
    for size in kernel.grid:
        programs *= size
    busiest = -(-programs // MULTIPROCESSORS)  # programs of the busiest multiprocessor
    schedulers = min(4, done.num_warps * busiest)
    issue = executed(code, outer, inner) * done.num_warps * busiest / schedulers / CLOCK
    chain = executed(code, outer, inner, "BAR") * BARRIER + ROUND_TRIPS[kernel.function] * TRIP
    if not kernel.function.startswith("attend"):
        return chain + issue
    constants, size = dict(kernel.constants), dtype.itemsize
    columns = constants["D"] + (constants["D"] if constants["FOLDED"] and constants["PROJECTED"] else 0)
    columns += constants["W"] if constants["FOLDED"] else 0
    tiles = kernel.grid[0]
    bank = shape.classes * columns * size
    memory = bank / MEMORY if bank > L2_BYTES else 0.0
    memory = max(memory, tiles * bank / L2)
    products = 0.0
    if kernel.function == "attend_tile":
        products = 2 * tiles * constants["BLOCK_M"] * shape.classes * (2 * constants["D"] + constants["W"])
        products *= 3 if size == 4 else 5 / 3 if constants["LOW"] else 1
        products /= TF32 if size == 4 else WGMMA if "wgmma" in done.ptx else MMA
        products *= max(1, MULTIPROCESSORS / programs)  # what the others could do
    sums = shape.images * plan.splits * constants["W"] * 4 / L2  # written here, read by `tail`
    if outer > 2:
        return max(chain + max(issue, products), memory) + sums
    # Nothing but the loops inside overlaps the rows' way: they ask for the next chunk of a product while they use one.
    # Values in one tile are asked for before those loops.
    late = memory
    if constants["FOLDED"] and constants.get("BLOCK_W", 0) >= constants["W"]:
        late = 0.0
    elif inner > 2 and not constants.get("RESIDENT"):
        late *= constants["W"] / columns if constants["FOLDED"] else 0.0
    return chain + sums + late + max(issue, products, memory - late)


def large_seconds(kernel: Kernel, plan: Plan, folded: FoldedHead, shape: Shape) -> float:
    """The estimate for `score_tile` or `sum_tile`, without the gap before it.

    A step of the loop asks for later chunks while wgmma multiplies. What comes after a tile's last product (the dearest
    way through the loop, less the cheapest) waits for it and overlaps with loads alone.
    """
    variant, dtype, constants = folded.variant, folded.text_embeddings.dtype, dict(kernel.constants)
    done = aot.compile_kernel(kernel, variant, ARCH, stored=dtype, image=dtype)
    assert "wgmma" in done.ptx
    code = disassemble(done.cubin)
    body = within(code, loops(code)[0])
    dear, cheap = (longest_way(body, lambda one: 1.0, pick=pick) for pick in (max, min))
    scores = kernel.function == "score_tile"
    rows, columns = constants["BLOCK_M"], constants["BLOCK_N"]  # of the accumulators
    tile = columns if scores else constants["TILE"]
    chunks = -(-constants["D"] // constants["BLOCK_D"]) if scores else tile // constants["BLOCK_D"]
    all_tiles = -(-shape.classes // tile)
    tiles = -(-all_tiles // plan.splits)  # of a program
    depth = constants["D"] if scores else tile
    products = 2 * rows * columns * depth * tiles / (WGMMA / MULTIPROCESSORS)
    rate = 4 / done.num_warps * CLOCK
    took = max(products, tiles * chunks * cheap / rate) + tiles * (dear - cheap) / rate
    took += tiles * (2 * chunks + count(body, "BAR")) * BARRIER
    # Through L2: the class set for each tile of images, the other factor for each tile of classes or columns.
    parts = kernel.grid[0] if scores else -(-shape.images // rows)
    width = variant.dim if scores else variant.value_dim
    weights = (parts // 2 if scores else parts) * rows * all_tiles * tile * dtype.itemsize
    traffic = parts * shape.classes * width * dtype.itemsize
    if scores:
        traffic += parts * all_tiles * rows * width * dtype.itemsize + weights
    else:
        traffic += weights * -(-width // columns) + shape.images * plan.splits * width * 4
    memory = (shape.classes * width * dtype.itemsize + weights) / MEMORY
    busiest = -(-kernel.grid[0] * kernel.grid[1] // MULTIPROCESSORS)
    return ROUND_TRIPS[kernel.function] * TRIP + max(busiest * took, traffic / L2, memory)


def _work(one: Instruction, body: set[Instruction], turns: int, rate: float) -> float:
    """Seconds of an instruction: `turns` times if it is in the loop's body, issued at `rate` for each clock."""
    return (turns if one in body else 1) * (1 / rate / CLOCK + BARRIER * one.name.startswith("BAR"))


def tail_seconds(kernel: Kernel, beside: Kernel, plan: Plan, folded: FoldedHead, shape: Shape) -> float:
    """The estimate for `tail`, after the attention `beside`, where its first programs wait if both fit."""
    variant, dtype = folded.variant, folded.text_embeddings.dtype
    constants = dict(kernel.constants)
    starts, few = constants["STARTS"], constants["BLOCK_M"] == 1
    shared, registers, took = 0, 0, 0.0
    layers = (starts[-1] - starts[1]) * kernel.grid[0]  # programs after the first stage
    whole = aot.compile_kernel(kernel, variant, ARCH, stored=dtype, image=dtype)
    room = min(REGISTERS // (32 * whole.registers * whole.num_warps), SHARED // max(whole.shared, 1))
    # The first stage whose programs have all started before its turn.
    early = 2 if layers <= MULTIPROCESSORS else len(starts)
    if starts[-1] * kernel.grid[0] <= room * MULTIPROCESSORS:
        early = 1
    for stage in range(len(starts) - 1):
        programs = starts[stage + 1] - starts[stage]
        alone = tuple(programs if i > stage else 0 for i in range(len(starts)))
        made = replace(kernel, constants=tuple((constants | {"STARTS": alone}).items()))
        done = aot.compile_kernel(made, variant, ARCH, stored=dtype, image=dtype)
        code = disassemble(done.cubin)
        shared, registers = max(shared, done.shared), max(registers, done.registers)
        outer = -(-plan.splits // constants["BLOCK_S"]) if stage == 0 else 1  # the other loops look at a counter
        busiest = -(-programs * kernel.grid[0] // MULTIPROCESSORS)
        schedulers = min(4, done.num_warps * busiest)
        body = set(within(code, loops(code)[0])) if loops(code) else set()
        work = functools.partial(_work, body=body, turns=outer, rate=schedulers / (done.num_warps * busiest))
        # What stands before a wait is done by then: before the attention's end where few programs fit beside it, and
        # before a layer's turn where its programs have started.
        waited = "ACQBULK" if few else "CCTL" if stage >= early else None
        took += longest_way(code, work, waited) + (TRIP if stage else 2 * TRIP)
        # The merge reads every split's sums: all programs through L2, each through its multiprocessor's port.
        part = plan.splits * 4 * min(constants["CHUNK"], variant.value_dim)
        took += HANDOVER if stage else max(shape.images * plan.splits * variant.value_dim * 4 / L2, part / L2_TO_SM)
    first = aot.compile_kernel(beside, variant, ARCH, stored=dtype, image=dtype)
    together = 32 * (first.registers * first.num_warps + registers * kernel.num_warps)
    if few and (together > REGISTERS or first.shared + shared > SHARED):  # then it loads its weights now
        took += TRIP + constants["CHUNK"] * constants["D"] * dtype.itemsize / L2_TO_SM
    return took


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def estimate(shape: Shape, dim: int = 512) -> list[tuple[str, float]]:
    """(kernel, microseconds) of every launch, the gap before it included."""
    head = ViLUHead(dim, projection=shape.projection)
    rows = torch.nn.functional.normalize(torch.randn(4, dim), dim=1).to(shape.dtype)
    folded = fold(head, rows, layout=shape.layout)
    plan = plan_launches(
        folded.variant, shape.images, shape.classes, ragged=False, settings=tuned(ARCH, folded.variant),
        multiprocessors=MULTIPROCESSORS, pdl=True,
        shared_softmax=folded.variant.shares_softmax(folded.logit_scale, folded.attention_scale),
    )  # fmt: skip
    found = []
    for place, kernel in enumerate(plan.kernels):
        if kernel.function == "tail":
            took = tail_seconds(kernel, plan.kernels[place - 1], plan, folded, shape)
        elif kernel.function in ("score_tile", "sum_tile"):
            took = large_seconds(kernel, plan, folded, shape)
        else:
            took = seconds(kernel, plan, folded, shape)
        if kernel.function == "project" and shape.layout == "folded":
            took = 0.0  # `attend_*` does not read it, and runs beside it
        found.append((kernel.name, 1e6 * (took + (GAP if place else FIRST))))
    return found


def measured(path: Path, shape: Shape, dim: int = 512) -> float | None:
    """Microseconds of the fused head replayed as a CUDA graph, where bench/head.py has them."""
    if not path.exists():
        return None
    for row in json.loads(path.read_text("utf-8"))["rows"]:
        key = (row["contender"], row["B"], row["K"], row["D"], row["dtype"], row.get("layout"))
        mine = ("fused", shape.images, shape.classes, dim, str(shape.dtype)[6:], shape.layout)
        if key == mine and "graph_warm" in row:
            return float(row["graph_warm"]["median_us"])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="write the table here too")
    given = parser.parse_args()
    lines = [
        f"Estimates for sm_{ARCH}, D = 512, from machine code; not measured.",
        "",
        "| B | K | type | layout | projections | estimate, us | goal, us | measured, us | by launch, us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in GOALS:
        parts = estimate(shape)
        seen = measured(ROOT / "bench/results/head-cuda.json", shape)
        lines.append(
            f"| {shape.images} | {shape.classes:,} | {str(shape.dtype)[6:]} | {shape.layout} | {shape.projection} | "
            f"{sum(took for _, took in parts):.1f} | {shape.goal} | {'-' if seen is None else f'{seen:.1f}'} | "
            + ", ".join(f"{name} {took:.1f}" for name, took in parts)
            + " |"
        )
        print(lines[-1], flush=True)
    if given.output:
        given.output.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
