"""The authors' head and training loop, transcribed once from their release (ykrmm/ViLU) for every comparison with it.

Sources: `models/vilu_attn.py` (the head) and `vilu/engine/trainer.py` (the loop). Operations stand in their order, so
that what they cost is what theirs cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilu import ViLUHead
from vilu.embeddings import EmbeddedSet
from vilu.recipes import Recipe

SCALE = 100.0  # on the similarities and on the attention


class AuthorsHead(nn.Module):
    """Their head: all K texts projected for every batch, both softmaxes whole, topk of one.

    Their logit is high where CLIP is right, and their MLP reads [v, z, t_pred].

    Args:
        dim: width D of the embeddings.
        hidden: widths of the MLP's hidden layers.
        frozen: whether the projections are not trained yet (or never, as on ImageNet): they are computed all the same,
            multiplied by zero and added to what was not projected.
    """

    iteration_count: Tensor

    def __init__(self, dim: int, hidden: Sequence[int] = (512, 256, 128), frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen
        self.register_buffer("iteration_count", torch.tensor(0))
        layers: list[nn.Module] = []
        for width, out in itertools.pairwise((3 * dim, *hidden)):
            layers += [nn.Linear(width, out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))
        self.in_proj_v, self.in_proj_t = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.in_proj_v.weight)
        nn.init.eye_(self.in_proj_t.weight)

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(logit that CLIP is right (B,), CLIP's class index (B,)) of image embeddings (B, D) and texts (K, D)."""
        if self.training:
            self.iteration_count += 1
        if self.frozen:
            q, k = self.in_proj_v(v) * 0 + v, self.in_proj_t(t) * 0 + t
        else:
            q, k = self.in_proj_v(v), self.in_proj_t(t)
        x = torch.cat((v, F.softmax(SCALE * q @ k.t(), dim=-1) @ k), dim=1)
        _, predicted = F.softmax(SCALE * v @ t.t(), dim=-1).topk(1, 1, True, True)
        index = predicted[:, 0]
        return self.mlp(torch.cat((x, t[index]), dim=1)).squeeze(-1), index


class AuthorsFailureProbability(nn.Module):
    """P(failure) and CLIP's class index by the authors' forward, with the weights of a head of ours in their form.

    The last layer is ours, and so is the sign of the logit: high where CLIP is wrong.
    """

    def __init__(self, head: ViLUHead) -> None:
        super().__init__()
        if not is_authors_form(head):
            raise ValueError("the head is not of the authors' form")
        like = next(head.parameters())
        self.model = AuthorsHead(head.dim, head.hidden).to(device=like.device, dtype=like.dtype)
        weights = {f"mlp.{name}": value.clone() for name, value in head.mlp.state_dict().items()}
        image, predicted, attended = weights["mlp.0.weight"].split(head.dim, dim=1)
        weights["mlp.0.weight"] = torch.cat([image, attended, predicted], dim=1)
        assert head.query is not None
        assert head.key is not None
        weights |= {"in_proj_v.weight": head.query.weight, "in_proj_t.weight": head.key.weight}
        self.model.load_state_dict(weights | {"iteration_count": self.model.iteration_count})
        self.eval().requires_grad_(False)

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logit, index = self.model(v, t)
        return torch.sigmoid(logit), index


def is_authors_form(head: ViLUHead) -> bool:
    """Whether a head of ours computes what the authors' head does: shared projections, all parts, no prior."""
    whole = head.projection == "shared" and len(head.parts) == 3
    return whole and head.prior is None and head.attention_scale == SCALE


class AuthorsLoop:
    """Their epoch in parts: the text features, and the steps, with and without what they measure in each.

    Args:
        data: the embeddings and labels to train on; they are held in memory as float32.
        clip: makes the text features anew.
        autocast: computes under bfloat16 autocast, as they do.
    """

    def __init__(self, data: EmbeddedSet, recipe: Recipe, frozen: bool, clip: Any, autocast: bool = False) -> None:
        assert data.labels is not None
        self.image, self.labels, self.text = data.image.normalised.float(), data.labels, data.text.normalised
        self.batch, self.clip, self.autocast = recipe.batch_size, clip, autocast
        self.model = AuthorsHead(self.image.shape[1], frozen=frozen).train()
        options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        if recipe.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), momentum=recipe.momentum, **options)
        self.metrics = 0.0

    def text_features(self, prompts: int) -> float:
        """Seconds to tokenize and encode this many prompts."""
        started = time.perf_counter()
        with torch.no_grad(), self._cast():
            features = self.clip.encode_tokens(self.clip.tokenize([f"a photo of a thing {i}." for i in range(prompts)]))
            features /= features.norm(dim=-1, keepdim=True)
        return time.perf_counter() - started

    def steps(self, rows: Tensor) -> tuple[float, float]:
        """Seconds of the steps over these rows, a multiple of the batch size, and those spent on their metrics."""
        self.metrics, started = 0.0, time.perf_counter()
        for chosen in rows.split(self.batch):
            self._step(self.image[chosen], self.labels[chosen])
        return time.perf_counter() - started, self.metrics

    def _step(self, v: Tensor, labels: Tensor) -> None:
        with torch.no_grad(), self._cast():
            probs = torch.softmax(SCALE * v @ self.text.t(), dim=-1)
        with self._cast():
            scores, _ = self.model(v, self.text)
            correct = labels == probs.argmax(dim=-1)
            weights = torch.ones_like(probs[:, 0])
            accuracy = correct.float().mean()
            weights[~correct] *= torch.log(1 + accuracy / (1 - accuracy))
            loss = F.binary_cross_entropy_with_logits(scores, correct.float(), weights)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        started = time.perf_counter()
        wrong = labels != probs.argmax(dim=-1)
        _score_step(scores[~wrong].detach().float().numpy(), scores[wrong].detach().float().numpy())
        loss.item()
        self.metrics += time.perf_counter() - started

    def _cast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


def _score_step(success: np.ndarray, failure: np.ndarray) -> None:
    """FPR at 95% TPR, then AUC, each from a concatenation of its own: what they compute in every step."""
    import sklearn.metrics
    from scipy.interpolate import interp1d

    def both() -> tuple[list[int], np.ndarray]:
        return [1] * len(success) + [0] * len(failure), np.concatenate((success, failure))

    if len(success) and len(failure):
        fpr, tpr, _ = sklearn.metrics.roc_curve(*both())
        float(interp1d(tpr, fpr)(0.95))
        sklearn.metrics.roc_auc_score(*both())
