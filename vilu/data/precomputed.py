"""Embeddings that another program made: .npz, .safetensors, .parquet, or a folder of .npy files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vilu.class_set import check_names, read_names
from vilu.data.source import check_text
from vilu.data.tables import first_line, open_parquet
from vilu.embeddings import BLOCK, EmbeddedSet, Embeddings
from vilu.errors import UserError

UNIT = 1e-3  # largest distance of a norm from 1 at which rows are used as they are; float16 is not more exact
NAMES = ("image_embedding", "text_embeddings", "labels", "class_names", "logit_scale")


def load_embeddings(path: Path) -> EmbeddedSet:
    """Read embeddings of images, and of their classes or captions.

    A closed set has image_embedding (N, D), text_embeddings (K, D) and labels (N,). Captions have image_embedding
    (N, D) and text_embeddings (N, D), and no labels. class_names (K strings) and logit_scale (a number, 100 by default)
    are optional.

    .npz: arrays of these names.
    Folder: one NAME.npy file each, which is mapped from disk. class_names.txt may hold the class names.
    .safetensors: tensors of these names. The metadata holds class_names (a JSON list) and logit_scale.
    .parquet: for captions, list columns image_embedding and text_embeddings. For a closed set, the columns
        image_embedding and labels, and a second file STEM.text.parquet with text_embeddings and class_names.

    If any row's norm is not 1, all rows are normalised. Nothing is unpickled.

    Raises:
        UserError: the path is not such a file or folder, an array is missing or has another shape, or a row is zero or
            not finite.
    """
    check_text(str(path))
    suffix = path.suffix.lower()
    if path.is_dir():
        found = _folder(path)
    elif not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    elif suffix == ".npz":
        found = _npz(path)
    elif suffix == ".safetensors":
        found = _safetensors(path)
    elif suffix == ".parquet":
        found = _parquet(path)
    else:
        raise UserError(f"{path}: embeddings are read from .npz, .safetensors, .parquet or a folder of .npy")
    for name in ("image_embedding", "text_embeddings"):
        if name not in found:
            raise UserError(f"{path}: holds no {name}, only {', '.join(sorted(found)) or 'nothing'}")
    labels, names = _labels(path, found.get("labels")), _names(path, found.get("class_names"))
    v = _unit(path, "image_embedding", found["image_embedding"])
    t = _unit(path, "text_embeddings", found["text_embeddings"])
    if labels is None and len(t) != len(v):
        raise UserError(
            f"{path}: holds no labels, so text_embeddings must be the captions of the {len(v)} images, but has "
            f"{len(t)} rows"
        )
    if labels is not None and len(t) < 2:
        raise UserError(f"{path}: needs at least two classes, text_embeddings has one row")
    return EmbeddedSet(
        path.stem, Embeddings(v), Embeddings(t), labels, names, _scale(path, found.get("logit_scale", 100.0))
    )


def _unit(path: Path, name: str, array: np.ndarray) -> Tensor:
    """Return rows (N, D) of norm 1: the array itself if its rows have norm 1, else a float32 copy."""
    if array.ndim != 2 or array.dtype.kind not in "fiu" or 0 in array.shape:
        raise UserError(f"{path}: {name} must be numbers, (rows, width), got {array.dtype} {array.shape}")
    norms = np.empty(len(array))
    for i in range(0, len(array), BLOCK):
        with np.errstate(over="ignore"):
            norms[i : i + BLOCK] = np.linalg.norm(array[i : i + BLOCK].astype(np.float64), axis=1)
    # A row cannot be normalised exactly where its norm is zero, infinite or NaN.
    bad = ~np.isfinite(norms) | (norms == 0)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{path}: {name} row {row} is {'zero' if norms[row] == 0 else 'not finite'}")
    if array.dtype in (np.float16, np.float32) and array.dtype.isnative and np.abs(norms - 1).max() < UNIT:
        return torch.from_numpy(array)
    unit = np.empty(array.shape, np.float32)
    for i in range(0, len(array), BLOCK):
        unit[i : i + BLOCK] = array[i : i + BLOCK].astype(np.float64) / norms[i : i + BLOCK, None]
    return torch.from_numpy(unit)


def _labels(path: Path, array: np.ndarray | None) -> Tensor | None:
    if array is None:
        return None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{path}: labels must be integers, (N,), got {array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.int64))


def _names(path: Path, names: Iterable[Any] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    found = tuple(np.asarray(names).tolist() if isinstance(names, np.ndarray) else names)
    if not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: class_names must be strings")
    check_names(found, str(path))
    return found


def _scale(path: Path, value: Any) -> float:
    try:
        scale = float(np.asarray(value).reshape(()))
    except (ValueError, TypeError):
        scale = math.nan
    if not 0 < scale < math.inf:
        raise UserError(f"{path}: logit_scale must be one positive number, got {value!r}")
    if abs(scale - math.log(100)) < 0.01:  # what CLIP's own parameter of this name holds
        raise UserError(f"{path}: logit_scale {scale:g} is the logarithm of the factor; give the factor, 100")
    return scale


def _folder(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NAMES:
        file = path / f"{name}.npy"
        if file.is_file():
            try:
                found[name] = np.load(file, mmap_mode="c", allow_pickle=False)
            except Exception as error:  # NumPy raises many types on damaged headers; the user gets one message for all
                raise UserError(f"{file}: cannot be read as an array ({first_line(error)})") from None
    if (path / "class_names.txt").is_file():
        found["class_names"] = read_names(path / "class_names.txt")
    return found


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in NAMES if name in file.files}
    except Exception as error:  # NumPy and zipfile raise many types on damaged files
        objects = "; class_names must be np.array(names, dtype=str)" if "Object arrays" in str(error) else ""
        raise UserError(f"{path}: cannot be read as .npz ({first_line(error)}){objects}") from None


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    found: dict[str, Any] = {}
    try:
        with safe_open(path, "pt") as file:
            for name in set(NAMES) & set(file.keys()):
                tensor = file.get_tensor(name)
                # NumPy has no bfloat16.
                found[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            metadata: Mapping[str, str] = file.metadata() or {}
        if "class_names" in metadata:
            found["class_names"] = _json_list(path, metadata["class_names"])
        if "logit_scale" in metadata:
            found["logit_scale"] = metadata["logit_scale"]
    except UserError:
        raise
    except Exception as error:  # safetensors and json raise many types on damaged files
        raise UserError(f"{path}: cannot be read as .safetensors ({first_line(error)})") from None
    return found


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise UserError(f"{path}: class_names in the metadata must be a JSON list")
    return found


def _parquet(path: Path) -> dict[str, Any]:
    found = _columns(path)
    beside = path.with_name(f"{path.stem}.text.parquet")
    if "labels" in found and beside.is_file():
        found |= {name: value for name, value in _columns(beside).items() if name in ("text_embeddings", "class_names")}
    return found


def _columns(path: Path) -> dict[str, Any]:
    file = open_parquet(path)
    names = [name for name in NAMES[:4] if name in file.schema_arrow.names]
    try:
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for batch in file.iter_batches(columns=names):
            for name in names:
                column = batch.column(batch.schema.get_field_index(name))
                if column.null_count:
                    raise UserError(f"{path}: {name} has empty cells")
                if name.endswith(("embedding", "embeddings")):
                    values = column.flatten().to_numpy(zero_copy_only=False)
                    if len(column) and values.size % len(column):
                        raise UserError(f"{path}: {name} has rows of different widths")
                    widths = set(column.value_lengths().to_pylist()) if hasattr(column, "value_lengths") else {0}
                    if len(widths) > 1:
                        raise UserError(f"{path}: {name} has rows of different widths")
                    parts[name].append(values.reshape(len(column), -1))
                else:
                    parts[name].append(np.array(column.to_pylist()))
        return {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}
    except UserError:
        raise
    except Exception as error:  # Arrow raises many types on damaged files
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None
