"""The ViLU head: from CLIP's embeddings to the logit that CLIP's zero-shot answer is wrong.

Source: ViLU (arXiv 2507.07620, ICCV 2025), section 3; where the authors' code differs from the
paper, one parametrisation covers both: (W_Q, W_K, W_V, attention scale).

    alpha = softmax(attention_scale · (W_Q v) · (W_K t_j))        over the K candidates
    z     = Σ_j alpha_j W_V t_j
    logit = MLP([v, t_pred, z])          t_pred = t[argmax_j v · t_j], both unprojected
    P(failure) = sigmoid(logit)

| form          | projections                         | attention_scale      |
|---------------|-------------------------------------|----------------------|
| authors' code | "shared": W_Q, and W_K = W_V        | CLIP's logit scale   |
| same, frozen  | "identity": none                    | CLIP's logit scale   |
| paper         | "separate": W_Q, W_K, W_V           | 1 / sqrt(dim)        |

Beyond the paper, a head may start from what CLIP itself knows, and learn a correction to it:

    logit = MLP([v, t_pred, z]) + prior · log((1 − p) / p)      p = max softmax(logit_scale · v · t_j), MCM

With an MLP that gives 0 it ranks exactly as MCM does. A head without the prior needs thousands of images to get there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

PARTS = ("image", "predicted", "attended")
PROJECTIONS = ("identity", "shared", "separate")
LOWEST_LOG_ODDS = -30.0  # the least value of the prior, which would be -inf with a single candidate


class ViLUHead(nn.Module):
    """The failure predictor on L2-normalised CLIP embeddings, in eager PyTorch and float32.

    Everything faster is compared with this class.

    Args:
        dim: width D of CLIP's joint embedding space.
        hidden: widths of the hidden layers of the MLP (with ReLU between them).
        parts: what the MLP reads, in this column order; ("image",) alone is LVU, the visual-only head.
        projection: "identity", "shared" or "separate" (see the table above); the matrices start as the identity.
        attention_scale: factor on the attention logits.
        logit_scale: CLIP's factor on v · t, for a head with the prior, whose weight starts at 1; None: no prior.

    Raises:
        ValueError: an unknown part or projection, a width below 1, or a scale that is not positive and finite.

    Source: ViLU (arXiv 2507.07620), section 3, and the authors' code (github.com/ykrmm/ViLU).

    Example:
        >>> head = ViLUHead(dim=4, hidden=(8,))
        >>> image_embedding = nn.functional.normalize(torch.ones(2, 4), dim=1)
        >>> text_embeddings = torch.eye(4)[:3]
        >>> head(image_embedding, text_embeddings).shape
        torch.Size([2])
        >>> bool((head.failure_probability(image_embedding, text_embeddings) < 1).all())
        True
    """

    query: nn.Linear | None
    key: nn.Linear | None
    value: nn.Linear | None
    prior: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] = (512, 256, 128),
        parts: Sequence[str] = PARTS,
        projection: str = "shared",
        attention_scale: float = 100.0,
        logit_scale: float | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"dim and hidden widths must be at least 1, got dim={dim}, hidden={tuple(hidden)}")
        if not parts or tuple(parts) != tuple(p for p in PARTS if p in parts):
            raise ValueError(f"parts must be a selection of {PARTS} in that order, got {tuple(parts)}")
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
        for name, scale in (("attention_scale", attention_scale), ("logit_scale", logit_scale)):
            if scale is not None and not 0 < scale < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {scale}")
        self.dim = dim
        self.hidden = tuple(hidden)
        self.parts = tuple(parts)
        self.projection = projection if "attended" in self.parts else "identity"
        self.attention_scale = float(attention_scale)
        self.logit_scale = None if logit_scale is None else float(logit_scale)
        self.register_parameter("prior", None if logit_scale is None else nn.Parameter(torch.ones(1)))

        wanted = {"identity": (), "shared": ("query", "key"), "separate": ("query", "key", "value")}
        for name in ("query", "key", "value"):
            layer = nn.Linear(dim, dim, bias=False) if name in wanted[self.projection] else None
            if layer is not None:
                nn.init.eye_(layer.weight)
            setattr(self, name, layer)

        layers: list[nn.Module] = []
        width = dim * len(self.parts)
        for out in self.hidden:
            layers += [nn.Linear(width, out), nn.ReLU()]
            width = out
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))

    @property
    def reads_text(self) -> bool:
        """Whether `forward` needs text_embeddings. Only a visual-only head without the prior does not."""
        return self.parts != ("image",) or self.prior is not None

    @property
    def clip_scale(self) -> float:
        """CLIP's factor on v · t, as far as the head knows it.

        It is the prior's scale, or else the attention's, as in the authors' code. A head of the paper's form without
        the prior attends at 1 / sqrt(dim), so it does not know CLIP's factor; OpenAI's 100 then stands for it.
        """
        if self.logit_scale is not None:
            return self.logit_scale
        return 100.0 if math.isclose(self.attention_scale, self.dim**-0.5) else self.attention_scale

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer of the MLP; its output is the logit, before the prior is added."""
        return cast(nn.Linear, self.mlp[-1])

    def config(self) -> dict[str, object]:
        """The constructor arguments that rebuild this head, in JSON types."""
        return {
            "dim": self.dim,
            "hidden": list(self.hidden),
            "parts": list(self.parts),
            "projection": self.projection,
            "attention_scale": self.attention_scale,
            "logit_scale": self.logit_scale,
        }

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_Q, W_K and W_V, each (D, D); the identity where the head has no such matrix."""
        like = next(self.mlp.parameters())
        eye = torch.eye(self.dim, dtype=like.dtype, device=like.device)
        query = eye if self.query is None else self.query.weight
        key = eye if self.key is None else self.key.weight
        value = key if self.value is None else self.value.weight
        return query, key, value

    def attend(self, image_embedding: Tensor, text_embeddings: Tensor) -> Tensor:
        """z (B, D): for each image (B, D), the attention over the K candidates (K, D)."""
        q = image_embedding if self.query is None else self.query(image_embedding)
        k = text_embeddings if self.key is None else self.key(text_embeddings)
        v = k if self.value is None else self.value(text_embeddings)
        return torch.softmax(self.attention_scale * q @ k.T, dim=-1) @ v

    def forward(self, image_embedding: Tensor, text_embeddings: Tensor | None = None) -> Tensor:
        """The failure logit (B,): the higher, the more likely CLIP's zero-shot answer is wrong.

        Args:
            image_embedding: (B, D), L2-normalised.
            text_embeddings: (K, D), L2-normalised, K at least 1; a visual-only head without the prior does not read it.

        Raises:
            ValueError: a width other than `dim`, or text embeddings that are missing or empty.
        """
        if image_embedding.ndim != 2 or image_embedding.shape[1] != self.dim:
            raise ValueError(f"image_embedding must be (B, {self.dim}), got {tuple(image_embedding.shape)}")
        columns = []
        prior = None
        if "image" in self.parts:
            columns.append(image_embedding)
        if self.reads_text:
            if text_embeddings is None:
                raise ValueError(f"this head reads {self.parts}: text_embeddings (K, {self.dim}) are needed")
            if text_embeddings.ndim != 2 or text_embeddings.shape[1] != self.dim or not len(text_embeddings):
                raise ValueError(f"text_embeddings must be (K, {self.dim}), got {tuple(text_embeddings.shape)}")
            similarity = image_embedding @ text_embeddings.T
            if "predicted" in self.parts:
                columns.append(text_embeddings[similarity.argmax(dim=-1)])
            if "attended" in self.parts:
                columns.append(self.attend(image_embedding, text_embeddings))
            if self.prior is not None and self.logit_scale is not None:
                prior = self.prior * log_odds(self.logit_scale * similarity)
        logit = self.mlp(torch.cat(columns, dim=-1)).squeeze(-1)
        return logit if prior is None else logit + prior

    def failure_probability(self, image_embedding: Tensor, text_embeddings: Tensor | None = None) -> Tensor:
        """P(failure) (B,), in [0, 1]: the sigmoid of the failure logit; arguments and errors as in `forward`."""
        return torch.sigmoid(self(image_embedding, text_embeddings))


def log_odds(logits: Tensor) -> Tensor:
    """CLIP's own log-odds of being wrong (B,), from its logits (B, K): log((1 − p) / p) with p = max softmax(logits).

    1 − p is summed over the other candidates, so the result stays exact where p rounds to 1. It is never below
    LOWEST_LOG_ODDS.
    """
    top, index = logits.max(dim=-1, keepdim=True)
    others = torch.where(torch.arange(logits.shape[-1], device=logits.device) == index, -torch.inf, logits)
    return (others.logsumexp(dim=-1) - top.squeeze(-1)).clamp(min=LOWEST_LOG_ODDS)
