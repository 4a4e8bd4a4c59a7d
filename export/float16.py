"""Rewrite a tower's graph to float16: weights and products; inputs, outputs and statistics stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vilu.export import onnx_file
from vilu.export.precision import PRODUCTS

# These sum many terms, or divide such sums: statistics, softmax, norms.
_FLOAT32 = {
    *("LayerNormalization", "SimplifiedLayerNormalization", "GroupNormalization", "InstanceNormalization"),
    *("Softmax", "LogSoftmax", "LpNormalization", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"),
    *("Pow", "Sqrt"),
}


def to_float16(path: Path) -> None:
    """Rewrite a tower's graph in place: float16 weights and products; float32 inputs, outputs and statistics.

    A cast stands only where a value crosses from a float32 node to a float16 node or back.

    Args:
        path: an ONNX file, its large weights in `path`.data or not; both are replaced.
    """
    model = ir.load(path)
    graph = model.graph
    kept = {id(node) for node in graph if node.op_type in _FLOAT32} | {id(node) for node in _after_last_product(graph)}
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    casts: dict[tuple[int, ir.DataType], ir.Value] = {}
    for node in list(graph):
        # What is cast to float comes from whole numbers (pixels, token ids): the next node says what it wants.
        rewritten = id(node) not in kept and node.op_type not in ("Cast", "Constant", "ConstantOfShape")
        want = half if rewritten else single
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype not in (half, single) or value.dtype == want:
                continue
            if (id(value), want) not in casts:
                casts[id(value), want] = _as_type(graph, value, want, node)
            node.replace_input_with(i, casts[id(value), want])
        for value in node.outputs if rewritten else ():
            if value.dtype == single:
                value.dtype = half
    for i, value in enumerate(graph.outputs):
        if value.dtype == half:
            graph.outputs[i] = _as_type(graph, value, single, None)
            graph.outputs[i].name, value.name = value.name, f"{value.name}_half"
            graph.outputs[i].shape = value.shape
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    onnx_file.save(model, path)


def _as_type(graph: ir.Graph, value: ir.Value, kind: ir.DataType, before: ir.Node | None) -> ir.Value:
    """`value` as float16 or float32: a weight is converted here, anything else by a new Cast node.

    Args:
        before: the node that reads the value, for a value that no node makes; None: the graph's output.
    """
    if value.is_initializer():
        assert value.const_value is not None
        limit = np.finfo(np.float16).max
        array = value.const_value.numpy().astype(np.float32)
        array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array).astype(np.float16)
        name = f"{value.name}_half"
        new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind), const_value=ir.tensor(array, name=name))
        graph.register_initializer(new)
        return new
    node = ir.node("Cast", [value], {"to": kind}, name=f"{value.name}_to_{kind.name.lower()}")
    (new,) = node.outputs
    new.name, new.shape, new.dtype = f"{value.name}_{kind.name.lower()}", value.shape, kind
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    elif before is not None:
        graph.insert_before(before, node)
    else:
        graph.append(node)
    return new


def _after_last_product(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes between the last matrix product and the graph's outputs: the embedding's normalisation."""
    waiting, seen = list(graph.outputs), set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or id(node) in seen or node.op_type in PRODUCTS:
            continue
        seen.add(id(node))
        yield node
        waiting += [value for value in node.inputs if value is not None]
