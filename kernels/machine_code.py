"""Read a cubin's machine code (SASS): what a kernel costs, counted without a GPU.

`disassemble` runs NVIDIA's nvdisasm, which Triton brings along. `bench/head_model.py` turns the counts into an estimate
of the time, and tests/kernels/test_budget.py holds them to bounds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from triton.backends.nvidia import compiler as nvidia

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
WIDTHS = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction.

    name: its opcode with modifiers, as in "LDG.E.128".
    operands: the text after it.
    guarded: it stands under a predicate.
    """

    address: int
    name: str
    operands: str
    guarded: bool

    @property
    def load_width(self) -> int:
        """Bytes that a thread loads from global memory; 0 for another instruction."""
        opcode, *modifiers = self.name.split(".")
        if opcode not in ("LDG", "LDGSTS"):
            return 0
        return next((WIDTHS[modifier] for modifier in modifiers if modifier in WIDTHS), 4)


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin's only kernel, in order, branch targets as addresses in `operands`."""
    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", "-hex", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    waiting: list[str] = []
    code = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            waiting.append(label[1])
        elif found := INSTRUCTION.search(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            operands = re.split(r"\s+[&?]", found[4].strip())[0]  # newer chips' text ends with scheduling hints
            code.append(Instruction(address, found[3], operands, bool(found[2])))
    return [
        replace(one, operands=re.sub(r"`\((\.L\w+)\)", lambda m: hex(labels.get(m[1], 0)), one.operands))
        for one in code
    ]


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """(first, last) address of every loop: a branch backwards and its target, the longest first."""
    found = []
    for one in code:
        target = re.search(r"0x[0-9a-f]+$", one.operands) if one.name.startswith("BRA") else None
        if target and int(target[0], 16) < one.address:
            found.append((int(target[0], 16), one.address))
    return sorted(found, key=lambda pair: pair[0] - pair[1])


def within(code: Sequence[Instruction], span: tuple[int, int]) -> list[Instruction]:
    return [one for one in code if span[0] <= one.address <= span[1]]


def count(code: Sequence[Instruction], *opcodes: str) -> int:
    """Instructions of these opcodes, modifiers aside."""
    return sum(one.name.split(".")[0] in opcodes for one in code)


def longest_way(
    code: Sequence[Instruction],
    cost: Callable[[Instruction], float],
    first: str | None = None,
    pick: Callable[[Sequence[float]], float] = max,
) -> float:
    """Cost of the costliest way through the code: one side of each branch, no loop taken twice.

    first: the opcode that the way starts behind; by default the kernel's first instruction.
    pick: `min` for the cheapest way.
    """
    costs: dict[int, float] = {}  # address -> from there to the end
    after = 0.0
    for one in reversed(code):
        opcode = one.name.split(".")[0]
        target = re.search(r"0x[0-9a-f]+$", one.operands) if opcode == "BRA" else None
        goes_on = one.guarded or opcode not in ("BRA", "EXIT") or "P" in one.operands
        ways = [after] if goes_on else []
        if target:
            ways.append(costs.get(int(target[0], 16), 0.0))
        after = costs[one.address] = cost(one) + (pick(ways) if ways else 0.0)
    starts = [one.address for one in code if first is not None and one.name.split(".")[0] == first]
    return max((costs[address] for address in starts), default=after)
