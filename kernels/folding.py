"""Folding combines a head with a class set, so that one pass over the class set answers an image.

With u = scale · W_Kᵀ W_Q v the attention logits are u · t_j, so projected keys are never needed. The attention gives
z = W_V Σ α_j t_j, and the MLP's first layer is linear in each of its parts. Therefore

    h_1 = relu(W_1v v + W_1p t_pred + (W_1a W_V) Σ α_j t_j + b_1)

and one pass over the text embeddings gives both CLIP's softmax (argmax, max p, Σ p², Σ p log p) and the attention's
weighted sum. A class set has one of two layouts:

    plain    holds the rows t_j (K, D). The sum is taken over them and multiplied by (W_1a W_V) once per image.
    folded   also holds T W_1pᵀ and T (W_1a W_V)ᵀ, both (K, H), so the sum is taken in the first hidden layer. It also
             holds the attention keys scale · T W_Kᵀ W_Q (K, D). As u · t_j = v · key_j, no kernel computes u.

This file is plain PyTorch. It is the reference for the Triton kernels, it runs on a CPU, and the ONNX graph is traced
from it. Logits, softmax and sums are float32 for every storage type, and float64 for a float64 head.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vilu.head import LOWEST_LOG_ODDS, ViLUHead, log_odds
from vilu.kernels.plan import Variant, aligned

BLOCK_ROWS = 2048  # 4 MB of float32 rows at D = 512
FAR = -1e4  # stands for -infinity: e^FAR is 0 in every type, and 0 · FAR is 0, not NaN


class HeadOutput(NamedTuple):
    """The answers for a batch. Each field is (B,), and p = softmax(logit_scale · v · t_j) over the K classes.

    failure_probability: probability that CLIP's prediction is wrong, from the ViLU head.
    class_index: CLIP's prediction argmax_j v · t_j, int64; the lowest index on ties.
    confidence: maximum softmax probability max p (MCM); higher means more likely right.
    entropy: negative entropy Σ p log p / log K, and 0 where K = 1; higher means more likely right.
    doctor: Doctor's score -(1 - g) / g with g = Σ p²; higher means more likely right.
    """

    failure_probability: Tensor
    class_index: Tensor
    confidence: Tensor
    entropy: Tensor
    doctor: Tensor


class FoldedHead(nn.Module):
    """A head combined with one class set: `forward(image_embedding (B, D)) -> HeadOutput`. Use `fold` to make one.

    text_embeddings: class set T (K, D).
    query_map: scale · W_Kᵀ W_Q (D, D) in the plain layout; None in the folded one and without projections.
    keys: scale · T W_Kᵀ W_Q (K, D) in the folded layout; None in the plain one and without projections.
    image_weight: W_1v (H, D); None where the MLP does not read the image embedding.
    predicted: W_1p (H, D) in the plain layout, T W_1pᵀ (K, H) in the folded one; None without that part.
    attended: W_1a W_V (H, D) in the plain layout, T (W_1a W_V)ᵀ (K, H) in the folded one; None without that part.
    bias: b_1 (H,).
    tail: the MLP from its first activation on.
    packed: one row with every weight that the kernels read besides the (K, ...) tensors (see `packed_offsets`).
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
        # Weights are multiplied in float64 and rounded once, so folding adds no other error.
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
        # The JSON text is made here, because torch.compile cannot trace through JSON.
        self.variant_json = Variant(
            dim=head.dim,
            widths=self.widths,
            packed_offsets=self.packed_offsets(),
            parts=self.parts,
            projected=query_map is not None or keys is not None,
            folded=layout == "folded",
            itemsize=text_embeddings.element_size(),
        ).to_json()

    def _matrices(self) -> list[Tensor | None]:
        plain = self.layout == "plain"
        first = [self.image_weight, self.predicted if plain else None, self.attended if plain else None, self.bias]
        return first + [p for layer in self.tail if isinstance(layer, nn.Linear) for p in (layer.weight, layer.bias)]

    @property
    def variant(self) -> Variant:
        """The case that the kernels are compiled for: shapes, parts, layout and bytes per element."""
        return replace(Variant.from_json(self.variant_json), itemsize=self.text_embeddings.element_size())

    def kernel_tensors(self) -> dict[str, Tensor | None]:
        """Return the tensors that the kernels read, by the kernels' names for them.

        text_embeddings: (K, D).
        query: keys (K, D) when folded, else query_map (D, D); None without projections.
        predicted: (K, H) when folded; else None, because `packed` holds its weights.
        attended: (K, H) when folded; else None, because `packed` holds its weights.
        packed: one row of weights.
        """
        folded = self.layout == "folded"
        return {
            "text_embeddings": self.text_embeddings,
            "query": self.keys if folded else self.query_map,
            "predicted": self.predicted if folded else None,
            "attended": self.attended if folded else None,
            "packed": self.packed,
        }

    def packed_offsets(self) -> tuple[int, ...]:
        """Return where each weight starts in `packed`, counted in elements.

        The order is W_1v, W_1p, W_1a W_V, b_1, then weight and bias of every later layer. Each weight starts at a
        multiple of 16 elements, so that the kernels can load 128 bits at once. An absent weight takes no room.
        """
        sizes = [0 if m is None else aligned(m.numel()) for m in self._matrices()]
        return tuple(sum(sizes[:i]) for i in range(len(sizes)))

    def _pack(self) -> Tensor:
        present = [m.detach().reshape(-1) for m in self._matrices() if m is not None]
        return torch.cat([nn.functional.pad(m, (0, -len(m) % 16)) for m in present])

    def with_text(self, text_embeddings: Tensor) -> FoldedHead:
        """Return this head over another class set. It shares the weights, so each request can have its own class set.

        Args:
            text_embeddings: the class set (K, D).

        Raises:
            ValueError: the layout is folded, which belongs to one class set, or the rows have another width.
        """
        if self.layout != "plain":
            raise ValueError("with_text needs layout='plain': a folded bank belongs to one class set")
        like = self.text_embeddings
        if text_embeddings.ndim != 2 or text_embeddings.shape[1] != like.shape[1] or text_embeddings.shape[0] == 0:
            raise ValueError(f"text_embeddings must be (K, {like.shape[1]}), got {tuple(text_embeddings.shape)}")
        other = copy.copy(self)
        other._buffers = {**self._buffers, "text_embeddings": text_embeddings.detach().to(like)}
        return other

    def forward(self, image_embedding: Tensor) -> HeadOutput:
        """Return the HeadOutput of image_embedding (B, D).

        Each softmax is over all classes at once, as in the ONNX graph. A row with NaN or infinity gets NaN scores and
        class 0, because a ReLU would turn -inf into a plausible number.
        """
        t, v = _wide(self.text_embeddings), self._read(image_embedding)
        if self.query_map is None:
            similarity = v @ t.T  # (B, K)
            logits = self.attention_scale * similarity if self.keys is None else v @ _wide(self.keys).T
        else:  # both products are made in one pass over the rows
            similarity, logits = (torch.stack([v, v @ _wide(self.query_map).T]) @ t.T).unbind(0)
        log_p = torch.log_softmax(self.logit_scale * similarity, dim=-1)
        p = log_p.exp()
        z = None
        if self.attended is not None:
            z = torch.softmax(logits, dim=-1) @ (_wide(self.attended) if self.layout == "folded" else t)
        odds = None if self.prior is None else log_odds(self.logit_scale * similarity)
        g = (p * p).sum(dim=-1)
        return self._finish(v, similarity.argmax(dim=-1), z, odds, p.amax(dim=-1), (p * log_p).sum(dim=-1), g)

    def answer(self, image_embedding: Tensor, rows: slice = slice(None)) -> HeadOutput:
        """Return the HeadOutput of image_embedding (B, D) over these rows of the class set, quickly on a CPU.

        The method reads each block of rows once and merges the softmax states by the rule in softmax_state.py. So it
        makes no (B, K) tensor and no float32 copy of a 16-bit class set.
        """
        v = self._read(image_embedding)
        t = self.text_embeddings[rows]
        keys = None if self.keys is None else self.keys[rows]
        values = self.attended[rows] if self.attended is not None and self.layout == "folded" else t
        # For a small B, MKL multiplies (rows, D) @ (D, B) in half the time of the transposed product.
        factors = v if self.query_map is None else torch.cat([v, v @ _wide(self.query_map).T])
        factors = factors.T.contiguous()
        state: tuple[Tensor, ...] = ()
        for k in range(0, len(t), BLOCK_ROWS):
            block = slice(k, k + BLOCK_ROWS)
            b_t = _wide(t[block])
            products = (b_t @ factors).T.contiguous()
            similarity, logits = products[: len(v)], products[len(v) :]
            best, index = similarity.max(dim=-1)
            x = self.logit_scale * (similarity - best[:, None])
            x.scatter_(1, index[:, None], FAR)  # e^x = 0 there, so the sums leave out the best row
            e = x.exp()
            new = [best, index + k, e.sum(dim=-1), 1 + torch.linalg.vecdot(e, e), torch.linalg.vecdot(e, x)]
            if self.attended is not None:
                if keys is not None:
                    logits = (_wide(keys[block]) @ factors).T
                elif self.query_map is None:
                    logits = self.attention_scale * similarity
                top = logits.amax(dim=-1)
                alpha = (logits - top[:, None]).exp()
                new += [top, alpha.sum(dim=-1), alpha @ (_wide(values[block]) if values is not t else b_t)]
            state = self._merge(state, tuple(new)) if state else tuple(new)
        _, index, r, l2, le, *attention = state
        z = attention[2] / attention[1][:, None] if attention else None
        odds = r.log().clamp(min=LOWEST_LOG_ODDS)
        top = 1 / (1 + r)
        return self._finish(v, index, z, odds, top, top * le - r.log1p(), top.square() * l2, rows)

    def _merge(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Merge the softmax states of rows a and of the rows b that follow them.

        A state is (best, index, r, l2, le), and with attention also its maximum, its sum and its weighted sums.
        """
        rises = b[0] > a[0]
        best = torch.where(rises, b[0], a[0])
        g_a, g_b = (self.logit_scale * (best - x[0]) for x in (a, b))
        c_a, c_b = (-g_a).exp(), (-g_b).exp()
        l_a, l_b = 1 + a[2], 1 + b[2]
        merged = (
            best,
            torch.where(rises, b[1], a[1]),
            torch.where(rises, c_a * l_a + b[2], a[2] + c_b * l_b),
            c_a.square() * a[3] + c_b.square() * b[3],
            c_a * (a[4] - g_a * l_a) + c_b * (b[4] - g_b * l_b),
        )
        if len(a) == 5:
            return merged
        top = torch.maximum(a[5], b[5])
        c_a, c_b = (a[5] - top).exp(), (b[5] - top).exp()
        return (*merged, top, c_a * a[6] + c_b * b[6], c_a[:, None] * a[7] + c_b[:, None] * b[7])

    def _read(self, image_embedding: Tensor) -> Tensor:
        """Round to the class set's type, as the kernels do, then widen to at least float32."""
        return _wide(image_embedding.to(self.text_embeddings.dtype))

    def _finish(
        self, v: Tensor, index: Tensor, z: Tensor | None, odds: Tensor | None, top: Tensor, entropy: Tensor, g: Tensor,
        rows: slice = slice(None),
    ) -> HeadOutput:  # fmt: skip
        """Make the HeadOutput.

        Args:
            v: image embeddings (B, D).
            index: CLIP's predictions (B,), within `rows`.
            z: the attention's weighted sums (B, D), or (B, H) when folded; None without attention.
            odds: CLIP's log-odds of being right (B,); None without a prior.
            top: max p (B,).
            entropy: Σ p log p (B,).
            g: Σ p² (B,).
            rows: the rows of the class set that were read.
        """
        finite = torch.isfinite(v).all(dim=-1)
        index = torch.where(finite, index, 0)
        t = self.text_embeddings[rows]
        h = _wide(self.bias).expand(v.shape[0], -1)
        if self.image_weight is not None:
            h = h + v @ _wide(self.image_weight).T
        if self.predicted is not None:
            if self.layout == "folded":
                h = h + _wide(self.predicted[rows][index])
            else:
                h = h + _wide(t[index]) @ _wide(self.predicted).T
        if z is not None and self.attended is not None:
            h = h + (z if self.layout == "folded" else z @ _wide(self.attended).T)
        for layer in self.tail:
            if isinstance(layer, nn.Linear):
                h = nn.functional.linear(h, _wide(layer.weight), _wide(layer.bias))
            else:
                h = layer(h)
        logit = h.squeeze(-1)
        if self.prior is not None and odds is not None:
            logit = logit + self.prior * odds
        # log K is a tensor, because K is symbolic where the class set is a graph's input. At K = 1 the entropy is 0, so
        # any positive divisor will do.
        spread = torch.full((), t.shape[0], dtype=top.dtype, device=top.device).log().clamp(min=math.log(2))
        scores = (torch.sigmoid(logit), top, entropy / spread, -(1 - g) / g)
        failure, confidence, entropy, doctor = (torch.where(finite, score, math.nan) for score in scores)
        return HeadOutput(failure, index, confidence, entropy, doctor)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# Above this many classes, reading the (K, 2H) precomputed rows costs more than the one (H, D) product that they save.
FOLDED_MAX_CLASSES = 4096


def fold(
    head: ViLUHead, text_embeddings: Tensor, *, logit_scale: float | None = None, layout: str | None = None
) -> FoldedHead:
    """Combine a head with a class set, for `fused_head`.

    Args:
        head: the eager head.
        text_embeddings: the L2-normalised class set (K, D). Its type (float64, float32, float16 or bfloat16) becomes
            the type of every stored tensor.
        logit_scale: factor that CLIP puts on the cosine v · t; None stands for the head's own
            (`ViLUHead.clip_scale`).
        layout: "folded" or "plain"; None stands for "folded" up to `FOLDED_MAX_CLASSES` classes and "plain" above.

    Raises:
        ValueError: the layout is unknown, the text embeddings do not fit the head, or the logit scale differs from
            the one that the head's prior was trained at.

    Example:
        >>> import torch
        >>> from vilu import ViLUHead
        >>> from vilu.kernels import fold
        >>> folded = fold(ViLUHead(8, hidden=(16, 4)), torch.eye(3, 8))
        >>> folded.layout, tuple(folded.predicted.shape)
        ('folded', (3, 16))
        >>> output = folded(torch.eye(3, 8)[:1])  # plain PyTorch; fused_head(image_embedding, folded) on any device
        >>> int(output.class_index)
        0
    """
    if layout is None:
        layout = "folded" if len(text_embeddings) <= FOLDED_MAX_CLASSES else "plain"
    scale = head.clip_scale if logit_scale is None else logit_scale
    return FoldedHead(head, text_embeddings, logit_scale=scale, layout=layout)
