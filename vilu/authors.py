"""A safe reader of the authors' `.ckpt` files (github.com/ykrmm/ViLU).

Pickle can run any code. So these files are read with torch's weights-only reader, which allows only the NumPy globals
that they need.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vilu.errors import UserError
from vilu.head import PARTS, ViLUHead

# What the authors' MLP can read, in its order: columns side by side (",") or added up ("+"), by their options concat,
# use_attention and use_predicted_caption.
OFFICIAL_INPUTS = (
    "image",
    "image,predicted",
    "image,attended",
    "image+attended",
    "image+attended,predicted",
    "image,attended,predicted",
)
MAX_OFFICIAL_BYTES = 1 << 30


def _numpy_globals() -> list[Any]:
    """Return the globals that the authors' files need, because their training meters pickle NumPy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return [
        np.dtype,
        *dtypes,
        (scalar, "numpy._core.multiarray.scalar"),
        (scalar, "numpy.core.multiarray.scalar"),
    ]


def read_authors(
    path: Path, keep_frozen: bool, n_iter_freeze_proj: int, logit_scale: float, inputs: str | None
) -> tuple[ViLUHead, dict[str, Any]]:
    """Read a head and what the file says of it. The arguments are those of `vilu.load_checkpoint`.

    Raises:
        UserError: as `vilu.load_checkpoint`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > MAX_OFFICIAL_BYTES:
            raise UserError(f"{path}: unpacks to {size} bytes, over the limit of {MAX_OFFICIAL_BYTES}")
        with torch.serialization.safe_globals(_numpy_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it then refuses
            document = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many types on hostile files; the user gets one message for all
        reason = (
            "it holds objects other than tensors and numbers" if "Unsupported" in str(error) else "damaged or cut short"
        )
        raise UserError(f"{path}: not a checkpoint that can be read safely ({reason})") from None
    state = document.get("state_dict") if isinstance(document, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path}: no state_dict of tensors, so not one of the authors' checkpoints")
    head = _convert_official(path, state, keep_frozen, n_iter_freeze_proj, logit_scale, inputs)
    meta: dict[str, Any] = {"source": "ykrmm/ViLU", "file": path.name}
    if isinstance(document.get("epoch"), int):
        meta["epoch"] = document["epoch"]
    return head, meta


def _official_inputs(
    path: Path, state: dict[str, Tensor], inputs: str | None
) -> tuple[tuple[tuple[str, ...], ...], int]:
    """What each block of columns of the authors' MLP reads (parts that it adds up), and the width of a block."""
    width = state["mlp.0.weight"].shape[1]
    attention = "in_proj_v.weight" in state
    if inputs is not None and inputs not in OFFICIAL_INPUTS:
        raise UserError(f"inputs must be one of {', '.join(OFFICIAL_INPUTS)}, got {inputs!r}")
    if inputs is None and not attention:
        inputs = "image"  # their files do not say whether the MLP also reads t_pred; it does not in the released ones
    if inputs is None:
        dim = state["in_proj_v.weight"].shape[0]
        if width == 2 * dim:
            raise UserError(
                f"{path}: its MLP reads {width} columns beside a {dim}-wide attention, which has two meanings: give "
                "inputs='image,attended' (concat=True) or inputs='image+attended,predicted' (concat=False) to "
                "vilu.load_checkpoint, and save what it returns"
            )
        inputs = {dim: "image+attended", 3 * dim: "image,attended,predicted"}.get(width)
        if inputs is None:
            raise UserError(
                f"{path}: tensor mlp.0.weight reads {width} columns, expected {dim}, {2 * dim} or {3 * dim} beside "
                f"a {dim}-wide in_proj_v"
            )
    blocks = tuple(tuple(block.split("+")) for block in inputs.split(","))
    if ("attended" in inputs) != attention:
        raise UserError(f"{path}: inputs={inputs!r} does not fit: the file has {'an' if attention else 'no'} attention")
    dim = width // len(blocks)
    if dim * len(blocks) != width or (attention and dim != state["in_proj_v.weight"].shape[0]):
        raise UserError(f"{path}: inputs={inputs!r} does not fit an MLP that reads {width} columns")
    return blocks, dim


