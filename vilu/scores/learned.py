"""Scores that are small networks over the embeddings: LVU, ConfidNet, ProbVLM, and ViLU itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilu.embeddings import Embeddings
from vilu.errors import UserError
from vilu.head import ViLUHead
from vilu.scores.base import Score, probabilities
from vilu.seeding import seeded

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Training:
    """How a score's network is trained: Adam with decoupled weight decay, cosine to zero, best epoch kept.

    validation: share of the samples cut off by the seed; the epoch with the lowest loss on it is kept.
    In caption mode batch_size is also the number of candidates.
    """

    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    validation: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Images (B, D), their candidates (K, D), and which candidate is each image's own (B,)."""

    image: Tensor
    text: Tensor
    target: Tensor
    scale: float
    captions: bool

    def wrong(self) -> Tensor:
        """(B,) bool: CLIP's answer is not the target; a tie with the target counts as right among captions."""
        logits = self.image @ self.text.T
        if self.captions:
            return logits.diagonal() < logits.amax(dim=-1)
        return logits.argmax(dim=-1) != self.target

    def target_probability(self) -> Tensor:
        """p[true class] (B,)."""
        p = probabilities(self.image, self.text, self.scale)
        return p.gather(1, self.target[:, None]).squeeze(1)


def split(rows: Tensor, image: Tensor, labels: Tensor | None, text: Tensor, scale: float, size: int) -> Iterator[Batch]:
    """The samples `rows` in batches of `size`; without labels the candidates are the batch's own texts."""
    for some in rows.to(image.device).split(size):
        if labels is not None:
            yield Batch(image[some], text, labels[some], scale, captions=False)
        elif len(some) > 1:  # one caption alone is its own and only candidate
            own = torch.arange(len(some), device=image.device)
            yield Batch(image[some], text[some], own, scale, captions=True)


def train(
    network: nn.Module,
    loss: Callable[[Batch], Tensor],
    image: Tensor,
    labels: Tensor | None,
    text: Tensor,
    scale: float,
    training: Training,
) -> None:
    """Minimise the mean of `loss` over batches in place; leaves the best epoch, in evaluation mode, frozen.

    Raises:
        UserError: fewer than four samples, settings out of range, or a loss that is no longer finite.
    """
    if len(image) < 4:
        raise UserError(f"training needs at least 4 samples, got {len(image)}")
    if training.epochs < 1 or training.batch_size < 2 or not 0 < training.validation < 1:
        raise UserError(f"epochs >= 1, batch_size >= 2 and validation in (0, 1) are needed, got {training}")
    generator = torch.Generator().manual_seed(training.seed)

    def batches(rows: Tensor) -> Iterator[Batch]:
        return split(rows, image, labels, text, scale, training.batch_size)

    order = torch.randperm(len(image), generator=generator)
    held = min(max(2, round(training.validation * len(image))), len(image) - 2)
    validation, rest = order[:held], order[held:]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=training.epochs)
    best_loss, best = math.inf, copy.deepcopy(network.state_dict())
    with seeded(training.seed, image.device):  # dropout draws from the global generator
        for _ in range(training.epochs):
            network.train()
            for batch in batches(rest[torch.randperm(len(rest), generator=generator)]):
                value = loss(batch)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            schedule.step()
            network.eval()
            with torch.no_grad():
                sums = [(float(loss(batch)) * len(batch.image), len(batch.image)) for batch in batches(validation)]
            epoch_loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
            if not math.isfinite(epoch_loss):
                raise UserError(f"training diverged (loss {epoch_loss}): lower the learning rate")
            if epoch_loss < best_loss:
                best_loss, best = epoch_loss, copy.deepcopy(network.state_dict())
    network.load_state_dict(best)
    network.eval().requires_grad_(False)


class ViLU(Score):
    """1 − P(failure) of a trained head, in float64: in float32 every P(failure) below 6e-8 would tie.

    `logit_scale` is not read: the head carries its own attention scale.

    Reference: ViLU (arXiv 2507.07620), section 3.
    """

    name = "ViLU"

    def __init__(self, head: ViLUHead) -> None:
        self.head = copy.deepcopy(head).float().eval().requires_grad_(False)

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        head = self.head.to(image.normalised.device)
        _same_width(self.name, head.dim, image)
        return 1 - head.failure_probability(image.normalised, text.normalised).double()


