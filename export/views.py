"""Reshapes, transposes and splits around attention that cancel, found by following strides through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of a value that is the same for every input, else None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def copy_type(value: ir.Value, like: ir.Value, shape: Sequence[Any] | None = None) -> None:
    """Give a new value the type of a known one and, unless another is given, its shape."""
    value.type = like.type
    value.shape = like.shape if shape is None else ir.Shape(shape)


class _Part(NamedTuple):
    """A value that is source[..., start : start + width], of rows `row` wide; the source itself if that is all."""

    source: ir.Value
    start: int
    width: int
    row: int


def remove_views(graph: ir.Graph) -> None:
    """Bypass reshapes and transposes that cancel, and read an attention's q, k and v as parts of one row."""
    for node in list(graph):
        for value in node.outputs:
            part = _part(value)
            if part is not None and part.width == part.row and not value.is_graph_output():
                ir.convenience.replace_all_uses_with(value, part.source)
    splits: dict[tuple[ir.Value, int], Sequence[ir.Value]] = {}
    for node in list(graph):
        if node.op_type != "MultiHeadAttention":
            continue
        for i in range(3):
            part = None if node.inputs[i] is None else _part(node.inputs[i])  # type: ignore[arg-type]
            if part is None or part.start % part.width or part.row % part.width:
                continue
            key = part.source, part.width
            if key not in splits:
                parts = part.row // part.width
                split = ir.node("Split", [part.source], {"axis": -1, "num_outputs": parts}, num_outputs=parts)
                for output in split.outputs:
                    copy_type(output, part.source, (*part.source.shape[:2], part.width))  # type: ignore[index]
                graph.insert_before(node, split)
                splits[key] = split.outputs
            node.replace_input_with(i, splits[key][part.start // part.width])


def _part(value: ir.Value) -> _Part | None:
    """What `value` is a part of, by any chain of views; None if it is none, or of something in another order."""
    chain: list[ir.Value] = []
    found = None
    while (node := value.producer()) is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        chain.insert(0, value)
        value = node.inputs[0]
        sizes = [] if value.shape is None else [size for size in value.shape[1:] if isinstance(size, int)]
        if value.shape is None or not sizes or len(sizes) < len(value.shape) - 1:
            continue
        places = {_follow(chain, (batch, *sizes)) for batch in (3, 5)}
        if len(places) == 1 and (place := places.pop()) is not None:
            found = _Part(value, *place, sizes[-1])
    return found


def _follow(chain: Sequence[ir.Value], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(start, width) of the part that these views make of an array of that shape, from strides: nothing is read."""
    base = np.empty(shape, np.int8)
    x = base
    for value in chain:
        node = value.producer()
        assert node is not None
        view = _VIEWS[node.op_type](node, value.index() or 0, x)
        if view is None or not np.may_share_memory(view, base):
            return None
        x = view
    start = x.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    if x.ndim != base.ndim or start + x.shape[-1] > shape[-1]:
        return None
    part = base[..., start : start + x.shape[-1]]
    return (start, x.shape[-1]) if x.shape == part.shape and _steps(x) == _steps(part) else None


def _steps(x: np.ndarray) -> list[tuple[int, int]]:
    return [(size, step) for size, step in zip(x.shape, x.strides, strict=True) if size > 1]


def _reshape(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    shape = constant(node.inputs[1])
    if shape is None:
        return None
    keep = not node.attributes.get_int("allowzero", 0)
    try:
        return x.reshape([x.shape[i] if size == 0 and keep else int(size) for i, size in enumerate(shape)])
    except (ValueError, IndexError):  # a batch that these sizes do not allow
        return None


def _squeeze(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if axes is None else np.squeeze(x, tuple(int(a) for a in axes))


def _unsqueeze(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    axes = constant(node.inputs[1])
    return None if axes is None else np.expand_dims(x, tuple(int(a) for a in axes))


def _gather(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    index = constant(node.inputs[1])
    if index is None or index.ndim:
        return None
    return x[(slice(None),) * node.attributes.get_int("axis", 0) + (int(index),)]


def _slice(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    start, stop, axis, step = ((*(constant(i) for i in node.inputs[1:]), None, None))[:4]
    if start is None or stop is None or axis is None or len(axis) != 1 or (step is not None and step[0] != 1):
        return None
    return x[(slice(None),) * (int(axis[0]) % x.ndim) + (slice(int(start[0]), int(stop[0])),)]


def _split(node: ir.Node, part: int, x: np.ndarray) -> np.ndarray | None:
    axis, parts = node.attributes.get_int("axis", 0), len(node.outputs)
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else np.full(parts, x.shape[axis] // parts)
    if sizes is None or sizes.sum() != x.shape[axis]:
        return None
    return np.split(x, np.cumsum(sizes)[:-1], axis)[part]


_VIEWS: dict[str, Callable[[ir.Node, int, np.ndarray], np.ndarray | None]] = {
    "Transpose": lambda node, _, x: x.transpose(node.attributes.get_ints("perm", tuple(range(x.ndim))[::-1])),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
}
