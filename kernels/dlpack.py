"""DLPack through ctypes: read a tensor another library owns, and lend one of ours, with neither torch nor CuPy.

Structures as in dlpack.h (DLManagedTensor, the unversioned form that Triton Inference Server speaks).
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

CUDA = 2  # kDLCUDA
# name -> DLDataTypeCode (signed integer 0, float 2, bfloat 4) and bits
TYPES = {"i32": (0, 32), "fp32": (2, 32), "fp16": (2, 16), "bf16": (4, 16)}
NAME = b"dltensor"  # CPython keeps the pointer, so the bytes must outlive every capsule
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _DELETER))


_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class View(NamedTuple):
    """A tensor in someone else's memory; the capsule it was read from must outlive its use."""

    address: int
    shape: tuple[int, ...]
    dtype: str  # a key of TYPES
    gpu: int | None  # the CUDA device, None for host memory


def view(capsule: Any) -> View:
    """What a capsule holds; it is not consumed, so its owner frees the tensor when the capsule goes.

    Raises:
        ValueError: a capsule that was consumed, a type not in TYPES, or a tensor that is not contiguous.
    """
    if not _is_valid(id(capsule), NAME):
        raise ValueError("not a DLPack capsule, or one consumed before")
    tensor = ctypes.cast(_pointer(id(capsule), NAME), ctypes.POINTER(_Managed)).contents.tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    names = [name for name, pair in TYPES.items() if pair == (tensor.code, tensor.bits) and tensor.lanes == 1]
    if not names:
        raise ValueError(f"a tensor of DLPack type {tensor.code}, {tensor.bits} bits: expected {', '.join(TYPES)}")
    if tensor.strides:
        dense = [math.prod(shape[i + 1 :]) for i in range(tensor.ndim)]
        if any(size > 1 and tensor.strides[i] != dense[i] for i, size in enumerate(shape)):
            raise ValueError(f"a tensor of shape {shape} that is not contiguous")
    gpu = tensor.device_id if tensor.device_type == CUDA else None
    return View((tensor.data or 0) + tensor.byte_offset, shape, names[0], gpu)


_lent: dict[int, tuple[Any, ...]] = {}


@_DELETER
def _delete(managed: int) -> None:
    _lent.pop(managed, None)


@_DELETER
def _dispose(capsule: int) -> None:
    # A consumer renames the capsule and calls the deleter itself.
    if _is_valid(capsule, NAME):
        _delete(_pointer(capsule, NAME))


def lend(view: View, owner: Any) -> Any:
    """A capsule of a contiguous tensor in our memory; `owner` is kept until the consumer, or nobody, holds it."""
    shape = (ctypes.c_int64 * len(view.shape))(*view.shape)
    code, bits = TYPES[view.dtype]
    place = (1, 0) if view.gpu is None else (CUDA, view.gpu)
    managed = _Managed(_Tensor(view.address, *place, len(shape), code, bits, 1, shape, None, 0), None, _delete)
    address = ctypes.addressof(managed)
    _lent[address] = (managed, shape, owner)
    return _new(address, NAME, ctypes.cast(_dispose, ctypes.c_void_p))
