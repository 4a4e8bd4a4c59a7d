"""An emulator of the PTX that Triton writes, which runs the compiled kernels without a GPU and finds their races.

A warp is 32 lanes in NumPy arrays and runs in lock step. The warps of all blocks at work run in random order, in slices
of random length; a random number of blocks is at work at once. Blocks start in random order, or, where a kernel has
atomics, in the order of their numbers, as a GPU starts them. So every run meets another order of events. A cp.async
lands at its wait, as late as it may. What is not initialised is NaN: registers, shared memory, scratch.

It raises `RaceError` where the outcome depends on the order, even if the order taken hides it:

    shared memory  a byte that two warps touch, one of them writing, with no barrier of the block between
    cp.async       a byte that is read or written before the copy has landed
    global memory  a word that two warps touch, one of them writing, where neither access happens before the other:
                   by a barrier of their block, or by a release that the other's acquire has seen
    launches       with programmatic dependent launch, memory that an earlier kernel wrote, before griddepcontrol.wait,
                   or after it where a kernel between the two did not wait itself

Blocks that wait for each other for ever are an AssertionError, as is a write to a kernel's input.

wgmma is in ptx_wgmma.py. Not modelled: TMA, mbarriers, tensor memory, and the memory model within a warp. An
instruction that it does not know raises NotImplementedError.
"""

# mypy: disallow_untyped_defs=false

import random
import re
from collections.abc import Callable, Sequence

import numpy as np

from tests.kernels.ptx_wgmma import LANES, Fences, Product, RaceError, WarpGroupProducts

BASE = 1 << 32  # the address where global memory starts
NAN_BYTE = 0xFF
TYPES = {
    "f32": np.float32, "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "s64": np.int64, "u64": np.uint64,
    "b64": np.uint64, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "pred": np.bool_, "bf16": np.uint16,
    "f16": np.float16, "f32x2": np.uint64,
    "b8": np.uint8,
}  # fmt: skip
BANKS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
SYNCHRONOUS = ("bar", "shfl", "redux", "ldmatrix", "stmatrix", "mma", "cp", "griddepcontrol", "wgmma")


class Tracker:
    """Who touched each byte last, to find two warps that meet without a barrier between.

    Several warps may write the same value to a byte, as Triton's replicated layouts do.
    """

    def __init__(self, size: int) -> None:
        def table() -> np.ndarray:  # per byte: block, epoch, bits of the warps
            return np.full((3, size), -1, np.int64)

        self.writers, self.readers = table(), table()

    def touch(self, places: np.ndarray, who: tuple[int, int, int], same: np.ndarray | None) -> None:
        """A read of bytes, or a write; same: which of them are there already (None: a read)."""
        block, warp, epoch = who
        bit = 1 << warp
        last, read = self.writers[:, places], self.readers[:, places]
        meets = (last[0] >= 0) & ((last[0] != block) | ((last[1] == epoch) & (last[2] & bit == 0)))
        if same is not None:
            meets &= ~(same & (last[0] == block))
            others = (read[0] != block) | ((read[1] == epoch) & (read[2] & ~bit != 0))
            meets |= ~same & (read[0] >= 0) & others
        if meets.any():
            kind = "read" if same is None else "write"
            place = int(places[np.argmax(meets)])
            raise RaceError(f"{kind} of byte {place} by (block, warp, epoch) {who}: another warp used it")
        table, known = (self.readers, read) if same is None else (self.writers, last)
        joined = (known[0] == block) & (known[1] == epoch)
        table[0, places], table[1, places] = block, epoch
        table[2, places] = np.where(joined, known[2] | bit, bit)


