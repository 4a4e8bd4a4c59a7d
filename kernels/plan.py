"""Which kernels run for a shape, and with what settings: plain Python, shared by PyTorch's launcher and the cubins'.

    project        u and the image's share of the first layer (attention.py)
    attend_image   one image a program (attention.py); float32 with few images, and class sets per image
    attend_tile    a tile of images a program (tile_attention.py)
    attend_few     the same kernel with settings for up to 16 images; float32 has more than MAX_FEW there
    score_tile     large batches over large class sets, 16-bit, where the compute capability has settings for it: the
    sum_tile       attention as two products (large_batch.py)
    tail           merge the splits, CLIP's scores, the MLP (mlp.py)

`project` and `tail` have a second form, `..._few`, for up to MAX_FEW images; `project_large` is for `score_tile`.

tuning.json holds a list of settings for each compute capability and role; the first entry whose conditions hold is
taken, else one of "default". `python bench/head.py --tune` measures them on a GPU; nothing is tuned while serving.

    bytes, width       conditions: bytes of an element; the widest of D and the attention's values, at most
    projected, folded  conditions: projections or none; the folded layout or the plain one
    from               where the settings come from: the GPU, time, commit and date of a measurement, or "not timed"
    TILE, BLOCK_*      tile sizes; CHUNK, LOW and RESIDENT too are explained in the kernels
    SLICES             of BLOCK_D, one in each warp: see `slices` in softmax_state.py
    STAGES             loads in flight
    num_warps          warps of a program
    waves              programs aimed at, in units of the multiprocessors
    images, classes    the smallest batch and class set that `score_tile` takes
"""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Numbers of a softmax state in scratch (softmax_state.py).
STATE_SLOTS = ("max", "rest", "squares", "entropy", "best", "index", "attention_max", "attention_sum")
ROLES = (
    "project", "project_few", "attend_image", "attend_few", "attend_tile", "score_tile", "sum_tile", "tail", "tail_few",
)  # fmt: skip
MAX_FEW = 8
MAX_SPLITS = 256
MAX_WEIGHTS = 256 << 20  # bytes of scratch for the weights of `score_tile`; beyond, `attend_tile` runs
COUNTERS = 32  # of an image in scratch, one for each stage of `tail`: as many layers an MLP may have


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
    def first_layer_in_combine(self) -> bool:
        """Whether the first hidden layer needs no product after the attention."""
        return self.folded or self.parts == ("image",)

    @property
    def needs_query(self) -> bool:
        """Whether u = query_map v has to be formed for every image."""
        return "attended" in self.parts and self.projected and not self.folded

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
    """One launch.

    name: unique among the kernels of a variant; the cubin's name.
    function: the kernel's name in `fused.KERNELS`.
    constants: its compile-time arguments.
    """

    name: str
    function: str
    grid: tuple[int, ...]
    num_warps: int
    constants: tuple[tuple[str, Any], ...]

    @property
    def registers(self) -> int:
        """Registers a thread may use. By default ptxas stops at 128 to fit a second block, and spills to get there."""
        return min(255, (1 << 16) // (32 * self.num_warps))

    @property
    def waits(self) -> bool:
        """Whether it is compiled for programmatic dependent launch."""
        return bool(dict(self.constants)["PDL"])


@dataclass(frozen=True)
class Plan:
    """The launches for a batch, in order.

    splits: programs that share an image's rows.
    scratch: float32 numbers of scratch memory in all.
    regions: where each intermediate value starts in it, a multiple of 16: state, sums, u, hidden, t_pred, z, odds, h,
        counters, x, weights, bases of the kernels.
    """

    kernels: tuple[Kernel, ...]
    splits: int
    scratch: int
    regions: tuple[tuple[str, int], ...]


Settings = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]  # of each role, hashable
CONDITIONS = ("bytes", "width", "projected", "folded")
NO_CONSTANTS = ("num_warps", "waves", "images", "classes")
SOURCE = "from"  # of an entry in tuning.json: where its settings come from


@functools.cache
def tuned(arch: int, variant: Variant) -> Settings:
    """Settings of every role: the first entry that fits, of that compute capability or else of the default."""
    table = json.loads((Path(__file__).parent / "tuning.json").read_text("utf-8"))
    found = {}
    for role in ROLES:
        entries = table.get(str(arch), {}).get(role, []) + table["default"].get(role, [])
        chosen = next((entry for entry in entries if _fits(entry, variant)), None)
        if chosen is not None:
            found[role] = tuple((key, chosen[key]) for key in sorted(chosen) if key not in (*CONDITIONS, SOURCE))
    return tuple(found.items())