class LVU(Score):
    """Learned visual uncertainty: the failure MLP on the image embedding alone, D-512-256-128-1.

    loss "bce": weighted binary cross-entropy of P(failure) against failure, as the ViLU head's.
    loss "mse": (1 − P(failure) − p[true class])², where p is CLIP's softmax.
    confidence = 1 − P(failure), float64 as ViLU's.

    Raises:
        UserError: fitting "bce" on data in which CLIP is always right or always wrong. "mse" has a target there.

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
        head = _seeded(lambda: ViLUHead(v.shape[1], parts=("image",)), self.training.seed).to(v.device)
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
        """The training loss of one batch; "bce" weighs wrong samples by log(1 + n_right / n_wrong) in the batch."""
        logit = head(batch.image)
        if self.form == "mse":
            return F.mse_loss(torch.sigmoid(-logit), batch.target_probability())
        wrong = batch.wrong()
        weight = torch.where(wrong, torch.log1p((~wrong).sum() / wrong.sum().clamp(min=1)), 1.0)
        return F.binary_cross_entropy_with_logits(logit, wrong.float(), weight)

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        head = self.head.to(image.normalised.device)
        _same_width(self.name, head.dim, image)
        return 1 - head.failure_probability(image.normalised).double()


class ConfidNet(Score):
    """sigmoid of an MLP D-400-400-400-400-1 on v, regressed on p[true class] by weighted MSE; Adam, lr 1e-4.

    Wrong samples weigh `failure_weight`; None: (1 + exp(4 · (accuracy − 1/2))) / 2 with the batch's accuracy,
    as ViLU's authors weight an MSE.

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
        mlp = _seeded(lambda: _mlp(self.dim, (400, 400, 400, 400)), self.training.seed).to(v.device)

        train(mlp, lambda batch: self.loss(mlp, batch), v, labels, text.normalised, scale, self.training)
        self.mlp = mlp

    def loss(self, mlp: nn.Module, batch: Batch) -> Tensor:
        """The training loss of one batch."""
        wrong = batch.wrong()
        weight = self.failure_weight
        if weight is None:
            weight = (1 + math.exp(4 * (float((~wrong).float().mean()) - 0.5))) / 2
        error = torch.sigmoid(mlp(batch.image).squeeze(-1)) - batch.target_probability()
        return (torch.where(wrong, weight, 1.0) * error.square()).mean()

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        _same_width(self.name, self.dim, image)
        mlp = self.mlp.to(image.normalised.device)
        return torch.sigmoid(mlp(image.normalised).squeeze(-1))