class Clocks:
    """Which accesses to the words of a tensor happen before which, in one launch: a clock for every warp.

    A warp knows a clock of every other: what that had done when the two last synchronised. Warps of one block may write
    the same value to a word, as Triton's replicated layouts do.
    """

    def __init__(self, size: int, warps: int) -> None:
        words = -(-size // 4)
        self.writer, self.written = np.full(words, -1), np.zeros(words, np.int64)
        self.read = np.zeros((words, warps), np.int64)

    def touch(self, words: np.ndarray, warp: "Warp", same: np.ndarray | None) -> None:
        """A read of words, or a write; same: which of them hold that value already (None: a read)."""
        writer, clock, block = self.writer[words], warp.clock, warp.block
        beside = (writer >= 0) & (self.written[words] > clock[np.maximum(writer, 0)])
        if same is None:
            self.read[words, warp.index] = clock[warp.index]
        else:
            mine = slice(block.warps[0].index, block.warps[0].index + len(block.warps))
            in_block = (writer >= mine.start) & (writer < mine.stop)
            later = self.read[words] > clock
            others = later.copy()
            others[:, mine] = False
            beside = (beside & ~(same & in_block)) | np.where(same, others.any(1), later.any(1))
            self.writer[words], self.written[words] = warp.index, clock[warp.index]
        if beside.any():
            kind = "read" if same is None else "write"
            raise RaceError(f"{kind} of word {int(words[np.argmax(beside)])}, which another warp uses at the same time")


class Memory:
    """Global memory of named tensors, 256 bytes apart; an access outside of all of them is an error."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.tensors: list[np.ndarray] = []
        self.clocks: dict[int, Clocks] = {}  # of the tensors that are no input
        self.signals: dict[int, np.ndarray] = {}  # address of a counter -> what its releases tell
        self.launch: list[np.ndarray] = []  # per byte, the launch that wrote it; -1: none
        self.waited: list[bool] = []  # of every launch: did it begin or wait after all before it
        self.top = BASE

    def put(self, array: np.ndarray) -> int:
        """Copy an array into memory; its address."""
        data = np.frombuffer(array.tobytes(), np.uint8).copy()
        address, self.top = self.top, self.top + -(-len(data) // 256) * 256 + 256
        self.starts.append(address)
        self.tensors.append(data)
        self.launch.append(np.full(len(data), -1))
        return address

    def new(self, size: int) -> int:
        address = self.put(np.full(size, NAN_BYTE, np.uint8))
        self.clocks[len(self.tensors) - 1] = Clocks(size, 0)
        return address

    def begin(self, warps: int) -> None:
        """A launch of this many warps begins."""
        self.clocks = {tensor: Clocks(len(self.tensors[tensor]), warps) for tensor in self.clocks}
        self.signals = {}

    def place(self, addresses: np.ndarray, size: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(tensor, lanes, bytes (lanes, size) in it) of accesses of `size` bytes."""
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        found = []
        for tensor in np.unique(which):
            lanes = np.flatnonzero(which == tensor)
            offsets = addresses[lanes] - self.starts[tensor]
            if tensor < 0 or (offsets + size > len(self.tensors[tensor])).any():
                raise AssertionError(f"{size} bytes at {int(addresses[lanes].max()):#x} lie outside of every tensor")
            found.append((int(tensor), lanes, offsets[:, None] + np.arange(size)))
        return found

    def get(self, address: int, dtype: type, count: int) -> np.ndarray:
        ((tensor, _, places),) = self.place(np.array([address]), count * np.dtype(dtype).itemsize)
        return self.tensors[tensor][places[0]].view(dtype)


class Warp:
    def __init__(self, kernel: "Kernel", block: "Block", number: int) -> None:
        self.block, self.number = block, number
        self.index = block.number * (kernel.threads // 32) + number
        self.clock = np.zeros(kernel.warps, np.int64)
        self.clock[self.index] = 1
        self.pc, self.done, self.waits, self.joined = 0, False, False, not kernel.dependent
        self.mask = np.ones(32, bool)
        self.split: np.ndarray | None = None  # where each lane goes on, while they are apart
        self.groups: list[list[Callable[[], None]]] = []
        self.open_group: list[Callable[[], None]] = []
        self.products: list[list[Product]] = []  # of wgmma, by group
        self.open_products: list[Product] = []
        self.written: set[str] = set()  # registers, since the last wgmma.fence
        self.registers = {
            bank: np.full((kernel.registers.get(bank, 0), 32), np.array(-1).astype(kind), kind)
            for bank, kind in BANKS.items()
        }
        self.registers["p"][:] = False
        grid, place = block.grid, block.place
        self.special = {
            "%tid.x": LANES + 32 * number, "%laneid": LANES, "%ctaid.x": place[0], "%ctaid.y": place[1],
            "%ctaid.z": 0, "%nctaid.x": grid[0], "%nctaid.y": grid[1], "%nctaid.z": 1,
        }  # fmt: skip

    @property
    def who(self) -> tuple[int, int, int]:
        return self.block.number, self.number, self.block.epoch


class Block:
    def __init__(self, kernel: "Kernel", number: int, place: tuple[int, int], grid: tuple[int, int], shared: int):
        self.number, self.place, self.grid = number, place, grid
        self.epoch = 0
        self.shared = np.full(max(shared, 16), NAN_BYTE, np.uint8)
        self.pending = np.zeros(len(self.shared), bool)  # a cp.async is on its way to these bytes
        self.read_by_products = np.zeros(len(self.shared), np.int64)
        self.fences = Fences(len(self.shared))
        self.tracker = Tracker(len(self.shared))
        self.warps = [Warp(kernel, self, i) for i in range(kernel.threads // 32)]


class Kernel(WarpGroupProducts):
    """One kernel of PTX text. `run` launches it."""

    def __init__(self, ptx: str) -> None:
        body = ptx[ptx.index(".entry") :]
        self.parameters = re.findall(r"\.param \.(\w+)(?: \.ptr \.\w+ \.align \d+)? (\w+)", body[: body.index("{")])
        self.threads = int(re.search(r"\.reqntid (\d+)", body)[1])
        self.registers = {bank: int(n) for bank, n in re.findall(r"\.reg \.\w+\s+%([a-z]+)<(\d+)>", body)}
        self.labels: dict[str, int] = {}
        self.lines: list[str] = []
        for line in re.sub(r"//.*", "", body[body.index("{") + 1 : body.index("\n}")]).split("\n"):
            if label := re.match(r"\s*(\$\w+):", line):
                self.labels[label[1]] = len(self.lines)
            for statement in (part.strip() for part in line.split(";")):
                if re.match(r"@?!?[%a-z]", statement):
                    self.lines.append(statement)
        self.code = [self._compile(line) for line in self.lines]
        if any(line.startswith("wgmma") for line in self.lines):
            self.code = [self._watch(line, step) for line, step in zip(self.lines, self.code, strict=True)]
        self.idle, self.looked = 0, False  # turns without a barrier or a block's end

    def run(
        self,
        memory: Memory,
        grid: Sequence[int],
        values: Sequence[int | float],
        shared: int,
        *,
        seed: int = 0,
        dependent: bool = False,
        at_once: int = 0,
    ) -> None:
        """Launch with the values of the parameters in order, in an order of events that the seed decides.

        dependent: by programmatic dependent launch, after the launch before it.
        at_once: blocks that are at work at once, 0 for a random number; -1: one, from the last block to the first.
        """
        self.memory, self.dependent = memory, dependent
        shape = (*grid, 1)[0], (*grid, 1)[1]
        self.warps = shape[0] * shape[1] * self.threads // 32
        memory.begin(self.warps)
        waited = True
        self.values = [
            np.array(value, np.float32).view(np.uint32) if kind == "f32" else np.array(value, TYPES[kind])
            for (kind, _), value in zip(self.parameters, values, strict=True)
        ]
        draw = random.Random(seed)
        places = [(x, y) for y in range(shape[1]) for x in range(shape[0])]
        if not any("atom." in line for line in self.lines):
            draw.shuffle(places)
        waiting = list(enumerate(places))
        if at_once >= 0:
            waiting.reverse()
        most = abs(at_once) or draw.choice([1, 2, 5, 50])
        working: list[Block] = []
        while waiting or working:
            while waiting and len(working) < most:
                number, place = waiting.pop()
                working.append(Block(self, number, place, shape, shared))
            block = draw.choice(working)
            ready = [warp for warp in block.warps if not warp.done and not warp.waits]
            if ready:
                self._go_on(draw.choice(ready), draw.choice([1, 7, 60, 500]))
                self.idle += 1
                assert self.idle < 50_000, "blocks wait for each other for ever"
            elif any(warp.waits for warp in block.warps):
                assert all(warp.waits for warp in block.warps), "a warp waits at a barrier that another never reaches"
                block.epoch += 1
                block.fences.barrier()
                self.idle = 0
                known = np.max([warp.clock for warp in block.warps], 0)
                for warp in block.warps:
                    warp.waits, warp.clock = False, known.copy()
                    warp.clock[warp.index] += 1
            else:
                waited &= all(warp.joined for warp in block.warps)
                working.remove(block)
                self.idle = 0
        memory.waited.append(waited)

    def _go_on(self, warp: Warp, steps: int) -> None:
        self.looked = False  # at a counter: the turn ends, as it may have to look again
        while steps and not warp.waits and not warp.done and not self.looked:
            steps -= 1
            if warp.split is not None:
                warp.pc = int(warp.split.min())
                warp.mask = warp.split == warp.pc
                if warp.mask.all():
                    warp.split = None
            pc = warp.pc
            warp.pc += 1
            try:
                self.code[pc](warp)
            except (RaceError, NotImplementedError, AssertionError) as error:
                raise type(error)(f"{self.lines[pc]}: {error}") from None
            if warp.split is not None and not self.lines[pc].split()[-2:][0].startswith("bra"):
                warp.split = np.where(warp.mask & (warp.split == pc), pc + 1, warp.split)

    # Operands: a reader gives 32 lanes of raw bits, a writer stores under the lanes' mask.

    def _reader(self, text: str, kind: str):
        dtype = TYPES[kind]
        if found := re.match(r"%(p|rs|r|rd)(\d+)$", text):
            bank, number = found[1], int(found[2])

            def read(warp):
                bits = warp.registers[bank][number]
                return bits if bank == "p" else bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)

            return read
        if text.startswith("%"):
            return lambda warp: np.broadcast_to(np.asarray(warp.special[text]), 32).astype(dtype)
        if text == "global_smem":
            return lambda warp: np.zeros(32, dtype)
        if text.startswith("0f"):
            value = np.array(int(text[2:], 16), np.uint32).view(np.float32)
        else:
            value = np.array(int(text, 0)).astype(dtype)
        return lambda warp: np.broadcast_to(value, 32)

    def _writer(self, text: str):
        if text == "_":  # half of a pair that nobody needs
            return lambda warp, value, mask: None
        found = re.match(r"%(p|rs|r|rd)(\d+)$", text)
        bank, number = found[1], int(found[2])

        def write(warp, value, mask):
            value = np.broadcast_to(np.asarray(value), 32)
            target = warp.registers[bank][number]
            if bank != "p":
                if value.dtype == np.float16:
                    value = value.view(np.uint16)
                elif value.dtype.kind == "f":
                    value = value.astype(np.float32).view(np.uint32)
                value = value.astype(target.dtype)
            np.copyto(target, value, where=mask)

        return write

    @staticmethod
    def _operands(text: str) -> list[str]:
        return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]

    @staticmethod
    def _list(text: str) -> list[str]:
        return [part.strip() for part in text.strip("{} ").split(",")]

    def _address(self, text: str):
        base, offset = re.match(r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\w+)\s*)?\]", text).groups()
        read, shift = self._reader(base, "u64" if base.startswith("%rd") else "u32"), int(offset or "0", 0)
        return lambda warp: read(warp).astype(np.int64) + shift

    def _compile(self, line: str):
        guard, line = re.match(r"(?:@(!?%p\d+)\s+)?(.*)", line).groups()
        opcode, _, rest = line.partition(" ") if " " in line else line.partition("\t")
        parts, operands = opcode.split("."), self._operands(rest.strip()) if rest.strip() else []
        test = self._reader(guard.lstrip("!"), "pred") if guard else None
        negated = bool(guard) and guard.startswith("!")
        if parts[0] == "bra":
            target = operands[0]

            def branch(warp):
                taken = (test(warp) ^ negated) if test else np.ones(32, bool)
                there, here = self.labels[target], warp.pc
                go = np.where(taken, there, here)
                if warp.split is None and (go == go[0]).all():
                    warp.pc = int(go[0])
                    return
                old = warp.split if warp.split is not None else np.full(32, here)
                warp.split = np.where(warp.mask, go, old) if warp.split is not None else go

            return branch
        make = getattr(self, f"_{parts[0]}", None) or self._arithmetic
        step = make(parts, operands)

        def run(warp):
            mask = warp.mask
            if parts[0] in SYNCHRONOUS:
                assert mask.all(), "a warp's lanes are apart"
            if test:
                mask = mask & (test(warp) ^ negated)
            step(warp, mask)

        return run

    # Control and memory.

    def _ret(self, parts, operands):
        def step(warp, mask):
            assert mask.all() or not mask.any(), "a part of a warp returns"
            warp.done = bool(mask.all())

        return step

    def _bar(self, parts, operands):
        def step(warp, mask):
            warp.waits = parts[1] == "sync"  # bar.warp.sync: lanes run in lock step

        return step

    def _griddepcontrol(self, parts, operands):
        def step(warp, mask):
            if parts[1] == "wait":
                warp.joined = True

        return step

    def _touch_shared(self, warp, addresses, size, rows=None):
        """Bytes (lanes, size) of shared memory, checked; rows: what is about to be written there."""
        block = warp.block
        assert ((addresses >= 0) & (addresses + size <= len(block.shared))).all(), "outside of shared memory"
        places = addresses[:, None] + np.arange(size)
        if block.pending[places].any():
            raise RaceError("a cp.async to these bytes has not landed")
        if rows is not None and block.read_by_products[places].any():
            raise RaceError("a wgmma still reads these bytes")
        same = None if rows is None else (block.shared[places] == rows).ravel()
        block.tracker.touch(places.ravel(), warp.who, same)
        return places

    def _touch_global(self, warp, addresses, size, rows=None):
        """(tensor, lanes, bytes) of global memory, checked; rows: what is about to be written there."""
        memory = self.memory
        found = memory.place(addresses, size)
        for tensor, lanes, places in found:
            self._waited_for(warp, tensor, places)
            if tensor in memory.clocks:
                words = places[:, ::4] // 4
                same = None
                if rows is not None:
                    equal = memory.tensors[tensor][places] == rows[lanes]
                    same = equal.reshape(len(lanes), words.shape[1], -1).all(2).ravel()
                memory.clocks[tensor].touch(words.ravel(), warp, same)
            else:
                assert rows is None, "a write to an input"
        if any(int(address) in memory.signals for address in addresses):
            raise RaceError("a counter, without an atomic")
        return found

    def _waited_for(self, warp, tensor, places):
        """Check that the launches which wrote there have ended for this warp."""
        memory, now = self.memory, len(self.memory.waited)
        earlier = memory.launch[tensor][places]
        earlier = earlier[(earlier >= 0) & (earlier < now)]
        if len(earlier) and not (warp.joined and all(memory.waited[int(earlier.min()) + 1 :])):
            raise RaceError(f"memory of launch {int(earlier.min())}, which may still run")

    def _counter(self, warp, addresses):
        """(value, address) of a counter, the same for all lanes."""
        address = int(addresses[0])
        assert (addresses == address).all(), "lanes look at different counters"
        if address not in self.memory.signals:
            self._touch_global(warp, addresses[:1], 4)
            self.memory.signals[address] = np.zeros(self.warps, np.int64)
        for tensor, _, places in self.memory.place(addresses[:1], 4):
            self._waited_for(warp, tensor, places)
        return self.memory.get(address, np.uint32, 1), address

    def _atom(self, parts, operands):
        assert parts[1:3] == ["global", "gpu"]
        assert parts[4:] == ["add", "u32"], parts
        write, address, value = self._writer(operands[0]), self._address(operands[1]), self._reader(operands[2], "u32")

        def step(warp, mask):
            assert mask.sum() <= 1, "one lane counts"
            if not mask.any():
                return
            counter, place = self._counter(warp, address(warp)[mask])
            write(warp, np.full(32, counter[0]), mask)
            ((tensor, _, places),) = self.memory.place(np.array([place]), 4)
            self.memory.tensors[tensor][places[0]] = (counter + value(warp)[mask]).view(np.uint8)
            if parts[3] == "release":
                self.memory.signals[place] = np.maximum(self.memory.signals[place], warp.clock)
                warp.clock[warp.index] += 1
            else:
                assert parts[3] == "relaxed"

        return step

    def _look(self, parts, operands):
        """ld.acquire.gpu.global.b32, or ld.relaxed."""
        assert parts[2:] == ["gpu", "global", "b32"], parts
        write, address = self._writer(operands[0]), self._address(operands[1])

        def step(warp, mask):
            counter, place = self._counter(warp, address(warp)[mask])
            write(warp, np.full(32, counter[0]), mask)
            self.looked = True
            if parts[1] == "acquire":
                warp.clock = np.maximum(warp.clock, self.memory.signals[place])

        return step

    def _gather(self, warp, space, addresses, size) -> np.ndarray:
        """Bytes (lanes, size) at addresses."""
        if space == "shared":
            return warp.block.shared[self._touch_shared(warp, addresses, size)]
        rows = np.zeros((len(addresses), size), np.uint8)
        for tensor, lanes, places in self._touch_global(warp, addresses, size):
            rows[lanes] = self.memory.tensors[tensor][places]
        return rows

    def _scatter(self, warp, space, addresses, rows) -> None:
        size = rows.shape[1]
        if space == "shared":
            places = self._touch_shared(warp, addresses, size, rows)
            warp.block.shared[places] = rows
            warp.block.fences.write(places, warp.number)
            return
        for tensor, lanes, places in self._touch_global(warp, addresses, size, rows):
            self.memory.tensors[tensor][places] = rows[lanes]
            self.memory.launch[tensor][places] = len(self.memory.waited)

    def _ld(self, parts, operands):
        if parts[1] in ("acquire", "relaxed"):
            return self._look(parts, operands)
        if parts[1] == "param":
            write, place = self._writer(operands[0]), [n for _, n in self.parameters].index(operands[1].strip("[] "))
            return lambda warp, mask: write(warp, self.values[place].astype(TYPES[parts[-1]]), mask)
        space, dtype, address = parts[1], TYPES[parts[-1]], self._address(operands[1])
        writers, width = [self._writer(name) for name in self._list(operands[0])], np.dtype(dtype).itemsize
        size = width * len(writers)

        def step(warp, mask):
            if not mask.any():
                return
            at = address(warp)[mask]
            assert (at % size == 0).all(), "a load is not aligned"
            columns = np.ascontiguousarray(self._gather(warp, space, at, size)).view(dtype)
            for i, write in enumerate(writers):
                value = np.zeros(32, dtype)
                value[mask] = columns[:, i]
                write(warp, value, mask)

        return step

    def _st(self, parts, operands):
        space, kind, address = parts[1], parts[-1], self._address(operands[0])
        readers = [self._reader(name, kind) for name in self._list(operands[1])]

        def step(warp, mask):
            if not mask.any():
                return
            columns = np.stack([read(warp)[mask] for read in readers], 1)
            rows = np.ascontiguousarray(columns).view(np.uint8)
            at = address(warp)[mask]
            assert (at % rows.shape[1] == 0).all(), "a store is not aligned"
            self._scatter(warp, space, at, rows)

        return step

    def _cp(self, parts, operands):
        if parts[2] == "commit_group":

            def commit(warp, mask):
                warp.groups.append(warp.open_group)
                warp.open_group = []

            return commit
        if parts[2] == "wait_group":

            def wait(warp, mask):
                while len(warp.groups) > int(operands[0]):
                    for land in warp.groups.pop(0):
                        land()

            return wait
        target, source, size = self._address(operands[0]), self._address(operands[1]), int(operands[2], 0)
        read = self._reader(operands[3], "u32") if len(operands) > 3 else None

        def copy(warp, mask):
            to, block = target(warp)[mask], warp.block
            valid = read(warp)[mask].astype(int) if read else np.full(mask.sum(), size)
            rows = np.zeros((mask.sum(), size), np.uint8)
            rows[valid > 0] = self._gather(warp, "global", source(warp)[mask][valid > 0], size)
            rows[np.arange(size)[None] >= valid[:, None]] = 0
            places = self._touch_shared(warp, to, size, np.zeros((len(to), size), np.int64) - 1)  # differs from any
            block.pending[places] = True

            def land():
                block.pending[places] = False
                self._scatter(warp, "shared", to, rows)
                block.fences.clear(places)

            warp.open_group.append(land)

        return copy

    # Exchange between lanes, and matrices.

    def _shfl(self, parts, operands):
        write, value, other = (
            self._writer(operands[0]),
            self._reader(operands[1], "b32"),
            self._reader(operands[2], "u32"),
        )
        if parts[2] == "bfly":
            return lambda warp, mask: write(warp, value(warp)[LANES ^ other(warp).astype(int)], mask)
        assert parts[2] == "idx"
        return lambda warp, mask: write(warp, value(warp)[other(warp).astype(int) & 31], mask)

    def _redux(self, parts, operands):
        write, value = self._writer(operands[0]), self._reader(operands[1], parts[-1])
        reduce = {"min": np.min, "max": np.max, "add": np.sum}[parts[2]]
        return lambda warp, mask: write(warp, np.full(32, reduce(value(warp))), mask)

    def _matrix_rows(self, warp, addresses, matrix, data=None):
        return self._touch_shared(warp, addresses[8 * matrix : 8 * matrix + 8], 16, data)

    def _ldmatrix(self, parts, operands):
        address, writers = self._address(operands[1]), [self._writer(name) for name in self._list(operands[0])]

        def step(warp, mask):
            at = address(warp)
            for i, write in enumerate(writers):
                matrix = np.ascontiguousarray(warp.block.shared[self._matrix_rows(warp, at, i)]).view(np.uint16)
                if "trans" in parts:
                    matrix = matrix.T
                low, high = (matrix[LANES // 4, 2 * (LANES % 4) + k].astype(np.uint32) for k in (0, 1))
                write(warp, low | high << np.uint32(16), mask)

        return step

    def _stmatrix(self, parts, operands):
        address, readers = self._address(operands[0]), [self._reader(name, "b32") for name in self._list(operands[1])]

        def step(warp, mask):
            at = address(warp)
            for i, read in enumerate(readers):
                value, matrix = read(warp), np.zeros((8, 8), np.uint16)
                matrix[LANES // 4, 2 * (LANES % 4)] = value & np.uint32(0xFFFF)
                matrix[LANES // 4, 2 * (LANES % 4) + 1] = value >> np.uint32(16)
                if "trans" in parts:
                    matrix = matrix.T
                rows = np.ascontiguousarray(matrix).view(np.uint8).reshape(8, 16)
                places = self._matrix_rows(warp, at, i, rows)
                warp.block.shared[places] = rows
                warp.block.fences.write(places, warp.number)

        return step

    def _mma(self, parts, operands):
        """D = A B + C for A (16, N) and B (N, 8): N = 16 in 16 bits, 8 in tf32; the sum in float32, rounded once."""
        kind, shape = parts[-2], next(part for part in parts if part.startswith("m16n8"))
        if (shape, kind) not in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")):
            raise NotImplementedError(".".join(parts))
        writers = [self._writer(name) for name in self._list(operands[0])]
        a, b = ([self._reader(name, "b32") for name in self._list(text)] for text in operands[1:3])
        c = [self._reader(name, "f32") for name in self._list(operands[3])]
        group, thread = LANES // 4, LANES % 4

        def numbers(bits):
            """A register's numbers: one in tf32, whose 13 low bits do not count; else two."""
            if kind == "tf32":
                return [(bits & np.uint32(0xFFFFE000)).view(np.float32)]
            if kind == "f16":
                pair = bits.astype(np.uint32).view(np.float16)
                return [pair[0::2], pair[1::2]]
            return [(bits << np.uint32(16)).view(np.float32), (bits & np.uint32(0xFFFF0000)).view(np.float32)]

        each = 1 if kind == "tf32" else 2
        width = 8 * each

        def step(warp, mask):
            left, right, total = np.zeros((16, width)), np.zeros((width, 8)), np.zeros((16, 8))
            for i, read in enumerate(a):
                for j, value in enumerate(numbers(read(warp))):
                    left[group + 8 * (i % 2), each * thread + j + 4 * each * (i // 2)] = value
            for i, read in enumerate(b):
                for j, value in enumerate(numbers(read(warp))):
                    right[each * thread + j + 4 * each * i, group] = value
            for i, read in enumerate(c):
                total[group + 8 * (i // 2), 2 * thread + i % 2] = read(warp)
            total = (left @ right + total).astype(np.float32)
            for i, write in enumerate(writers):
                write(warp, total[group + 8 * (i // 2), 2 * thread + i % 2], mask)

        return step

    # Everything that a lane does by itself.

    def _mov(self, parts, operands):
        target, source = operands
        if source.startswith("{") or target.startswith("{"):
            width = {"b32": 16, "b64": 32}[parts[-1]]
            half = {16: "b16", 32: "b32"}[width]
            if source.startswith("{"):
                write, (low, high) = self._writer(target), (self._reader(x, half) for x in self._list(source))
                return lambda warp, mask: write(
                    warp, low(warp).astype(np.uint64) | high(warp).astype(np.uint64) << np.uint64(width), mask
                )
            writers, read = [self._writer(x) for x in self._list(target)], self._reader(source, parts[-1])

            def unpack(warp, mask):
                bits = read(warp).astype(np.uint64)
                for i, write in enumerate(writers):
                    write(warp, bits >> np.uint64(i * width) & np.uint64((1 << width) - 1), mask)

            return unpack
        write, read = self._writer(target), self._reader(source, parts[-1])
        return lambda warp, mask: write(warp, read(warp), mask)

    def _cvt(self, parts, operands):
        write, source, target = self._writer(operands[0]), parts[-1], parts[-2]
        reads = [self._reader(operand, source) for operand in operands[1:]]
        if target in ("bf16", "f16", "bf16x2", "f16x2"):
            narrow = to_bf16 if target.startswith("b") else to_f16
            if target.endswith("x2"):
                return lambda warp, mask: write(
                    warp, narrow(reads[0](warp)).astype(np.uint32) << np.uint32(16) | narrow(reads[1](warp)), mask
                )
            return lambda warp, mask: write(warp, narrow(reads[0](warp)), mask)
        if source == "bf16":
            return lambda warp, mask: write(warp, (reads[0](warp).astype(np.uint32) << np.uint32(16)).view("f4"), mask)
        if "rpi" in parts:
            return lambda warp, mask: write(warp, np.ceil(reads[0](warp)), mask)
        return lambda warp, mask: write(warp, reads[0](warp).astype(TYPES[target]), mask)

    def _setp(self, parts, operands):
        write = self._writer(operands[0])
        a, b = (self._reader(operand, parts[-1]) for operand in operands[1:3])
        name, real = parts[1], parts[-1] in ("f32", "f16")
        compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                   "ge": np.greater_equal}  # fmt: skip

        def step(warp, mask):
            x, y = a(warp), b(warp)
            apart = np.isnan(x) | np.isnan(y) if real else np.zeros(32, bool)
            if name in ("nan", "num"):
                write(warp, apart if name == "nan" else ~apart, mask)
            else:
                unordered = real and len(name) == 3  # "leu": true where either is NaN
                result = compare[name[:2]](x, y)
                write(warp, result | apart if unordered else result & ~apart, mask)

        return step

    def _selp(self, parts, operands):
        write, test = self._writer(operands[0]), self._reader(operands[3], "pred")
        a, b = (self._reader(operand, parts[-1]) for operand in operands[1:3])
        return lambda warp, mask: write(warp, np.where(test(warp), a(warp), b(warp)), mask)

    def _abs(self, parts, operands):
        if parts[-1] not in ("bf16", "f16"):
            return self._arithmetic(parts, operands)
        write, read = self._writer(operands[0]), self._reader(operands[1], "b16")
        return lambda warp, mask: write(warp, read(warp) & np.uint16(0x7FFF), mask)

    def _bfe(self, parts, operands):
        write, read = self._writer(operands[0]), self._reader(operands[1], "u32")
        start, length = int(operands[2], 0), int(operands[3], 0)

        def step(warp, mask):
            bits = read(warp).astype(np.int64) >> start & (1 << length) - 1
            if parts[-1] == "s32":
                bits = np.where(bits >> length - 1, bits - (1 << length), bits)
            write(warp, bits.astype(np.int32), mask)

        return step

    def _arithmetic(self, parts, operands):
        kind, name = parts[-1], parts[0]
        write = self._writer(operands[0])
        if name in ("mul", "mad") and parts[1] == "wide":
            long = {"s32": np.int64, "u32": np.uint64}[kind]
            a, b = (self._reader(operand, kind) for operand in operands[1:3])
            c = self._reader(operands[3], "b64") if name == "mad" else None

            def widen(warp, mask):
                product = (a(warp).astype(long) * b(warp).astype(long)).view(np.uint64)
                write(warp, product + c(warp) if c else product, mask)

            return widen
        if parts[:2] == ["mul", "hi"] and kind in ("s32", "u32"):
            long = {"s32": np.int64, "u32": np.uint64}[kind]
            a, b = (self._reader(operand, kind) for operand in operands[1:3])
            return lambda warp, mask: write(warp, (a(warp).astype(long) * b(warp).astype(long)) >> long(32), mask)
        if {"hi", "sat", "cc"} & {*parts}:
            raise NotImplementedError(".".join(parts))
        if name in ("shl", "shr"):
            a, b = self._reader(operands[1], kind), self._reader(operands[2], "u32")

            def shift(warp, mask):
                x = a(warp)
                n = b(warp).astype(x.dtype)
                write(warp, x << n if name == "shl" else x >> n, mask)

            return shift
        compute = {
            "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
            "mad": lambda x, y, z: x * y + z, "fma": fma, "neg": lambda x: -x, "not": np.invert,
            "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "div": divide, "rem": np.fmod,
            "max": np.fmax if kind == "f32" and "NaN" not in parts else np.maximum,
            "min": np.fmin if kind == "f32" and "NaN" not in parts else np.minimum,
        }  # fmt: skip
        if name not in compute or kind not in TYPES or kind == "bf16":
            raise NotImplementedError(".".join(parts))
        reads = [self._reader(operand, kind) for operand in operands[1:]]
        clamp = "relu" in parts
        if kind == "f32x2":  # two float32 numbers in 64 bits

            def both(warp, mask):
                pairs = (np.ascontiguousarray(read(warp)).view(np.float32) for read in reads)
                write(warp, np.asarray(compute[name](*pairs), np.float32).view(np.uint64), mask)

            return both

        def step(warp, mask):
            value = compute[name](*(read(warp) for read in reads))
            write(warp, np.maximum(value, 0) if clamp else value, mask)

        return step


def to_bf16(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 numbers, rounded to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), 0x7FFF, rounded >> np.uint32(16)).astype(np.uint16)


def to_f16(x: np.ndarray) -> np.ndarray:
    """float16 bits of float32 numbers, rounded to nearest even."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) * y + z).astype(np.float32)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "f":
        return x / y
    y = np.where(y == 0, 1, y)
    quotient = x // y
    return (quotient + ((quotient < 0) & (quotient * y != x))).astype(x.dtype)  # towards zero
