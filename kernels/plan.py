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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STATE = 8  # numbers of a softmax state in scratch, as in fused.py
MAX_SINGLE_IMAGES = 8
MAX_SPLITS = 256
# A bank beyond this stays out of L2, so that a second image through `attend_image` could read it from memory again.
RESIDENT_BYTES = 1 << 25


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: everything about a folded head but its values and K.

    dim: width D of the embeddings.
    widths: outputs of the MLP's layers, the final 1 included.
    packed_offsets: where each weight starts in `FoldedHead.packed`, in elements.
    parts: what the MLP sees, of "image", "predicted" and "attended".
    projected: the attention has projections.
    folded: the layout is "folded", else "plain".
    itemsize: bytes of a stored element.
    """

    dim: int
    widths: tuple[int, ...]
    packed_offsets: tuple[int, ...]
    parts: tuple[str, ...]
    projected: bool
    folded: bool
    itemsize: int

    @property
    def value_dim(self) -> int:
        """Width of the attention's values: H in the folded layout, D in the plain one."""
        return self.widths[0] if self.folded else self.dim

    @property
    def activations(self) -> int:
        """Numbers that one image's hidden activations take in scratch; each layer starts at a multiple of 16."""
        return sum(_aligned(width) for width in self.widths[:-1])

    def shares_softmax(self, logit_scale: float, attention_scale: float) -> bool:
        """Whether the attention weights equal CLIP's probabilities, so that one softmax serves both."""
        return not self.projected and logit_scale == attention_scale

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def from_json(cls, text: str) -> Variant:
        values: dict[str, Any] = {key: _tuple(value) for key, value in json.loads(text).items()}
        return cls(**values)


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

    def constants(self, variant: Variant, *, ragged: bool, shared_softmax: bool) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        image, predicted, attended = (part in variant.parts for part in ("image", "predicted", "attended"))
        constants: dict[str, Any] = {
            "D": variant.dim, "WIDTHS": variant.widths, "ATTENDED": attended, "FOLDED": variant.folded,
        } | dict(self.settings)  # fmt: skip
        if self.name != "combine":
            constants["PROJECTED"] = variant.projected
        if self.name != "attend_tile":
            constants |= {
                "IMAGE": image,
                "PREDICTED": predicted,
                "HIDDEN": variant.activations,
                "OFFSETS": variant.packed_offsets,
            }
        if self.name == "attend_image":
            constants |= {"RAGGED": ragged, "MAX_SPLITS": MAX_SPLITS}
        if self.name == "attend_tile":
            constants["SHARED_SOFTMAX"] = shared_softmax
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
    for name in ("attend_image", "attend_tile", "combine"):
        entries = table.get(str(arch), {}).get(name, []) + table["default"][name]
        chosen = next(entry for entry in entries if _fits(entry, variant))
        found[name] = tuple((key, chosen[key]) for key in sorted(chosen) if key not in CONDITIONS)
    return tuple(found.items())


CONDITIONS = ("bytes", "width", "projected", "folded")


def _fits(entry: dict[str, Any], variant: Variant) -> bool:
    return (
        entry["bytes"] == variant.itemsize
        and max(variant.dim, variant.value_dim) <= entry.get("width", variant.dim + variant.value_dim)
        and entry.get("projected", variant.projected) == variant.projected
        and entry.get("folded", variant.folded) == variant.folded
    )


@functools.lru_cache(maxsize=4096)
def plan_launches(variant: Variant, B: int, K: int, *, ragged: bool, settings: Settings, multiprocessors: int) -> Plan:
    """The launches for B images over K rows.

    `attend_image` serves ragged class sets and up to 8 images; but where the bank is too large for L2 and the tensor
    cores can read its type, only one: more images share each row they read through `attend_tile`.
    """
    chosen = {name: dict(entries) for name, entries in settings}
    share_reads = B > 1 and variant.itemsize == 2 and K * variant.dim * variant.itemsize > RESIDENT_BYTES
    if ragged or (B <= MAX_SINGLE_IMAGES and not share_reads):
        block = max(chosen["attend_image"]["TILE"] // _power(max(variant.dim, variant.value_dim)), 1)
        # Cut the same way for 1 and 8 images: an answer does not depend on the batch it came in.
        aim = multiprocessors * chosen["attend_image"]["waves"]
        if ragged:
            aim, K = -(-aim // B), -(-K // B)
        splits = max(1, min(aim, -(-K // block), MAX_SPLITS))
        kernels: tuple[Kernel, ...] = (_kernel("attend_image", (B, splits), chosen),)
    else:
        tiles = -(-B // chosen["attend_tile"]["BLOCK_M"])
        aim = multiprocessors * chosen["attend_tile"]["waves"] // tiles
        splits = max(1, min(aim, -(-K // chosen["attend_tile"]["BLOCK_N"]), MAX_SPLITS))
        images = -(-B // chosen["combine"]["BLOCK_M"])
        kernels = (_kernel("attend_tile", (tiles, splits), chosen), _kernel("combine", (images,), chosen))
    numbers = B * (splits * (STATE + _aligned(variant.value_dim)) + variant.activations)
    return Plan(kernels, splits, numbers)


def all_kernels(settings: Settings) -> list[Kernel]:
    """Every kernel as these settings compile it, its grid left open."""
    chosen = {name: dict(entries) for name, entries in settings}
    return [_kernel(name, (), chosen) for name in chosen]


def _kernel(name: str, grid: tuple[int, ...], chosen: dict[str, dict[str, int]]) -> Kernel:
    constants = {key: value for key, value in chosen[name].items() if key not in ("num_warps", "waves")}
    return Kernel(name, grid, chosen[name]["num_warps"], tuple(sorted(constants.items())))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _aligned(n: int) -> int:
    return -(-n // 16) * 16


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