class Adapter(nn.Module):
    """z (N, D) to the mean, log alpha and beta of a generalised Gaussian, each (N, D), around z.

    D-256-256-D with a residual, then one two-layer head each for mu, 1/alpha and beta. Softplus keeps 1/alpha and
    beta positive, above 1e-3 and 0.1: the authors' ReLU leaves them at 1e-4, where Γ(3/beta) overflows.
    """

    def __init__(self, dim: int, hidden: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, dim)
        self.mu, self.inverse_alpha, self.beta = (
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(3)
        )
        self.dropout = dropout

    def forward(self, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """keep: (256,) or (N, 256) factors on the second hidden layer, drawn by dropout where not given."""
        hidden = F.relu(self.middle(F.relu(self.down(z))))
        hidden = F.dropout(hidden, self.dropout, self.training) if keep is None else hidden * keep
        h = z + self.up(hidden)
        return self.mu(h), -torch.log(F.softplus(self.inverse_alpha(h)) + 1e-3), F.softplus(self.beta(h)) + 0.1


def generalised_gaussian_nll(z: Tensor, mu: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
    """(|z − mu| / alpha)^beta − log beta + log alpha + lnΓ(1/beta), elementwise; log 2 is left out.

    The residual is held above 1e-4, where the gradient of its power has no bound for beta < 1, and the power
    below 1e3, as its authors do.

    Reference: ProbVLM, equation 4.
    """
    log_residual = (z - mu).abs().clamp(min=1e-12).log() - log_alpha
    # Clamped as a logarithm: an infinite power has a NaN gradient even where its value is clamped.
    power = (beta * log_residual.clamp(min=math.log(1e-4))).clamp(max=math.log(1e3)).exp()
    return power - beta.log() + log_alpha + torch.lgamma(1 / beta)


class ProbVLM(Score):
    """−(aleatoric + epistemic variance) of the image embedding under an adapter trained to reproduce it.

    aleatoric: mean over d and dropout passes of alpha² Γ(3/beta) / Γ(1/beta), a generalised Gaussian's
    variance; epistemic: mean over d of the variance of mu over the passes. The image's `Adapter` is trained with
    L1 + 0.05 · NLL to its own embedding plus 1e-4 of the same to its class's or its own text; Adam, lr 1e-4, batches
    of 64. The text's adapter shares no weight with it, so it is not made. The dropout masks of a pass are drawn from
    the seed and shared by all images, so an answer does not depend on the batch it rides in.

    Knows nothing of the candidates, and may rank below chance: the variance grows with v's distance from the mean of
    the training images, and CLIP fails near it, between the classes. On the embedded default −distance alone has AUC
    21% on digits and 25% on shapes, inside the train split; the authors' loss leaves this score below chance too.

    Args:
        passes: dropout passes, at least 2.

    Reference: Upadhyay et al., "ProbVLM: Probabilistic Adapter for Frozen Vision-Language Models", ICCV 2023,
    section 3; loss weights from its code (`train_probVLM.py`).
    """

    name = "ProbVLM"
    needs_fit = True

    def __init__(self, passes: int = 10, training: Training | None = None) -> None:
        if passes < 2:
            raise UserError(f"ProbVLM: passes must be at least 2, got {passes}")
        self.passes = passes
        self.training = training or Training(learning_rate=1e-4, batch_size=64)

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        v = image.normalised
        adapter = _seeded(lambda: Adapter(v.shape[1]), self.training.seed).to(v.device)

        def reconstruction(law: tuple[Tensor, Tensor, Tensor], z: Tensor) -> Tensor:
            return F.l1_loss(law[0], z) + 0.05 * generalised_gaussian_nll(z, *law).mean()

        def loss(batch: Batch) -> Tensor:
            law = adapter(batch.image)
            return reconstruction(law, batch.image) + 1e-4 * reconstruction(law, batch.text[batch.target])

        train(adapter, loss, v, labels, text.normalised, scale, self.training)
        self.adapter = adapter
        generator = torch.Generator().manual_seed(self.training.seed)
        kept = torch.rand(self.passes, self.adapter.down.out_features, generator=generator) >= self.adapter.dropout
        self.masks = kept.float() / (1 - self.adapter.dropout)

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        v = image.normalised
        _same_width(self.name, self.adapter.down.in_features, image)
        adapter = self.adapter.to(v.device)
        aleatoric = torch.zeros(len(v), device=v.device)
        means = []
        for mask in self.masks.to(v.device):
            mu, log_alpha, beta = adapter(v, mask)
            variance = torch.exp(2 * log_alpha + torch.lgamma(3 / beta) - torch.lgamma(1 / beta))
            aleatoric += variance.mean(dim=-1) / self.passes
            means.append(mu)
        return -(aleatoric + torch.stack(means).var(dim=0, correction=0).mean(dim=-1))


def _mlp(width: int, hidden: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out in hidden:
        layers += [nn.Linear(width, out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, 1))


def _seeded(build: Callable[[], Network], seed: int) -> Network:
    with seeded(seed):
        return build()


def _same_width(name: str, dim: int, image: Embeddings) -> None:
    if image.normalised.shape[1] != dim:
        raise UserError(f"{name} reads embeddings {dim} wide, got {image.normalised.shape[1]}")