def _fits(entry: dict[str, Any], variant: Variant) -> bool:
    return (
        entry.get("bytes", variant.itemsize) == variant.itemsize
        and max(variant.dim, variant.value_dim) <= entry.get("width", variant.dim + variant.value_dim)
        and entry.get("projected", variant.projected) == variant.projected
        and entry.get("folded", variant.folded) == variant.folded
    )


@functools.lru_cache(maxsize=4096)
def plan_launches(
    variant: Variant,
    B: int,
    K: int,
    *,
    ragged: bool,
    settings: Settings,
    multiprocessors: int,
    shared_softmax: bool,
    pdl: bool,
) -> Plan:
    """The launches for B images over K rows. pdl: the GPU has programmatic dependent launch (9.0 and later)."""
    chosen = {role: dict(entries) for role, entries in settings}
    large = not ragged and _is_large(variant, chosen, B, K)
    role = "score_tile" if large else _attention_role(variant, B, ragged)
    if role == "attend_image":
        tiles, block = B, max(chosen[role]["TILE"] // _power(max(variant.dim, variant.value_dim)), 1)
        # Split the same way for 1 and 8 images: an answer does not depend on the batch it came in.
        aim, rows = multiprocessors * chosen[role]["waves"], K
        if ragged:
            aim, rows = -(-aim // B), -(-K // B)
    else:
        tiles, block, rows = -(-B // chosen[role]["BLOCK_M"]), chosen[role]["BLOCK_N"], K
        tiles *= 1 + large  # v and u have programs of their own
        aim = multiprocessors * chosen[role]["waves"] // tiles
    splits = max(1, min(aim, -(-rows // block), MAX_SPLITS))
    few = "_few" if B <= MAX_FEW else ""
    made = {kernel.name: kernel for kernel in all_kernels(variant, settings, shared_softmax=shared_softmax, pdl=pdl)}
    suffix = "_ragged" if ragged else ""
    names = [f"project{few}", role + ("_ragged" if role == "attend_image" and ragged else ""), f"tail{few}{suffix}"]
    if large:
        names = ["project_large", "score_tile", "sum_tile", "tail"]
    kernels = []
    for name in names:
        if name not in made:  # nothing to project
            continue
        kernel, constants = made[name], dict(made[name].constants)
        images = -(-B // constants.get("BLOCK_M", 1))
        if kernel.function == "project":
            outputs = (
                variant.dim * large, variant.dim * constants["QUERY"], variant.widths[0] * constants["IMAGE"]
            )  # fmt: skip
            grid: tuple[int, ...] = (images, sum(-(-n // constants["BLOCK_N"]) for n in outputs))
        elif kernel.function == "tail":
            grid = (images, constants["STARTS"][-1])
        elif kernel.function == "sum_tile":
            grid = (images * -(-variant.value_dim // constants["BLOCK_N"]), splits)
        else:
            grid = (tiles, splits)
        kernels.append(replace(kernel, grid=grid))
    sizes = {
        "state": B * splits * len(STATE_SLOTS),
        "sums": B * splits * aligned(variant.value_dim),
        "u": B * aligned(variant.dim) * (variant.needs_query and not large),
        "hidden": B * aligned(variant.widths[0]),
        "t_pred": B * aligned(variant.dim) * (not variant.first_layer_in_combine),
        "z": B * aligned(variant.dim) * (not variant.first_layer_in_combine),
        "odds": B,
        "h": B * _places(variant.widths)[-1],
        "counters": B * COUNTERS,
    }
    # Of 16-bit numbers, two in each of float32, for whole tiles of images and of the class set.
    images, columns = tiles // 2 * chosen[role].get("BLOCK_M", 0) * large, -(-K // block)
    sizes |= {"x": images * aligned(variant.dim), "weights": images * columns * block // 2, "bases": images * columns}
    regions, scratch = [], 0
    for name, size in sizes.items():
        regions.append((name, scratch))
        scratch += aligned(size)
    return Plan(tuple(kernels), splits, scratch, tuple(regions))


def _is_large(variant: Variant, chosen: dict[str, dict[str, int]], B: int, K: int) -> bool:
    """Whether the attention runs as `score_tile` and `sum_tile`."""
    if not _has_large_kernels(variant, chosen):
        return False
    mine = chosen["score_tile"]
    images, classes = (-(-n // mine[block]) * mine[block] for n, block in ((B, "BLOCK_M"), (K, "BLOCK_N")))
    return mine["images"] <= B and mine["classes"] <= K and 2 * images * classes <= MAX_WEIGHTS


def _has_large_kernels(variant: Variant, chosen: dict[str, dict[str, int]]) -> bool:
    return "score_tile" in chosen and "attended" in variant.parts and variant.itemsize == 2


def _attention_role(variant: Variant, B: int, ragged: bool) -> str:
    if ragged:
        return "attend_image"
    if variant.itemsize == 4 and B <= MAX_FEW:
        return "attend_image"
    return "attend_few" if B <= 16 else "attend_tile"


def _starts(variant: Variant, constants: dict[str, int]) -> tuple[int, ...]:
    """The number of the first program of every stage of `tail`, and of all programs at the end."""
    first = variant.first_layer_in_combine
    columns = variant.widths[0] if first else variant.dim
    programs = [constants["BLOCK_M"] * (1 + -(-columns // constants["CHUNK"]))]
    programs += [-(-width // constants["BLOCK_N"]) for width in variant.widths[1 if first else 0 :]]
    assert len(programs) <= COUNTERS, f"an MLP of more than {COUNTERS - 1} layers"
    return tuple(itertools.accumulate(programs, initial=0))


def _places(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Where each hidden layer's outputs start in a row of h, and the length of the row."""
    return tuple(itertools.accumulate(map(aligned, widths[:-1]), initial=0))


@functools.lru_cache(maxsize=256)
def all_kernels(variant: Variant, settings: Settings, *, shared_softmax: bool, pdl: bool) -> tuple[Kernel, ...]:
    """Every kernel that a plan of this variant may launch, in order, its grid left open."""
    chosen = {role: dict(entries) for role, entries in settings}
    image, predicted, attended = (part in variant.parts for part in ("image", "predicted", "attended"))
    dim, widths, at = variant.dim, variant.widths, variant.packed_offsets
    made: list[Kernel] = []

    def add(name: str, function: str, role: str, **constants: Any) -> None:
        if role in chosen:
            mine = {key: value for key, value in chosen[role].items() if key not in NO_CONSTANTS}
            constants |= mine | {"PDL": pdl}
            warps = chosen[role]["num_warps"]
            made.append(Kernel(name, function, (), warps, tuple(sorted(constants.items()))))

    large = _has_large_kernels(variant, chosen)
    both = ("", "_few")
    for few in both:
        # With few images `tail` forms the image's share itself, and in the plain layout it always does.
        share = image and variant.first_layer_in_combine and not few
        if share or variant.needs_query:
            add(
                f"project{few}", "project", f"project{few}", D=dim, H=widths[0], OFFSETS=at, IMAGE=share,
                QUERY=variant.needs_query, ROWS=0,
            )  # fmt: skip
    if large:
        rows = chosen["score_tile"]["BLOCK_M"]
        add(
            "project_large", "project", "project", D=dim, H=widths[0], OFFSETS=at,
            IMAGE=image and variant.first_layer_in_combine, QUERY=variant.needs_query, ROWS=rows,
        )  # fmt: skip
    shape: dict[str, Any] = {"D": dim, "W": variant.value_dim, "ATTENDED": attended, "PROJECTED": variant.projected}
    shape["FOLDED"] = variant.folded
    for suffix in ("", "_ragged") if variant.itemsize == 4 else ("_ragged",):
        add(f"attend_image{suffix}", "attend_image", "attend_image", RAGGED=bool(suffix), **shape)
    for role in ("attend_few", "attend_tile"):
        add(role, "attend_tile", role, SHARED_SOFTMAX=shared_softmax, **shape)
    if large:
        add("score_tile", "score_tile", "score_tile", D=dim, PROJECTED=variant.projected, FOLDED=variant.folded)
        tile = chosen["score_tile"]["BLOCK_N"]
        add("sum_tile", "sum_tile", "sum_tile", W=variant.value_dim, FOLDED=variant.folded, TILE=tile, ROWS=rows)
    for few, suffix in itertools.product(both, ("", "_ragged")):
        add(
            f"tail{few}{suffix}", "tail", f"tail{few}", D=dim, WIDTHS=widths, OFFSETS=at, IMAGE=image,
            PREDICTED=predicted, ATTENDED=attended, FIRST_LAYER=variant.first_layer_in_combine, RAGGED=bool(suffix),
            MAX_SPLITS=MAX_SPLITS, STARTS=_starts(variant, chosen[f"tail{few}"]), PLACES=_places(widths),
        )  # fmt: skip
    return tuple(made)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def aligned(n: int) -> int:
    """n rounded up to a multiple of 16. Rows of n numbers lie so far apart in scratch, for loads of 128 bits."""
    return -(-n // 16) * 16


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
