"""Which kernels run for a shape, with what settings: plain Python, shared by the launcher and the cubin loader.

`tuning.json` holds, for each compute capability and by default, a list of settings per kernel; the first whose
conditions hold is taken. `python bench/head.py --tune` finds them on a GPU; nothing is tuned while serving.

    bytes, width       conditions: bytes of an element; the widest of D and the attention's sums, at most
    projected, folded  conditions: projections or none; a folded bank or a plain one
    TILE, BLOCK_*      tile sizes (see fused.py)
    STAGES             loads in flight
    num_warps          warps of a program
    waves              programs aimed at, in units of the multiprocessors
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE = 8  # numbers of a softmax state in scratch, as in fused.py
SINGLE_MAX_IMAGES = 8
MAX_SPLITS = 256
# A bank beyond this stays out of L2, so that a second image through `single` could read it from memory again.
RESIDENT_BYTES = 1 << 25


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: everything about a folded head but its values and K.

    `widths` are the MLP's outputs with the final 1; `at` the offsets in `FoldedHead.packed`; `itemsize` the
    bytes of a stored element.
    """

    dim: int
    widths: tuple[int, ...]
    at: tuple[int, ...]
    parts: tuple[str, ...]
    projected: bool
    folded: bool
    itemsize: int

    @property
    def sums(self) -> int:
        """Width of the attention's sum."""
        return self.widths[0] if self.folded else self.dim

    @property
    def hidden(self) -> int:
        """Room for one image's activations of every layer, each from a multiple of 16."""
        return sum(_aligned(width) for width in self.widths[:-1])

    def same(self, logit_scale: float, attention_scale: float) -> bool:
        """Whether α is p itself, so that one softmax serves both."""
        return not self.projected and logit_scale == attention_scale


@dataclass(frozen=True)
class Kernel:
    """One launch: name in fused.py, grid, and the settings it is compiled with."""

    name: str
    grid: tuple[int, ...]
    num_warps: int
    settings: tuple[tuple[str, int], ...]

    @property
    def registers(self) -> int:
        """What a thread may use. Left to itself ptxas stops at 128 to fit a second block, and spills to get there."""
        return min(255, (1 << 16) // (32 * self.num_warps))

    def constants(self, variant: Variant, *, ragged: bool, same: bool) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        image, predicted, attended = (part in variant.parts for part in ("image", "predicted", "attended"))
        constants: dict[str, Any] = {
            "D": variant.dim, "WIDTHS": variant.widths, "ATTENDED": attended, "FOLDED": variant.folded,
        } | dict(self.settings)  # fmt: skip
        if self.name != "tail":
            constants["PROJECTED"] = variant.projected
        if self.name != "scan":
            constants |= {"IMAGE": image, "PREDICTED": predicted, "HIDDEN": variant.hidden, "AT": variant.at}
        if self.name == "single":
            constants |= {"RAGGED": ragged, "MAX_SPLITS": MAX_SPLITS}
        if self.name == "scan":
            constants["SAME"] = same
        return constants


@dataclass(frozen=True)
class Plan:
    kernels: tuple[Kernel, ...]
    splits: int
    scratch: int  # float32 numbers


Settings = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]  # of each kernel, hashable


@functools.cache
def tuned(arch: int, variant: Variant) -> Settings:
    """Settings of every kernel: the first entry that fits, of that compute capability or else of the default."""
    table = json.loads((Path(__file__).parent / "tuning.json").read_text("utf-8"))
    found = {}
    for name in ("single", "scan", "tail"):
        entries = table.get(str(arch), {}).get(name, []) + table["default"][name]
        chosen = next(entry for entry in entries if _fits(entry, variant))
        found[name] = tuple((key, chosen[key]) for key in sorted(chosen) if key not in CONDITIONS)
    return tuple(found.items())


CONDITIONS = ("bytes", "width", "projected", "folded")


def _fits(entry: dict[str, Any], variant: Variant) -> bool:
    return (
        entry["bytes"] == variant.itemsize
        and max(variant.dim, variant.sums) <= entry.get("width", variant.dim + variant.sums)
        and entry.get("projected", variant.projected) == variant.projected
        and entry.get("folded", variant.folded) == variant.folded
    )


@functools.lru_cache(maxsize=4096)
def launches(variant: Variant, B: int, K: int, *, ragged: bool, settings: Settings, multiprocessors: int) -> Plan:
    """The launches for B images over K rows.

    `single` serves ragged class sets and up to 8 images; but where the bank is too large for L2 and the tensor
    cores can read its type, only one: more images share each row they read through `scan`.
    """
    chosen = {name: dict(entries) for name, entries in settings}
    crowd = B > 1 and variant.itemsize == 2 and K * variant.dim * variant.itemsize > RESIDENT_BYTES
    if ragged or (B <= SINGLE_MAX_IMAGES and not crowd):
        block = max(chosen["single"]["TILE"] // _power(max(variant.dim, variant.sums)), 1)
        # Cut the same way for 1 and 8 images: an answer does not depend on the batch it came in.
        aim = multiprocessors * chosen["single"]["waves"]
        if ragged:
            aim, K = -(-aim // B), -(-K // B)
        splits = max(1, min(aim, -(-K // block), MAX_SPLITS))
        kernels: tuple[Kernel, ...] = (_kernel("single", (B, splits), chosen),)
    else:
        tiles = -(-B // chosen["scan"]["BLOCK_M"])
        aim = multiprocessors * chosen["scan"]["waves"] // tiles
        splits = max(1, min(aim, -(-K // chosen["scan"]["BLOCK_N"]), MAX_SPLITS))
        images = -(-B // chosen["tail"]["BLOCK_M"])
        kernels = (_kernel("scan", (tiles, splits), chosen), _kernel("tail", (images,), chosen))
    numbers = B * (splits * (STATE + _aligned(variant.sums)) + variant.hidden)
    return Plan(kernels, splits, numbers)


def kernels_of(settings: Settings) -> list[Kernel]:
    """Every kernel as these settings compile it, its grid left open."""
    chosen = {name: dict(entries) for name, entries in settings}
    return [_kernel(name, (), chosen) for name in chosen]


def _kernel(name: str, grid: tuple[int, ...], chosen: dict[str, dict[str, int]]) -> Kernel:
    constants = {key: value for key, value in chosen[name].items() if key not in ("num_warps", "waves")}
    return Kernel(name, grid, chosen[name]["num_warps"], tuple(sorted(constants.items())))


def _aligned(n: int) -> int:
    return -(-n // 16) * 16


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
