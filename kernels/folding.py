"""Folding: a head and a class set become one bank of rows, read once per query.

With u = scale · W_Kᵀ W_Q v the attention logits are u · t_j: no projected key is ever formed. z = W_V Σ α_j t_j,
and the MLP's first layer is linear in each of its parts, so

    h_1 = relu(W_1v v + W_1p t_pred + (W_1a W_V) Σ α_j t_j + b_1)

and one pass over the text embeddings gives CLIP's own softmax (argmax, max p, Σ p², Σ p log p) and the
attention's weighted sum together. Two layouts of a class set:

    plain    rows t_j (K, D); the sum is taken in embedding space and sent through (W_1a W_V) once per query
    folded   besides, T W_1pᵀ and T (W_1a W_V)ᵀ (K, H) are precomputed: the sum lands in the first hidden layer.
             So are the attention keys scale · T W_Kᵀ W_Q (K, D): u · t_j = v · key_j, and no block of the kernel
             has to form u before it can start

This file is plain PyTorch: the reference of the kernels (fused.py), the CPU path, and what the ONNX graph is
traced from. Whatever the storage type, logits, softmax and sums are float32 (float64 in a float64 head).
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vilu.head import ViLUHead, log_odds


class HeadOutput(NamedTuple):
    """What one pass gives, each (B,). Scores are confidences: higher means more likely right."""

    failure_probability: Tensor  # P(CLIP's prediction is wrong), ViLU
    class_index: Tensor  # int64, argmax_j v · t_j, the lowest index on ties
    confidence: Tensor  # max p (MCM)
    entropy: Tensor  # Σ p log p / log K, 0 where K = 1
    doctor: Tensor  # -(1 - g) / g with g = Σ p²


class FoldedHead(nn.Module):
    """A head folded over one class set: `forward(image_embedding (B, D)) -> HeadOutput`.

    Buffers: `text_embeddings` (K, D); `query_map` (D, D) when plain, `keys` (K, D) when folded, both None when the
    projections are the identity; `image_weight` (H, D), `predicted` and `attended` — (K, H) banks when folded,
    (H, D) weights when plain, None where the head has no such part; `tail`, the MLP from the first activation
    on. `packed` holds every weight the kernel reads besides the banks in one row (see `packed_offsets`).
    """

    text_embeddings: Tensor
    query_map: Tensor | None
    keys: Tensor | None
    image_weight: Tensor | None
    predicted: Tensor | None
    attended: Tensor | None
    bias: Tensor
    packed: Tensor

    def __init__(self, head: ViLUHead, text_embeddings: Tensor, *, logit_scale: float, layout: str) -> None:
        super().__init__()
        if layout not in ("folded", "plain"):
            raise ValueError(f"layout must be 'folded' or 'plain', got {layout!r}")
        if text_embeddings.ndim != 2 or text_embeddings.shape[1] != head.dim or not len(text_embeddings):
            raise ValueError(f"text_embeddings must be (K, {head.dim}), got {tuple(text_embeddings.shape)}")
        self.layout = layout
        self.logit_scale = float(logit_scale)
        self.attention_scale = head.attention_scale
        self.parts = head.parts
        if head.logit_scale is not None and not math.isclose(head.logit_scale, logit_scale, rel_tol=1e-6):
            raise ValueError(f"the head's prior was trained at logit_scale {head.logit_scale}, not {logit_scale}")
        self.prior = None if head.prior is None else float(head.prior.detach())
        self.widths = (*head.hidden, 1)
        dtype = text_embeddings.dtype
        first = head.mlp[0]
        assert isinstance(first, nn.Linear)
        # Products of weights are formed in float64 and rounded once, so folding adds no error of its own.
        w_q, w_k, w_v = (w.detach().double() for w in head.projections())
        columns = dict(zip(head.parts, first.weight.detach().double().split(head.dim, dim=1), strict=True))
        w_v1, w_p1, w_a1 = (columns.get(part) for part in ("image", "predicted", "attended"))
        if w_a1 is not None:
            w_a1 = w_a1 @ w_v
        query_map = keys = None
        if head.projection != "identity":
            query_map = head.attention_scale * (w_k.T @ w_q)
        if layout == "folded":
            t = text_embeddings.detach().double()
            w_p1 = None if w_p1 is None else t @ w_p1.T
            w_a1 = None if w_a1 is None else t @ w_a1.T
            query_map, keys = None, None if query_map is None else (t @ query_map).to(dtype)
        self.register_buffer("text_embeddings", text_embeddings.detach().clone())
        self.register_buffer("query_map", None if query_map is None else query_map.to(dtype))
        self.register_buffer("keys", keys)
        self.register_buffer("image_weight", None if w_v1 is None else w_v1.to(dtype))
        self.register_buffer("predicted", None if w_p1 is None else w_p1.to(dtype))
        self.register_buffer("attended", None if w_a1 is None else w_a1.to(dtype))
        self.register_buffer("bias", first.bias.detach().clone().to(dtype))
        self.tail = copy.deepcopy(nn.Sequential(*list(head.mlp)[1:])).to(dtype).requires_grad_(False)
        self.register_buffer("packed", self._pack(), persistent=False)

    def _matrices(self) -> list[Tensor | None]:
        plain = self.layout == "plain"
        first = [self.image_weight, self.predicted if plain else None, self.attended if plain else None, self.bias]
        return first + [p for layer in self.tail if isinstance(layer, nn.Linear) for p in (layer.weight, layer.bias)]

    def packed_offsets(self) -> tuple[int, ...]:
        """Where each piece starts in `packed`: W_1v, W_1p, W_1a W_V, b_1, then weight and bias of every later layer.

        Every piece starts at a multiple of 16 elements, so that the kernel's loads are wide; an absent one
        takes no room.
        """
        sizes = [0 if m is None else -(-m.numel() // 16) * 16 for m in self._matrices()]
        return tuple(sum(sizes[:i]) for i in range(len(sizes)))

    def _pack(self) -> Tensor:
        present = [m.detach().reshape(-1) for m in self._matrices() if m is not None]
        return torch.cat([nn.functional.pad(m, (0, -len(m) % 16)) for m in present])

    def with_text(self, text_embeddings: Tensor) -> FoldedHead:
        """The same head over other candidates, weights shared: what an open vocabulary needs per request.

        Raises:
            ValueError: a folded layout, whose banks belong to one class set, or rows of another width.
        """
        if self.layout != "plain":
            raise ValueError("with_text needs layout='plain': a folded bank belongs to one class set")
        like = self.text_embeddings
        if text_embeddings.ndim != 2 or text_embeddings.shape[1] != like.shape[1] or not len(text_embeddings):
            raise ValueError(f"text_embeddings must be (K, {like.shape[1]}), got {tuple(text_embeddings.shape)}")
        other = copy.copy(self)
        other._buffers = {**self._buffers, "text_embeddings": text_embeddings.detach().to(like)}
        return other

    def forward(self, image_embedding: Tensor) -> HeadOutput:
        return self.answer(image_embedding)

    def answer(self, image_embedding: Tensor, rows: slice | None = None) -> HeadOutput:
        """HeadOutput of image_embedding (B, D) over those rows of the class set, or all of them.

        An image that is not finite gets NaN and class 0 (left to itself a ReLU would make an answer of -inf).
        """

        def bank(x: Tensor) -> Tensor:
            return _wide(x if rows is None else x[rows])

        t = bank(self.text_embeddings)
        # Read at the bank's precision, as the kernel does, so that every path rounds alike.
        v = _wide(image_embedding.to(self.text_embeddings.dtype))
        finite = torch.isfinite(v).all(dim=-1)
        if self.query_map is None:
            similarity = v @ t.T  # (B, K)
        else:  # both products in one pass over the rows
            similarity, logits = (torch.stack([v, v @ _wide(self.query_map).T]) @ t.T).unbind(0)
        index = torch.where(finite, similarity.argmax(dim=-1), 0)
        log_p = torch.log_softmax(self.logit_scale * similarity, dim=-1)
        p = log_p.exp()

        h = _wide(self.bias).expand(v.shape[0], -1)
        if self.image_weight is not None:
            h = h + v @ _wide(self.image_weight).T
        if self.predicted is not None:
            if self.layout == "folded":
                h = h + bank(self.predicted)[index]
            else:
                h = h + t[index] @ _wide(self.predicted).T
        if self.attended is not None:
            if self.keys is not None:
                logits = v @ bank(self.keys).T
            elif self.query_map is None:
                logits = self.attention_scale * similarity
            alpha = torch.softmax(logits, dim=-1)
            if self.layout == "folded":
                h = h + alpha @ bank(self.attended)
            else:
                h = h + (alpha @ t) @ _wide(self.attended).T
        for layer in self.tail:
            if isinstance(layer, nn.Linear):
                h = nn.functional.linear(h, _wide(layer.weight), _wide(layer.bias))
            else:
                h = layer(h)

        logit = h.squeeze(-1)
        if self.prior is not None:
            logit = logit + self.prior * log_odds(self.logit_scale * similarity)
        g = (p * p).sum(dim=-1)
        spread = math.log(len(t)) if len(t) > 1 else 1.0
        scores = (torch.sigmoid(logit), p.amax(dim=-1), (p * log_p).sum(dim=-1) / spread, -(1 - g) / g)
        failure, confidence, entropy, doctor = (torch.where(finite, score, math.nan) for score in scores)
        return HeadOutput(failure, index, confidence, entropy, doctor)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# Above this many classes the (K, 2H) precomputed rows cost more memory traffic than the one (H, D) product they save.
FOLDED_MAX_CLASSES = 4096


def fold(
    head: ViLUHead, text_embeddings: Tensor, *, logit_scale: float = 100.0, layout: str | None = None
) -> FoldedHead:
    """Fold a head over a class set.

    Args:
        head: the eager head.
        text_embeddings: (K, D), L2-normalised.
        logit_scale: CLIP's factor on v · t (100 for OpenAI's models).
        layout: "folded" or "plain"; by default folded up to `FOLDED_MAX_CLASSES` classes.

    Raises:
        ValueError: an unknown layout, text embeddings that do not fit the head, or a logit scale that is not the one
            its prior was trained at.
    """
    if layout is None:
        layout = "folded" if len(text_embeddings) <= FOLDED_MAX_CLASSES else "plain"
    return FoldedHead(head, text_embeddings, logit_scale=logit_scale, layout=layout)
