"""Image embeddings in a file, as `vilu ask --embeddings` reads them. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vilu.errors import UserError

NAME = "image_embedding"


def read_image_embeddings(path: Path) -> np.ndarray:
    """Read image_embedding (N, D) from a file that `vilu train --embeddings` takes, too; nothing is unpickled.

    .npz: an array of that name. .safetensors: a tensor. .parquet: a column of lists. A file may hold more.

    Raises:
        UserError: not such a file, or it holds no matrix of numbers under that name.
    """
    readers = {".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: embeddings are read from {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        rows = read(path)
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # NumPy, zip, safetensors and Arrow raise many types on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if rows is None:
        raise UserError(f"{path}: holds no {NAME}")
    found = np.asarray(rows)
    if found.ndim != 2 or found.dtype.kind not in "fiu" or 0 in found.shape:
        raise UserError(f"{path}: {NAME} must be numbers, (rows, width), got {found.dtype} {found.shape}")
    return found


def _npz(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as file:
        return file[NAME] if NAME in file.files else None


def _safetensors(path: Path) -> Any:
    from safetensors import deserialize, safe_open

    with safe_open(path, "numpy") as file:
        if NAME not in file.keys():  # noqa: SIM118
            return None
        part = file.get_slice(NAME)
        if part.get_dtype() != "BF16":
            return file.get_tensor(NAME)
    # NumPy has no bfloat16, which is the upper half of a float32.
    data = next(tensor["data"] for name, tensor in deserialize(path.read_bytes()) if name == NAME)
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(part.get_shape())


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError("Parquet needs a package: pip install 'vilu[parquet]'") from None
    if NAME not in pq.read_schema(path).names:
        return None
    column = pq.read_table(path, columns=[NAME]).column(NAME).combine_chunks()
    if column.null_count:
        raise UserError(f"{path}: {NAME} has empty cells")
    widths = set(column.value_lengths().to_pylist()) if hasattr(column, "value_lengths") else {column.type.list_size}
    if len(widths) != 1:
        raise UserError(f"{path}: {NAME} has rows of different widths")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
