"""Training of the small networks that some scores learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from vilu import seeding
from vilu.embeddings import Embeddings
from vilu.errors import UserError
from vilu.scores.base import probabilities

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Training:
    """How the network of a score is trained, by Adam with a cosine schedule to 0; the best epoch is kept.

    epochs: passes over the data.
    batch_size: samples in a batch; for captions also the number of candidates.
    learning_rate: the learning rate at the start.
    weight_decay: decoupled weight decay.
    validation: share of the samples, drawn by the seed, whose loss chooses the best epoch.
    seed: seed of that share, the first weights, the order of the samples and dropout.
    """

    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    validation: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """B images with their candidates.

    image: (B, D).
    text: (K, D), the candidates.
    target: (B,), the row of `text` that is right for each image.
    scale: CLIP's factor on v · t.
    captions: whether the candidates are the captions of the images, in the same order.
    """

    image: Tensor
    text: Tensor
    target: Tensor
    scale: float
    captions: bool

    def wrong(self) -> Tensor:
        """(B,) bool, whether CLIP's answer is wrong; among captions, a tie with the target counts as right."""
        logits = self.image @ self.text.T
        if self.captions:
            return logits.diagonal() < logits.amax(dim=-1)
        return logits.argmax(dim=-1) != self.target

    def target_probability(self) -> Tensor:
        """CLIP's probability of the target (B,)."""
        p = probabilities(self.image, self.text, self.scale)
        return p.gather(1, self.target[:, None]).squeeze(1)


def split(rows: Tensor, image: Tensor, labels: Tensor | None, text: Tensor, scale: float, size: int) -> Iterator[Batch]:
    """The samples `rows` in batches of `size`; without labels, the candidates are the texts of the batch."""
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
    """Train a network in place; it ends with the weights of its best epoch, in evaluation mode and frozen.

    Args:
        network: what is trained.
        loss: the mean loss over a batch.
        image: (N, D).
        labels: (N,) int64, or None for captions.
        text: (K, D) of the class set, or (N, D) captions.
        scale: CLIP's factor on v · t.
        training: settings.

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
    with seeding.seeded(training.seed, image.device):  # dropout draws from the global generator
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


def mlp_network(width: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """An MLP from `width` inputs to one output, with ReLU between its layers."""
    layers: list[nn.Module] = []
    for out in hidden:
        layers += [nn.Linear(width, out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, 1))


def seeded(build: Callable[[], Network], seed: int) -> Network:
    """What `build` returns with this seed; the caller's random state stays as it was."""
    with seeding.seeded(seed):
        return build()


def check_width(name: str, dim: int, image: Embeddings) -> None:
    """Raise UserError unless the embeddings are `dim` wide."""
    if image.normalised.shape[1] != dim:
        raise UserError(f"{name} reads embeddings {dim} wide, got {image.normalised.shape[1]}")
