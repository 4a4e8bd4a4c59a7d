"""Attention as ONNX Runtime's fused operator, caught while tracing, where it is still one operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx.defs import OpSchema
from onnxscript import opset20
from onnxscript.values import Op, Opset
from torch import Tensor, nn

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
MASK_INPUT = 5  # the input of MultiHeadAttention that is added to its logits
op: Any = opset20


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
    """Attention from operators that every provider has, at the same shapes."""
    logits = op.MatMul(op.Mul(query, op.Constant(value_float=scale)), op.Transpose(key, perm=[0, 1, 3, 2]))
    if causal:
        length = query.shape[2], key.shape[2]
        mask = op.Constant(value=ir.tensor(np.triu(np.full(length, -np.inf, np.float32), 1)))
    if mask is not None:
        logits = op.Add(logits, mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def translations(fused: bool) -> dict[Any, Callable[..., Any]]:
    """How scaled dot product attention is written, for `torch.onnx.export(custom_translation_table=...)`.

    Args:
        fused: write com.microsoft.MultiHeadAttention; else plain ONNX operators.
    """
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
        if mask is not None and not mask.is_floating_point():  # True forbids here and allows in F's
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
