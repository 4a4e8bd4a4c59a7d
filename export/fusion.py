"""Passes over exported graphs: fused attention and QuickGELU, pixel normalisation in the first convolution.

Attention is caught while tracing, where it is still one operator, and the transposes around it are removed after.
LayerNormalization and Gelu are operators of the opset itself, so nothing has to be found again in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx.defs import OpSchema
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import opset20
from onnxscript.values import Op, Opset
from torch import Tensor, nn

MICROSOFT = "com.microsoft"
op: Any = opset20
BIAS = 5  # the input of MultiHeadAttention that is added to its logits


def _attention_op() -> Op:
    """MultiHeadAttention as ONNX Runtime declares it; `onnx` knows its own domains only."""
    names = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias")
    option, kinds = OpSchema.FormalParameterOption, OpSchema.AttrType
    needed = [option.Single] + [option.Optional] * (len(names) - 1)
    schema = OpSchema(
        "MultiHeadAttention",
        MICROSOFT,
        1,
        inputs=[OpSchema.FormalParameter(n, "T", param_option=o) for n, o in zip(names, needed, strict=True)],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            OpSchema.Attribute("num_heads", kinds.INT),
            OpSchema.Attribute("scale", kinds.FLOAT),
            OpSchema.Attribute("unidirectional", kinds.INT),
        ],
    )
    return Op(Opset(MICROSOFT, 1), schema.name, schema)


_multi_head_attention = _attention_op()


def _fused_attention(query: Any, key: Any, value: Any, mask: Any, scale: float, causal: bool) -> Any:
    """com.microsoft.MultiHeadAttention, which reads and writes (B, S, heads · width)."""
    heads = query.shape[1]

    def flat(x: Any) -> Any:
        rows = op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
        rows.shape = ir.Shape([x.shape[0], x.shape[2], heads * x.shape[3]])
        return rows

    if mask is not None and len(mask.shape) < 4:
        axes = list(range(4 - len(mask.shape)))
        mask = op.Unsqueeze(mask, op.Constant(value_ints=axes))
    rows = flat(query), flat(key), flat(value)
    out = _multi_head_attention(*rows, None, None, mask, num_heads=heads, scale=scale, unidirectional=int(causal))
    out.dtype, out.shape = query.dtype, ir.Shape([query.shape[0], query.shape[2], heads * value.shape[3]])
    return op.Transpose(op.Reshape(out, op.Constant(value_ints=[0, 0, heads, -1])), perm=[0, 2, 1, 3])


def _plain_attention(query: Any, key: Any, value: Any, mask: Any, scale: float, causal: bool) -> Any:
    """The same of operators that every provider has."""
    logits = op.MatMul(op.Mul(query, op.Constant(value_float=scale)), op.Transpose(key, perm=[0, 1, 3, 2]))
    if causal:
        length = query.shape[2], key.shape[2]
        mask = op.Constant(value=ir.tensor(np.triu(np.full(length, -np.inf, np.float32), 1)))
    if mask is not None:
        logits = op.Add(logits, mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def translations(fused: bool) -> dict[Any, Callable[..., Any]]:
    """How scaled dot product attention is written, for `torch.onnx.export(custom_translation_table=...)`."""
    write = _fused_attention if fused else _plain_attention

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if dropout_p or enable_gqa:
            raise NotImplementedError("attention with dropout or grouped queries")
        if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
            attn_mask = op.Where(attn_mask, op.Constant(value_float=0.0), op.Constant(value_float=-float("inf")))
        return write(query, key, value, attn_mask, scale or query.shape[3] ** -0.5, is_causal)

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}


@contextmanager
def batch_first_attention() -> Iterator[None]:
    """While open, nn.MultiheadAttention computes in (B, S, D).

    Its own code goes through (S, B · heads, width), and traces as six transposes and reshapes a layer.
    """
    original = nn.MultiheadAttention.forward

    def forward(self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Any:
        mask = kw.get("attn_mask")
        if mask is not None and not mask.is_floating_point():  # of what is forbidden; F's own is of what is allowed
            return original(self, query, key, value, *args, **kw)
        if args or set(kw) - {"need_weights", "attn_mask"} or kw.get("need_weights", True):
            return original(self, query, key, value, *args, **kw)
        if not self.batch_first or self.bias_k is not None or self.add_zero_attn or (self.dropout and self.training):
            return original(self, query, key, value, *args, **kw)
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        elif query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            return original(self, query, key, value, *args, **kw)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

        if mask is not None:
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.ndim == 3 else mask
        out = F.scaled_dot_product_attention(split(q), split(k), split(v), mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    with mock.patch.object(nn.MultiheadAttention, "forward", forward):
        yield


def optimise(model: ir.Model, *, fused: bool) -> None:
    """All passes, in place: the graph computes the same."""
    fold_pixels(model.graph)
    if fused:
        remove_views(model.graph)
        _causal_masks(model.graph)
        _quick_gelu(model.graph)
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
    weights = [_constant(node.inputs[1]) if node.op_type == "Conv" else None for node in convolutions]
    if not weights or any(w is None or w.shape[1] != len(scale) for w in weights):
        return
    padded = any(any(node.attributes.get_ints("pads", ())) for node in convolutions)
    if padded:
        centre = _weight(graph, "pixel_mean", (-shift / scale)[:, None, None])
        subtract = ir.node("Sub", [source, centre], name="centre_pixels")
        _describe(subtract.outputs[0], value)
        graph.insert_before(convolutions[0], subtract)
        source = subtract.outputs[0]
    for k, (node, weight) in enumerate(zip(convolutions, weights, strict=True)):
        assert weight is not None
        wide = weight.astype(np.float64)
        node.replace_input_with(0, source)
        node.replace_input_with(1, _weight(graph, f"pixel_weight_{k}", wide * scale[:, None, None]))
        if not padded:
            bias = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
            moved = (wide * shift[:, None, None]).sum(axis=(1, 2, 3)) + (0 if bias is None else bias)
            node.resize_inputs(3)
            node.replace_input_with(2, _weight(graph, f"pixel_bias_{k}", moved))


def _normalised(value: ir.Value) -> tuple[ir.Value, np.ndarray, np.ndarray]:
    """The end of the arithmetic on pixels, and the scale and shift (3,) by channel that lead there."""
    scale, shift = np.ones(3), np.zeros(3)
    while len(uses := list(value.uses())) == 1 and (node := uses[0].node).op_type in ("Div", "Sub", "Mul", "Add"):
        constant = _constant(node.inputs[1])
        if node.inputs[0] is not value or constant is None or constant.size not in (1, 3):
            break
        number = constant.astype(np.float64).reshape(-1)
        if node.op_type == "Div":
            scale, shift = scale / number, shift / number
        elif node.op_type == "Mul":
            scale, shift = scale * number, shift * number
        else:
            shift = shift + (number if node.op_type == "Add" else -number)
        value = node.outputs[0]
    return value, scale, shift


def _weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new float32 initializer."""
    tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


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
                    _describe(output, part.source, (*part.source.shape[:2], part.width))  # type: ignore[index]
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


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _reshape(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    shape = _constant(node.inputs[1])
    if shape is None:
        return None
    keep = not node.attributes.get_int("allowzero", 0)
    try:
        return x.reshape([x.shape[i] if size == 0 and keep else int(size) for i, size in enumerate(shape)])
    except (ValueError, IndexError):  # a batch that these sizes do not allow
        return None


def _squeeze(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    axes = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if axes is None else np.squeeze(x, tuple(int(a) for a in axes))


def _unsqueeze(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    axes = _constant(node.inputs[1])
    return None if axes is None else np.expand_dims(x, tuple(int(a) for a in axes))


def _gather(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    index = _constant(node.inputs[1])
    if index is None or index.ndim:
        return None
    return x[(slice(None),) * node.attributes.get_int("axis", 0) + (int(index),)]


def _slice(node: ir.Node, _: int, x: np.ndarray) -> np.ndarray | None:
    start, stop, axis, step = ((*(_constant(i) for i in node.inputs[1:]), None, None))[:4]
    if start is None or stop is None or axis is None or len(axis) != 1 or (step is not None and step[0] != 1):
        return None
    return x[(slice(None),) * (int(axis[0]) % x.ndim) + (slice(int(start[0]), int(stop[0])),)]


def _split(node: ir.Node, part: int, x: np.ndarray) -> np.ndarray | None:
    axis, parts = node.attributes.get_int("axis", 0), len(node.outputs)
    sizes = _constant(node.inputs[1]) if len(node.inputs) > 1 else np.full(parts, x.shape[axis] // parts)
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


def _causal_masks(graph: ir.Graph) -> None:
    """A constant causal mask becomes the attribute `unidirectional`; another one, a row for each head.

    ONNX Runtime before 1.20 does not broadcast a bias over heads.
    """
    for node in graph:
        if node.op_type != "MultiHeadAttention" or len(node.inputs) <= BIAS:
            continue
        mask = _constant(node.inputs[BIAS])
        if mask is None:
            continue
        rows = mask.reshape(mask.shape[-2:]) if mask.size == mask.shape[-1] ** 2 else None
        if rows is not None and np.array_equal(rows, np.triu(np.full_like(rows, -np.inf), 1)):
            node.attributes["unidirectional"] = ir.AttrInt64("unidirectional", 1)
            node.resize_inputs(BIAS)
        else:
            full = np.broadcast_to(mask, (mask.shape[0], node.attributes.get_int("num_heads", 1), *mask.shape[2:]))
            node.replace_input_with(BIAS, _weight(graph, f"{node.name}_mask", full))


def _quick_gelu(graph: ir.Graph) -> None:
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
            alpha = _constant(scaled.inputs[1])
        if alpha is None or alpha.size != 1:
            continue
        attributes = {"alpha": float(alpha.reshape(()))}
        _replace(graph, node, ir.node("QuickGelu", [x], attributes, domain=MICROSOFT, name=node.name))


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.outputs[0].name = old.outputs[0].name
    _describe(new.outputs[0], old.outputs[0])
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(old.outputs, new.outputs, replace_graph_outputs=True)


def _describe(value: ir.Value, like: ir.Value, shape: Sequence[Any] | None = None) -> None:
    """Give a new value the type and, unless another is told, the shape of one that is known."""
    value.type = like.type
    value.shape = like.shape if shape is None else ir.Shape(shape)
