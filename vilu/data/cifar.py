"""CIFAR-10 and CIFAR-100, in the python version (pickles, which torchvision uses) or in the binary version.

A pickle can run any code when it is opened. So this reader accepts only three names in it (NumPy's array, dtype and
array constructor) and replaces each with a class of its own that only stores its arguments. It refuses a file that
contains any other name.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from vilu.data.source import ArraySource
from vilu.errors import UserError

MAX_BYTES = 1 << 28  # the largest real file, CIFAR-100's train batch, has 155 MB


class _Layout(NamedTuple):
    """The file layout of one version of one data set.

    folder: name of its folder.
    files: image files of each split.
    names: file of class names.
    key: key of the labels in a pickle; "" for the binary version.
    names_key: key of the class names in a pickle; "" for the binary version.
    skip: number of bytes before the label in a record of the binary version.
    """

    folder: str
    files: dict[str, tuple[str, ...]]
    names: str
    key: str = ""
    names_key: str = ""
    skip: int = 0


LAYOUTS = {
    "cifar10": (
        _Layout(
            "cifar-10-batches-py",
            {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
            "batches.meta",
            "labels",
            "label_names",
        ),
        _Layout(
            "cifar-10-batches-bin",
            {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
            "batches.meta.txt",
        ),
    ),
    "cifar100": (
        _Layout(
            "cifar-100-python", {"train": ("train",), "test": ("test",)}, "meta", "fine_labels", "fine_label_names"
        ),
        _Layout("cifar-100-binary", {"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", skip=1),
    ),
}


def open_cifar(dataset: str, root: Path, split: str) -> ArraySource:
    """Open CIFAR-10 or CIFAR-100 in whichever version is there.

    Args:
        dataset: "cifar10" or "cifar100".
        root: folder that holds the version's folder, directly or inside root/cifar10 or root/cifar100.
        split: "train" or "test".

    Raises:
        UserError: there is no such folder or split, or a file is missing, damaged, or holds anything but arrays and
            labels.
    """
    for layout in LAYOUTS[dataset]:
        for folder in (root / layout.folder, root / dataset / layout.folder):
            if not folder.is_dir():
                continue
            if split not in layout.files:
                raise UserError(f"{dataset}: has no split {split!r}, only train and test")
            read = _pickled if layout.key else _binary
            parts = [read(folder / file, layout) for file in layout.files[split]]
            pixels = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
            names = _names(folder / layout.names, layout)
            return ArraySource(
                name=dataset,
                images=np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)),
                labels=np.concatenate([labels for _, labels in parts]),
                class_names=tuple(name.replace("_", " ") for name in names),
            )
    choices = " or ".join(layout.folder for layout in LAYOUTS[dataset])
    raise UserError(f"{root}: holds no {choices} (the python or the binary version, unpacked)")


def _names(file: Path, layout: _Layout) -> list[str]:
    if not layout.key:
        return [line.strip() for line in _bytes(file).decode("utf-8", "replace").splitlines() if line.strip()]
    names = _load(file).get(layout.names_key)
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{file}: holds no list {layout.names_key!r}")
    return names


def _binary(file: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(_bytes(file), np.uint8)
    record = layout.skip + 1 + 3072
    if not len(data) or len(data) % record:
        raise UserError(f"{file}: {len(data)} bytes are no whole number of records of {record}")
    rows = data.reshape(-1, record)
    return rows[:, -3072:], rows[:, layout.skip].astype(np.int64)


def _pickled(file: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    content = _load(file)
    data, labels = content.get("data"), content.get(layout.key)
    if not isinstance(data, _Array) or not isinstance(labels, list) or not all(type(i) is int for i in labels):
        raise UserError(f"{file}: holds no 'data' array with a list {layout.key!r}")
    pixels = data.pixels(file)
    if len(pixels) != len(labels):
        raise UserError(f"{file}: {len(pixels)} images but {len(labels)} labels")
    if labels and not 0 <= min(labels) <= max(labels) < 256:
        raise UserError(f"{file}: labels run from {min(labels)} to {max(labels)}")
    return pixels, np.array(labels, np.int64)


def _bytes(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file}: has {file.stat().st_size} bytes, no CIFAR file has more than {MAX_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


class _Inert:
    """A stand-in for one of NumPy's names in a pickle. It stores its arguments and does nothing with them."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(_Inert):
    pass


class _Array(_Inert):
    def pixels(self, file: Path) -> np.ndarray:
        """Return the pixels (N, 3072) uint8. Raises UserError where the pickle holds another array."""
        match self.state:
            case (_, (int(count), 3072), _Dtype(args=("u1" | "|u1", *_)), False, bytes() | str() as raw) if count > 0:
                # Python 2 wrote the bytes as a string. Read as Latin-1, its characters are the same numbers.
                data = raw.encode("latin-1", "replace") if isinstance(raw, str) else raw
                if len(data) == count * 3072:
                    return np.frombuffer(data, np.uint8).reshape(count, 3072)
        raise UserError(f"{file}: 'data' is not an array of N x 3072 bytes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module.removeprefix("numpy.").replace("_core", "core"), name:
            case "core.multiarray", "_reconstruct":
                return _Array
            case "numpy", "dtype":
                return _Dtype
            case "numpy", "ndarray":
                return _Inert
        raise pickle.UnpicklingError(f"names {module}.{name}, which no CIFAR file does")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("refers to something outside the file")


def _load(file: Path) -> dict[str, Any]:
    import io

    try:
        content = _Unpickler(io.BytesIO(_bytes(file)), encoding="latin-1").load()
    except UserError:
        raise
    except Exception as error:  # pickle raises almost any type on damaged input
        raise UserError(f"{file}: is no CIFAR batch ({(str(error) or type(error).__name__).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is no CIFAR batch (no dictionary)")
    return content
