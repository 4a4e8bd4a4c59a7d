"""Which kernels run for a shape, and with what settings: plain Python, shared by PyTorch's launcher and the cubins'.

    project        u and the image's share of the first layer (attention.py)
    attend_image   one image a program; float32 with few images, and class sets per image
    attend_few     a tile of 16 images; up to 16 images, in float32 more than MAX_FEW
    attend_tile    larger tiles of images
    combine        merge the splits, write CLIP's scores (mlp.py)
    mlp_layer      a hidden layer
    mlp_output     P(failure); in 16 bits and for more than MAX_FEW images the last hidden layer too

All but the attention have a second form, `..._few`, for up to MAX_FEW images.

tuning.json holds a list of settings for each compute capability and role; the first entry whose conditions hold is
taken, else one of "default". `python bench/head.py --tune` measures them on a GPU; nothing is tuned while serving.

    bytes, width       conditions: bytes of an element; the widest of D and the attention's values, at most
    projected, folded  conditions: projections or none; the folded layout or the plain one
    from               where the settings come from: the GPU, time, commit and date of a measurement, or "not timed"
    TILE, BLOCK_*      tile sizes, LOW and RESIDENT: see the kernels
    STAGES             loads in flight
    num_warps          warps of a program
    waves              programs aimed at, in units of the multiprocessors
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
    "project", "project_few", "attend_image", "attend_few", "attend_tile", "combine", "combine_few",
    "mlp_layer", "mlp_layer_few", "mlp_output", "mlp_output_few",
)  # fmt: skip
MAX_FEW = 8
# Up to this many weights in 16 bits, `mlp_output` computes the last hidden layer of a batch too: it saves a launch.
MAX_OUTPUT_WEIGHTS = 1 << 15
MAX_SPLITS = 256


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
    function: the kernel's name in attention.py or mlp.py.
    constants: its compile-time arguments.
    values: (argument, value) for the arguments whose value has another name (see `Plan`).
    """

    name: str
    function: str
    grid: tuple[int, ...]
    num_warps: int
    constants: tuple[tuple[str, Any], ...]
    values: tuple[tuple[str, str], ...] = ()

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
    regions: where each intermediate value starts in it, a multiple of 16: state, sums, u, hidden, t_pred, z, odds,
        h1, h2 ... of the kernels.
    """

    kernels: tuple[Kernel, ...]
    splits: int
    scratch: int
    regions: tuple[tuple[str, int], ...]


Settings = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]  # of each role, hashable
CONDITIONS = ("bytes", "width", "projected", "folded")
SOURCE = "from"  # of an entry in tuning.json: where its settings come from


@functools.cache
def tuned(arch: int, variant: Variant) -> Settings:
    """Settings of every role: the first entry that fits, of that compute capability or else of the default."""
    table = json.loads((Path(__file__).parent / "tuning.json").read_text("utf-8"))
    found = {}
    for role in ROLES:
        entries = table.get(str(arch), {}).get(role, []) + table["default"][role]
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
    role = _attention_role(variant, B, K, ragged)
    if role == "attend_image":
        tiles, block = B, max(chosen[role]["TILE"] // _power(max(variant.dim, variant.value_dim)), 1)
        # Split the same way for 1 and 8 images: an answer does not depend on the batch it came in.
        aim, rows = multiprocessors * chosen[role]["waves"], K
        if ragged:
            aim, rows = -(-aim // B), -(-K // B)
    else:
        tiles, block, rows = -(-B // chosen[role]["BLOCK_M"]), chosen[role]["BLOCK_N"], K
        aim = multiprocessors * chosen[role]["waves"] // tiles
    splits = max(1, min(aim, -(-rows // block), MAX_SPLITS))
    few = "_few" if B <= MAX_FEW else ""
    made = {kernel.name: kernel for kernel in all_kernels(variant, settings, shared_softmax=shared_softmax, pdl=pdl)}
    suffix = "_ragged" if ragged else ""
    names = [f"project{few}", role + ("_ragged" if role == "attend_image" and ragged else ""), f"combine{few}{suffix}"]
    names += [name for name in made if name.startswith("mlp") and name.endswith("_few") == bool(few)]
    kernels = []
    for name in names:
        if name not in made:  # nothing to project
            continue
        kernel, constants = made[name], dict(made[name].constants)
        images = -(-B // constants.get("BLOCK_M", 1))
        if kernel.function == "project":
            outputs = variant.dim * constants["QUERY"], variant.widths[0] * constants["IMAGE"]
            grid: tuple[int, ...] = (images, sum(-(-n // constants["BLOCK_N"]) for n in outputs))
        elif kernel.function == "combine":
            grid = (B, -(-_combined(variant) // constants["CHUNK"]) + 1)
        elif kernel.function == "mlp_layer":
            grid = (images, -(-constants["N_OUT"] // constants["BLOCK_N"]))
        elif kernel.function == "mlp_output":
            grid = (images,)
        else:
            grid = (tiles, splits)
        kernels.append(replace(kernel, grid=grid))
    sizes = {
        "state": B * splits * len(STATE_SLOTS),
        "sums": B * splits * _aligned(variant.value_dim),
        "u": B * _aligned(variant.dim) * variant.needs_query,
        "hidden": B * _aligned(variant.widths[0]),
        "t_pred": B * _aligned(variant.dim) * (not variant.first_layer_in_combine),
        "z": B * _aligned(variant.dim) * (not variant.first_layer_in_combine),
        "odds": B,
    } | {f"h{i + 1}": B * _aligned(width) for i, width in enumerate(variant.widths[:-1])}
    regions, scratch = [], 0
    for name, size in sizes.items():
        regions.append((name, scratch))
        scratch += _aligned(size)
    return Plan(tuple(kernels), splits, scratch, tuple(regions))


def _attention_role(variant: Variant, B: int, K: int, ragged: bool) -> str:
    if ragged:
        return "attend_image"
    if variant.itemsize == 4 and B <= MAX_FEW:
        return "attend_image"
    return "attend_few" if B <= 16 else "attend_tile"


def _combined(variant: Variant) -> int:
    """Columns that `combine` writes for an image."""
    return variant.widths[0] if variant.first_layer_in_combine else variant.dim


@functools.lru_cache(maxsize=256)
def all_kernels(variant: Variant, settings: Settings, *, shared_softmax: bool, pdl: bool) -> tuple[Kernel, ...]:
    """Every kernel that a plan of this variant may launch, in order, its grid left open."""
    chosen = {role: dict(entries) for role, entries in settings}
    image, predicted, attended = (part in variant.parts for part in ("image", "predicted", "attended"))
    dim, widths, at = variant.dim, variant.widths, variant.packed_offsets
    made: list[Kernel] = []

    def add(name: str, function: str, role: str, values: dict[str, str], **constants: Any) -> None:
        if role in chosen:
            mine = {key: value for key, value in chosen[role].items() if key not in ("num_warps", "waves")}
            constants |= mine | {"PDL": pdl}
            warps = chosen[role]["num_warps"]
            made.append(Kernel(name, function, (), warps, tuple(sorted(constants.items())), tuple(values.items())))

    both = ("", "_few")
    if image or variant.needs_query:
        for few in both:
            add(
                f"project{few}", "project", f"project{few}", {}, D=dim, H=widths[0], OFFSETS=at, IMAGE=image,
                QUERY=variant.needs_query,
            )  # fmt: skip
    shape: dict[str, Any] = {"D": dim, "W": variant.value_dim, "ATTENDED": attended, "PROJECTED": variant.projected}
    shape["FOLDED"] = variant.folded
    for suffix in ("", "_ragged") if variant.itemsize == 4 else ("_ragged",):
        add(f"attend_image{suffix}", "attend_image", "attend_image", {}, RAGGED=bool(suffix), **shape)
    for role in ("attend_few", "attend_tile"):
        add(role, "attend_tile", role, {}, SHARED_SOFTMAX=shared_softmax, **shape)
    for few, suffix in itertools.product(both, ("", "_ragged")):
        add(
            f"combine{few}{suffix}", "combine", f"combine{few}", {"y": "h1"}, D=dim, H=widths[0], OFFSETS=at,
            IMAGE=image, PREDICTED=predicted, ATTENDED=attended, FIRST_LAYER=variant.first_layer_in_combine,
            RAGGED=bool(suffix), MAX_SPLITS=MAX_SPLITS,
        )  # fmt: skip
    for few in both:
        if not variant.first_layer_in_combine:
            weights = [at[1]] * predicted + [at[2]] * attended
            inputs = ["t_pred"] * predicted + ["z"] * attended
            add(
                f"mlp_layer1{few}", "mlp_layer", f"mlp_layer{few}", {"x": inputs[0], "x2": inputs[-1], "y": "h1"},
                N_IN=dim, N_OUT=widths[0], WEIGHT=weights[0], WEIGHT2=weights[1] if len(weights) > 1 else None,
                BIAS=None if image else at[3],
            )  # fmt: skip
        hidden = len(widths) - 1
        last = (
            not few
            and variant.itemsize == 2
            and hidden > 1
            and _power(widths[-2]) * _power(widths[-3]) <= MAX_OUTPUT_WEIGHTS
        )
        for i in range(2, hidden + (not last)):
            values = {"x": f"h{i - 1}", "x2": f"h{i - 1}", "y": f"h{i}"}
            add(
                f"mlp_layer{i}{few}", "mlp_layer", f"mlp_layer{few}", values,
                N_IN=widths[i - 2], N_OUT=widths[i - 1], WEIGHT=at[2 * i], WEIGHT2=None, BIAS=at[2 * i + 1],
            )  # fmt: skip
        add(
            f"mlp_output{few}", "mlp_output", f"mlp_output{few}", {"x": f"h{hidden - last}"},
            N_IN=widths[hidden - 1 - last], N_HIDDEN=widths[hidden - 1],
            WEIGHT=at[2 * hidden] if last else None, BIAS=at[2 * hidden + 1] if last else None,
            OUT_WEIGHT=at[2 * hidden + 2], OUT_BIAS=at[2 * hidden + 3],
        )  # fmt: skip
    return tuple(made)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _aligned(n: int) -> int:
    return -(-n // 16) * 16


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
