"""Scores that are small networks over the embeddings: ViLU itself, LVU and ConfidNet."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilu.embeddings import Embeddings
from vilu.errors import UserError
from vilu.head import ViLUHead
from vilu.scores.base import Score
from vilu.scores.network import Batch, Training, check_width, mlp_network, seeded, split, train


class ViLU(Score):
    """1 − P(failure) of a trained head, in float64, as in float32 all P(failure) below 6e-8 would tie.

    `logit_scale` is not read, as the head holds its own attention scale.

    Args:
        head: the trained head; it is copied.

    Reference: ViLU (arXiv 2507.07620), section 3.
    """

    name = "ViLU"

    def __init__(self, head: ViLUHead) -> None:
        self.head = copy.deepcopy(head).float().eval().requires_grad_(False)

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        head = self.head.to(image.normalised.device)
        check_width(self.name, head.dim, image)
        return 1 - head.failure_probability(image.normalised, text.normalised).double()


class LVU(Score):
    """Learned visual uncertainty: the failure MLP on the image embedding alone, D-512-256-128-1.

    The confidence is 1 − P(failure), in float64 as for ViLU.

    Args:
        loss: "bce", the weighted binary cross-entropy of P(failure) that also trains the ViLU head; or "mse",
            (1 − P(failure) − p[true class])² with CLIP's probabilities p.
        training: settings of the training; None: the defaults, with weight decay 0.01.

    Raises:
        UserError: another loss; in `fit`, "bce" on data where CLIP is always right or always wrong ("mse" can learn
            from such data).

    Reference: ViLU (arXiv 2507.07620), sections 4.1 and 4.3; the MSE form after Lahlou et al., "DEUP: Direct
    Epistemic Uncertainty Prediction", TMLR 2023.
    """

    needs_fit = True

    def __init__(self, loss: str = "bce", training: Training | None = None) -> None:
        if loss not in ("bce", "mse"):
            raise UserError(f"LVU: loss must be 'bce' or 'mse', got {loss!r}")
        self.name = f"LVU-{loss.upper()}"
        self.form = loss
        self.training = training or Training(weight_decay=1e-2)

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        v, t = image.normalised, text.normalised
        head = seeded(lambda: ViLUHead(v.shape[1], parts=("image",)), self.training.seed).to(v.device)
        if self.form == "bce":
            size = self.training.batch_size
            batches = split(torch.arange(len(v)), v, labels, t, scale, size)
            failures = sum(int(batch.wrong().sum()) for batch in batches)
            if failures in (0, len(v)):
                side = "wrong" if failures else "right"
                raise UserError(f"{self.name}: CLIP is {side} on all {len(v)} training samples; both kinds are needed")
        train(head, lambda batch: self.loss(head, batch), v, labels, t, scale, self.training)
        self.head = head

    def loss(self, head: ViLUHead, batch: Batch) -> Tensor:
        """The training loss of a batch; for "bce" a wrong sample has weight log(1 + n_right / n_wrong)."""
        logit = head(batch.image)
        if self.form == "mse":
            return F.mse_loss(torch.sigmoid(-logit), batch.target_probability())
        wrong = batch.wrong()
        weight = torch.where(wrong, torch.log1p((~wrong).sum() / wrong.sum().clamp(min=1)), 1.0)
        return F.binary_cross_entropy_with_logits(logit, wrong.float(), weight)

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        head = self.head.to(image.normalised.device)
        check_width(self.name, head.dim, image)
        return 1 - head.failure_probability(image.normalised).double()


class ConfidNet(Score):
    """The sigmoid of an MLP D-400-400-400-400-1 on v, regressed on CLIP's probability of the true class.

    The loss is a weighted mean squared error.

    Args:
        failure_weight: weight of the wrong samples; None: (1 + exp(4 · (accuracy − 1/2))) / 2 with the accuracy of the
            batch, as ViLU's authors weight an MSE.
        training: settings of the training; None: the defaults, with learning rate 1e-4.

    Raises:
        UserError: a weight that is not positive and finite.

    Reference: Corbière et al., "Addressing Failure Prediction by Learning Model Confidence", NeurIPS 2019,
    section 2.2 and its code's `SelfConfidMSELoss`.
    """

    name = "ConfidNet"
    needs_fit = True

    def __init__(self, failure_weight: float | None = None, training: Training | None = None) -> None:
        if failure_weight is not None and not 0 < failure_weight < math.inf:
            raise UserError(f"ConfidNet: failure_weight must be positive and finite, got {failure_weight}")
        self.failure_weight = failure_weight
        self.training = training or Training(learning_rate=1e-4)

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        v = image.normalised
        self.dim = v.shape[1]
        mlp = seeded(lambda: mlp_network(self.dim, (400, 400, 400, 400)), self.training.seed).to(v.device)

        train(mlp, lambda batch: self.loss(mlp, batch), v, labels, text.normalised, scale, self.training)
        self.mlp = mlp

    def loss(self, mlp: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch."""
        wrong = batch.wrong()
        weight = self.failure_weight
        if weight is None:
            weight = (1 + math.exp(4 * (float((~wrong).float().mean()) - 0.5))) / 2
        error = torch.sigmoid(mlp(batch.image).squeeze(-1)) - batch.target_probability()
        return (torch.where(wrong, weight, 1.0) * error.square()).mean()

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        check_width(self.name, self.dim, image)
        mlp = self.mlp.to(image.normalised.device)
        return torch.sigmoid(mlp(image.normalised).squeeze(-1))
