"""Passes over a traced graph: what is fused, and pixel normalisation folded into the first convolution.

LayerNormalization and Gelu are operators of the operator set itself, so nothing has to be found again in a graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vilu.export.attention import MASK_INPUT, MICROSOFT
from vilu.export.views import constant, copy_type, remove_views


def optimise(model: ir.Model, *, fused: bool) -> None:
    """Run all passes in place; the graph computes the same up to float32 rounding.

    Args:
        fused: the graph may use ONNX Runtime's own operators.
    """
    fold_pixels(model.graph)
    if fused:
        remove_views(model.graph)
        _write_masks(model.graph)
        _fuse_quick_gelu(model.graph)
        if any(node.domain == MICROSOFT for node in model.graph):
            model.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(model)


def fold_pixels(graph: ir.Graph) -> None:
    """Fold the scaling of uint8 pixels, (x / 255 - mean) / std by channel, into the convolutions that read it.

    A convolution that pads does so with zeros after normalising, so there the mean stays behind as one subtraction
    (of a bias it would be wrong along the borders).
    """
    cast = next((node for node in graph if node.op_type == "Cast"), None)
    if cast is None or cast.inputs[0] is None or cast.inputs[0].dtype != ir.DataType.UINT8:
        return
    source = cast.outputs[0]
    value, scale, shift = _normalised(source)
    convolutions = [use.node for use in value.uses()]
    weights = [constant(node.inputs[1]) if node.op_type == "Conv" else None for node in convolutions]
    if not weights or any(w is None or w.shape[1] != len(scale) for w in weights):
        return
    padded = any(any(node.attributes.get_ints("pads", ())) for node in convolutions)
    if padded:
        centre = _add_weight(graph, "pixel_mean", (-shift / scale)[:, None, None])
        subtract = ir.node("Sub", [source, centre], name="centre_pixels")
        copy_type(subtract.outputs[0], value)
        graph.insert_before(convolutions[0], subtract)
        source = subtract.outputs[0]
    for k, (node, weight) in enumerate(zip(convolutions, weights, strict=True)):
        assert weight is not None
        wide = weight.astype(np.float64)
        node.replace_input_with(0, source)
        node.replace_input_with(1, _add_weight(graph, f"pixel_weight_{k}", wide * scale[:, None, None]))
        if not padded:
            bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            moved = (wide * shift[:, None, None]).sum(axis=(1, 2, 3)) + (0 if bias is None else bias)
            node.resize_inputs(3)
            node.replace_input_with(2, _add_weight(graph, f"pixel_bias_{k}", moved))


def _normalised(value: ir.Value) -> tuple[ir.Value, np.ndarray, np.ndarray]:
    """The end of the arithmetic on pixels, and the scale and shift (3,) by channel that lead there."""
    scale, shift = np.ones(3), np.zeros(3)
    while len(uses := list(value.uses())) == 1 and (node := uses[0].node).op_type in ("Div", "Sub", "Mul", "Add"):
        by = constant(node.inputs[1])
        if node.inputs[0] is not value or by is None or by.size not in (1, 3):
            break
        number = by.astype(np.float64).reshape(-1)
        if node.op_type == "Div":
            scale, shift = scale / number, shift / number
        elif node.op_type == "Mul":
            scale, shift = scale * number, shift * number
        else:
            shift = shift + (number if node.op_type == "Add" else -number)
        value = node.outputs[0]
    return value, scale, shift


def _add_weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new float32 initializer."""
    tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _write_masks(graph: ir.Graph) -> None:
    """A constant causal mask becomes the attribute `unidirectional`; another one, a row for each head.

    ONNX Runtime before 1.20 does not broadcast a bias over heads.
    """
    for node in graph:
        if node.op_type != "MultiHeadAttention" or len(node.inputs) <= MASK_INPUT:
            continue
        mask = constant(node.inputs[MASK_INPUT])
        if mask is None:
            continue
        rows = mask.reshape(mask.shape[-2:]) if mask.size == mask.shape[-1] ** 2 else None
        if rows is not None and np.array_equal(rows, np.triu(np.full_like(rows, -np.inf), 1)):
            node.attributes["unidirectional"] = ir.AttrInt64("unidirectional", 1)
            node.resize_inputs(MASK_INPUT)
        else:
            full = np.broadcast_to(mask, (mask.shape[0], node.attributes.get_int("num_heads", 1), *mask.shape[2:]))
            node.replace_input_with(MASK_INPUT, _add_weight(graph, f"{node.name}_mask", full))


def _fuse_quick_gelu(graph: ir.Graph) -> None:
    """x · sigmoid(alpha · x) is one operator of ONNX Runtime; SiLU is the same with alpha 1."""
    for node in list(graph):
        if node.op_type != "Mul":
            continue
        x, gate = (node.inputs[0], _made_by(node.inputs[1], "Sigmoid"))
        if x is None or gate is None:
            continue
        alpha = None
        if gate.inputs[0] is x:
            alpha = np.ones(())
        elif (scaled := _made_by(gate.inputs[0], "Mul")) is not None and scaled.inputs[0] is x:
            alpha = constant(scaled.inputs[1])
        if alpha is None or alpha.size != 1:
            continue
        attributes = {"alpha": float(alpha.reshape(()))}
        _replace(graph, node, ir.node("QuickGelu", [x], attributes, domain=MICROSOFT, name=node.name))


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.outputs[0].name = old.outputs[0].name
    copy_type(new.outputs[0], old.outputs[0])
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(old.outputs, new.outputs, replace_graph_outputs=True)
