"""ProbVLM: the variance that an adapter, trained to reproduce CLIP's image embedding, predicts for it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilu.embeddings import Embeddings
from vilu.errors import UserError
from vilu.scores.base import Score
from vilu.scores.network import Batch, Training, check_width, seeded, train


class Adapter(nn.Module):
    """A generalised Gaussian around an embedding z (N, D), predicted by a network: mu, log alpha and beta, each (N, D).

    D-256-256-D with a residual, then a two-layer head for each of mu, 1/alpha and beta. Softplus keeps 1/alpha above
    1e-3 and beta above 0.1; the authors' ReLU lets them fall to 1e-4, where Γ(3/beta) overflows.
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
        """`keep`: (256,) or (N, 256) factors on the second hidden layer; None: dropout draws them."""
        hidden = F.relu(self.middle(F.relu(self.down(z))))
        hidden = F.dropout(hidden, self.dropout, self.training) if keep is None else hidden * keep
        h = z + self.up(hidden)
        return self.mu(h), -torch.log(F.softplus(self.inverse_alpha(h)) + 1e-3), F.softplus(self.beta(h)) + 0.1


def generalised_gaussian_nll(z: Tensor, mu: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
    """Negative log-likelihood of a generalised Gaussian, elementwise and without the constant log 2.

    (|z − mu| / alpha)^beta − log beta + log alpha + lnΓ(1/beta). The scaled residual is kept above 1e-4, as the
    gradient of its power has no bound near 0 for beta < 1, and the power below 1e3, as in the authors' code.

    Reference: Upadhyay et al., "ProbVLM", ICCV 2023, equation 4.
    """
    log_residual = (z - mu).abs().clamp(min=1e-12).log() - log_alpha
    # Clamped as a logarithm: an infinite power has a NaN gradient even where its value is clamped.
    power = (beta * log_residual.clamp(min=math.log(1e-4))).clamp(max=math.log(1e3)).exp()
    return power - beta.log() + log_alpha + torch.lgamma(1 / beta)


class ProbVLM(Score):
    """−(aleatoric + epistemic variance) of the image embedding, by an adapter that is trained to reproduce it.

    The aleatoric variance is alpha² Γ(3/beta) / Γ(1/beta), the variance of a generalised Gaussian, averaged over the D
    dimensions and the dropout passes. The epistemic variance is the variance of mu over the passes, averaged over the
    dimensions. The `Adapter` of the images is trained with L1 + 0.05 · NLL towards the image's embedding, plus 1e-4 of
    the same towards the text of its class or its own caption, by Adam with learning rate 1e-4 and batches of 64. The
    adapter of the texts shares no weight with it and is not needed. All images share the dropout masks of a pass, drawn
    from the seed, so an answer does not depend on the other images of its batch.

    This score does not read the candidates, and may rank below chance: the variance grows with the distance of v from
    the mean of the training images, and CLIP fails near that mean, between the classes. On the embedded default,
    −distance alone has an AUC of 21% on digits and 25% on shapes, on the training split itself; with the authors' loss
    this score ranks below chance too.

    Args:
        passes: number of dropout passes, at least 2.
        training: settings of the training; None: as described above.

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
        adapter = seeded(lambda: Adapter(v.shape[1]), self.training.seed).to(v.device)

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
        check_width(self.name, self.adapter.down.in_features, image)
        adapter = self.adapter.to(v.device)
        aleatoric = torch.zeros(len(v), device=v.device)
        means = []
        for mask in self.masks.to(v.device):
            mu, log_alpha, beta = adapter(v, mask)
            variance = torch.exp(2 * log_alpha + torch.lgamma(3 / beta) - torch.lgamma(1 / beta))
            aleatoric += variance.mean(dim=-1) / self.passes
            means.append(mu)
        return -(aleatoric + torch.stack(means).var(dim=0, correction=0).mean(dim=-1))
