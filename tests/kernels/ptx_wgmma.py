"""The part of ptx_emulator.py for wgmma, Hopper's matrix products of a warp group, which run beside their warps.

A product reads shared memory until its warp has waited for it, and its result is there then and not before: it is
computed at the wait, as late as it may. Each warp of the group computes its own 16 of the 64 rows. It is an error

    to read or write the accumulators, or write A's registers, before the wait; another product may add to them
    to start a product on registers that were written since the last wgmma.fence
    to write bytes of shared memory that a product still reads (another warp's product: its wait and a barrier)
    to read bytes of which a cp.async has not landed, or that st.shared or stmatrix has written without
        fence.proxy.async between: a product reads through a proxy of its own

What cp.async has written counts as fenced when it has landed: CUTLASS's and Triton's pipelines for 9.0 put no proxy
fence there.
"""

# mypy: disallow_untyped_defs=false

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LANES = np.arange(32)
REGISTER = re.compile(r"%(?:p|rs|r|rd)\d+")
NO_TARGET = ("st", "bra", "bar", "ret", "cp", "stmatrix", "wgmma", "fence", "griddepcontrol")


class RaceError(AssertionError):
    """The outcome depends on the order of two accesses."""


@dataclass
class Product:
    """A product on its way. sources: A's registers; places: the bytes of shared memory that it reads."""

    accumulators: frozenset[str]
    sources: frozenset[str]
    places: np.ndarray
    land: Callable[[], None]


class Fences:
    """For which warps a byte of shared memory has been written with no proxy fence on the way to them.

    The fence may be the writer's, before the barrier, or the reader's, after it: within a block either is on the way
    (Lustig et al., Mixed-Proxy Extensions for the NVIDIA PTX Memory Consistency Model, ISCA 2022, section 5.4).
    """

    def __init__(self, size: int) -> None:
        self.missing = np.zeros(size, np.int64)  # a bit for each warp
        self.author, self.epoch = np.zeros((2, size), np.int64)
        self.now = 0

    def write(self, places: np.ndarray, warp: int) -> None:
        self.missing[places], self.author[places], self.epoch[places] = -1, warp, self.now

    def fence(self, warp: int) -> None:
        """Of what this warp has written itself, or may read since a barrier."""
        self.missing[(self.author == warp) | (self.epoch < self.now)] &= ~(1 << warp)

    def barrier(self) -> None:
        """What one warp has fenced by now is fenced for all."""
        self.missing[self.missing != -1] = 0
        self.now += 1

    def clear(self, places: np.ndarray) -> None:
        self.missing[places] = 0

    def is_missing(self, places: np.ndarray, warp: int) -> bool:
        return bool((self.missing[places] >> warp & 1).any())


def targets_of(line: str) -> frozenset[str]:
    """The registers that an instruction writes."""
    opcode, _, rest = re.sub(r"^@!?%p\d+\s+", "", line).replace("\t", " ").partition(" ")
    if opcode.split(".")[0] in NO_TARGET:
        return frozenset()
    first = re.match(r"\s*(\{[^}]*\}|[^,]*)", rest)
    return frozenset(REGISTER.findall(first[0]))