def _convert_official(
    path: Path,
    state: dict[str, Tensor],
    keep_frozen: bool,
    n_iter_freeze_proj: int,
    logit_scale: float,
    inputs: str | None,
) -> ViLUHead:
    """Convert the authors' state_dict to a ViLUHead that gives the same failure probabilities.

    The authors' logit is high for a *correct* answer, so the last layer changes its sign. Their MLP reads the columns
    in the order [v, z_attn, t_pred], ours reads [v, t_pred, z_attn]. Where theirs reads v + z_attn, ours reads both
    with the same weights.
    """
    depths = sorted(
        int(n.split(".")[1])
        for n in state
        if n.startswith("mlp.") and n.endswith(".weight") and n.split(".")[1].isdigit()
    )
    for name in ("mlp.0.weight", "mlp.0.bias"):
        if name not in state:
            raise UserError(f"{path}: tensor {name} is missing")
    if depths != list(range(0, 2 * len(depths), 2)) or len(depths) < 2:
        raise UserError(f"{path}: the MLP's layers are mlp.{depths}, expected mlp.0, mlp.2, ... and at least two")
    for name in ("in_proj_v.weight", "in_proj_t.weight"):
        if name in state and state[name].ndim != 2:
            raise UserError(f"{path}: tensor {name} has shape {tuple(state[name].shape)}, expected a matrix")
    if state["mlp.0.weight"].ndim != 2:
        raise UserError(
            f"{path}: tensor mlp.0.weight has shape {tuple(state['mlp.0.weight'].shape)}, expected a matrix"
        )
    blocks, dim = _official_inputs(path, state, inputs)
    parts = tuple(part for part in PARTS if any(part in block for block in blocks))
    iterations = state.get("iteration_count")
    if "attended" in parts and (iterations is None or iterations.numel() != 1):
        raise UserError(f"{path}: tensor iteration_count is missing or not one number")
    frozen = iterations is None or keep_frozen or int(iterations.item()) <= n_iter_freeze_proj
    hidden = [state[f"mlp.{i}.weight"].shape[0] for i in depths[:-1]]
    with torch.device("meta"):
        head = ViLUHead(
            dim,
            hidden=hidden,
            parts=parts,
            projection="identity" if frozen else "shared",
            attention_scale=logit_scale,
        )
        shapes = {name: tuple(t.shape) for name, t in head.state_dict().items() if name.startswith("mlp.")}
    shapes["mlp.0.weight"] = (hidden[0], dim * len(blocks))
    if "attended" in parts:
        shapes |= {"in_proj_v.weight": (dim, dim), "in_proj_t.weight": (dim, dim)}
    found = {name: tuple(t.shape) for name, t in state.items() if name != "iteration_count"}
    check_shapes(path, shapes, found)
    check_finite(path, state)

    weights = {name: state[name].detach().float().clone() for name in shapes if name.startswith("mlp.")}
    last = f"mlp.{depths[-1]}"
    for name in (f"{last}.weight", f"{last}.bias"):
        weights[name] = -weights[name]
    columns = weights["mlp.0.weight"].split(dim, dim=1)
    by_part = {part: column for block, column in zip(blocks, columns, strict=True) for part in block}
    weights["mlp.0.weight"] = torch.cat([by_part[part] for part in parts], dim=1)
    if head.projection == "shared":
        weights["query.weight"] = state["in_proj_v.weight"].detach().float().clone()
        weights["key.weight"] = state["in_proj_t.weight"].detach().float().clone()
    head.load_state_dict(weights, assign=True)
    return head.eval().requires_grad_(False)


def check_shapes(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError where a tensor of a file is missing, unexpected or of another shape."""
    for name in sorted(expected.keys() - found.keys()):
        raise UserError(f"{path}: tensor {name} is missing")
    for name in sorted(found.keys() - expected.keys()):
        raise UserError(f"{path}: tensor {name} does not belong to this head")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{path}: tensor {name} has shape {found[name]}, expected {shape}")


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError where a tensor holds a value that is not finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name} holds a value that is not finite")
