"""The state of one training run: what changes from epoch to epoch, and the file that holds it."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vilu import atomic
from vilu.embeddings import BLOCK, EmbeddedSet
from vilu.errors import UserError
from vilu.head import ViLUHead
from vilu.recipes import Recipe
from vilu.training.validation import HeldOut

STATE_VERSION = 2


class Run:
    """Everything that changes from epoch to epoch, and the file that holds it.

    head: the head in training.
    recipe: settings of the training.
    optimizer, schedule: they change the weights and the learning rate.
    epoch, steps: how many are done.
    best, best_epoch: weights of the best epoch so far, and its number (0: before the first step).
    train_losses: mean training loss of each epoch.
    held_out: predictions for the samples that choose the epoch.
    """

    def __init__(self, head: ViLUHead, recipe: Recipe, epochs: int) -> None:
        self.head, self.recipe = head, recipe
        parameters = list(head.parameters())
        if recipe.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
            )
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
            )

        def rate(epoch: int) -> float:
            warm = 1.0
            if epoch < recipe.warmup_epochs:
                warm = 0.1 + 0.9 * epoch / recipe.warmup_epochs
            return warm * 0.5 * (1 + math.cos(math.pi * epoch / epochs))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.epoch = self.steps = self.best_epoch = 0
        self.best = copy.deepcopy(head.state_dict())
        self.train_losses: list[float] = []
        self.held_out = HeldOut()

    @property
    def exhausted(self) -> bool:
        """Whether too many epochs have passed without a better one (the recipe's patience)."""
        return self.recipe.patience is not None and self.epoch - self.best_epoch > self.recipe.patience

    def before_step(self) -> None:
        """Count a step, and freeze or free the projections for it."""
        frozen = self.recipe.freeze_steps is not None and self.steps < self.recipe.freeze_steps
        for layer in (self.head.query, self.head.key, self.head.value):
            if layer is not None:
                layer.weight.requires_grad_(not frozen)
        self.steps += 1

    def step(self, loss: Tensor, world: int) -> None:
        """Change the weights by the gradient of the loss, summed over the processes."""
        self.optimizer.zero_grad()
        loss.backward()
        if world > 1:
            gradients = [p.grad for p in self.head.parameters() if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            dist.all_reduce(loss.detach())
        self.optimizer.step()

    def keep_if_best(self) -> None:
        """Keep the weights if this epoch is the best so far; without validation, every epoch counts as better."""
        if not self.held_out.logits or self.held_out.best(self.recipe) == self.epoch:
            self.best, self.best_epoch = copy.deepcopy(self.head.state_dict()), self.epoch

    def save(self, path: Path, identity: str) -> None:
        """Write the state, whole or not at all. Raises UserError where the file cannot be written."""
        document = {
            "identity": identity,
            "head": self.head.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.epoch, self.steps, self.best_epoch],
            "train_losses": self.train_losses,
            "watched": vars(self.held_out),
        }
        content = io.BytesIO()  # torch.save to a full disk raises an error from deep inside PyTorch
        torch.save(document, content)
        atomic.write(path, content.getbuffer())

    def load(self, path: Path, identity: str) -> None:
        """Continue from a state that `save` wrote. Raises UserError for a damaged file or one of another run."""
        try:
            document: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if document["identity"] != identity:
                raise UserError(
                    f"{path}: this state belongs to a run with other data or settings; remove the file to start anew"
                )
            self.head.load_state_dict(document["head"])
            self.optimizer.load_state_dict(document["optimizer"])
            self.epoch, self.steps, self.best_epoch = (int(n) for n in document["counters"])
            self.best, self.train_losses = document["best"], list(document["train_losses"])
            vars(self.held_out).update(document["watched"])
        except UserError:
            raise
        except Exception as error:  # a damaged file raises many types; all mean the same to the user
            raise UserError(
                f"{path}: not the state of a training run ({type(error).__name__}); remove the file to start anew"
            ) from None
        self.schedule.last_epoch = self.epoch
        for group, base in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = base * self.schedule.lr_lambdas[0](self.epoch)


def run_identity(data: EmbeddedSet, recipe: Recipe, epochs: int) -> str:
    """A hash of all that a state must share with the run that continues it: settings, versions and data."""
    digest = hashlib.sha256(json.dumps([STATE_VERSION, torch.__version__, asdict(recipe), epochs]).encode())
    digest.update(repr((data.name, len(data), data.logit_scale)).encode())
    for tensor in (data.image.normalised, data.text.normalised, data.labels):
        if tensor is not None:
            for rows in tensor.split(BLOCK):
                digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