class WarpGroupProducts:
    """Instructions of `Kernel`; `Warp` has `products`, `open_products` and `written`, `Block` `read_by_products`."""

    _reader: Callable[..., Any]
    _writer: Callable[..., Any]
    _list: Callable[..., list[str]]
    _touch_shared: Callable[..., np.ndarray]

    def _watch(self, line, step):
        """The step, after a check of the registers that it uses against the products on their way."""
        targets, used = targets_of(line), frozenset(REGISTER.findall(line))
        if line.startswith("wgmma"):
            return step

        def run(warp):
            for group in (*warp.products, warp.open_products):
                for product in group:
                    if used & product.accumulators:
                        raise RaceError("a result of wgmma before its wait")
                    if targets & product.sources:
                        raise RaceError("a register that a wgmma still reads")
            warp.written |= targets
            step(warp)

        return run

    def _fence(self, parts, operands):
        assert parts[1:3] == ["proxy", "async"], parts

        def step(warp, mask):
            warp.block.fences.fence(warp.number)

        return step

    def _wgmma(self, parts, operands):
        if parts[1] == "mma_async":
            return self._mma_async(parts, operands)

        def step(warp, mask):
            if parts[1] == "fence":
                warp.written = set()
            elif parts[1] == "commit_group":
                warp.products.append(warp.open_products)
                warp.open_products = []
            else:
                while len(warp.products) > int(operands[0]):
                    for product in warp.products.pop(0):
                        warp.block.read_by_products[product.places] -= 1
                        product.land()

        assert parts[1] in ("fence", "commit_group", "wait_group"), parts
        return step

    def _mma_async(self, parts, operands):
        """D = A B + D, or A B, in 16 bits: A (64, 16) in registers or shared memory, B (16, N) in shared memory."""
        n = int(re.match(r"m64n(\d+)k16$", parts[4])[1])
        kind = parts[6]
        if parts[5] != "f32" or kind not in ("bf16", "f16"):
            raise NotImplementedError(".".join(parts))
        names, a, b = self._list(operands[0]), operands[1], self._reader(operands[2], "b64")
        reads, writes = [self._reader(x, "f32") for x in names], [self._writer(x) for x in names]
        in_registers = a.startswith("{")
        a_names = self._list(a) if in_registers else []
        a_reads = [self._reader(x, "b32") for x in a_names] if in_registers else [self._reader(a, "b64")]
        adds = self._reader(operands[3], "pred") if operands[3].startswith("%") else None
        scales, transposed = [int(x) for x in operands[4:6]], [int(x) for x in operands[6:]]
        assert scales == [1, 1], "negated factors"
        a_transposed, b_transposed = (0, *transposed)[-2:] if in_registers else transposed
        group, thread = LANES // 4, LANES % 4
        accumulators, sources = frozenset(names), frozenset(a_names)

        def numbers(bits):
            if kind == "f16":
                return bits.view(np.float16).astype(np.float64)
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)

        def step(warp, mask):
            block = warp.block
            if warp.written & (accumulators | sources):
                raise RaceError("a register written without wgmma.fence after it")
            flying = [product for batch in (*warp.products, warp.open_products) for product in batch]
            assert all(p.accumulators in (accumulators, p.accumulators - accumulators) for p in flying), "other shape"
            places = [tile_places(int(b(warp)[0]), np.arange(n), np.arange(16), bool(b_transposed))]
            if not in_registers:
                rows = np.arange(16) + 16 * (warp.number % 4)
                places.append(tile_places(int(a_reads[0](warp)[0]), rows, np.arange(16), bool(a_transposed)))
            touched = np.unique(np.concatenate([x.ravel() for x in places]))
            bytes_ = (touched[:, None] + np.arange(2)).ravel()
            self._touch_shared(warp, touched, 2)
            if block.fences.is_missing(bytes_, warp.number):
                raise RaceError("shared memory written without fence.proxy.async after it")
            registers = [read(warp).copy() for read in a_reads] if in_registers else []
            keeps = operands[3] != "0" if adds is None else bool(adds(warp)[0])
            block.read_by_products[bytes_] += 1

            def load(where):
                data = self._touch_shared(warp, where.ravel(), 2)
                return numbers(np.ascontiguousarray(block.shared[data]).view(np.uint16).reshape(where.shape))

            def land():
                right = load(places[0])  # (n, 16)
                if in_registers:
                    left = np.zeros((16, 16))
                    for i, value in enumerate(registers):
                        pair = np.ascontiguousarray(value).astype(np.uint32).view(np.uint16)
                        for j in (0, 1):
                            left[group + 8 * (i % 2), 2 * thread + j + 8 * (i // 2)] = numbers(
                                np.ascontiguousarray(pair[j::2])
                            )
                else:
                    left = load(places[1])
                total = left @ right.T
                for i, (read, write) in enumerate(zip(reads, writes, strict=True)):
                    column = 8 * (i // 4) + 2 * thread + i % 2
                    value = total[group + 8 * (i // 2 % 2), column]
                    write(warp, (value + read(warp) if keeps else value).astype(np.float32), mask)

            warp.open_products.append(Product(accumulators, sources, bytes_, land))

        return step


def tile_places(descriptor: int, rows: np.ndarray, columns: np.ndarray, transposed: bool) -> np.ndarray:
    """Bytes (rows, columns) of 16-bit numbers of a swizzled operand, `columns` along the sum.

    PTX ISA, matrix descriptor and the shared memory layouts of wgmma. The columns of a row lie side by side, eight rows
    `stride` bytes from the next eight; or, transposed, the rows do, in pieces of the swizzle's width `leading` bytes
    apart, eight columns `stride` bytes from the next eight. 16-byte units are exchanged by bits 7 to 9 of the address.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    mode = descriptor >> 62 & 3
    assert mode > 0, "no swizzle"
    assert descriptor >> 49 & 7 == 0, "a base offset"
    width = {1: 128, 2: 64, 3: 32}[mode]
    across, along = (columns, rows) if transposed else (rows, columns)  # lines of `width` bytes, places on a line
    line = across // 8 * stride + across % 8 * width
    place = 2 * along // width * leading + 2 * along % width
    assert transposed or (2 * along < width).all()
    grid = start + (line[None, :] + place[:, None] if transposed else line[:, None] + place[None, :])
    return grid ^ (grid >> 7 & width // 16 - 1) << 4
