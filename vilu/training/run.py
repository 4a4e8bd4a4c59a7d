"""One training run, and the file that holds a training between epochs so that a killed one continues."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator
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

STATE_VERSION = 4
SAVE_SECONDS = 5.0  # between two writes of the state: what a killed training does again at most, but for one epoch


class Run:
    """Everything that changes from epoch to epoch.

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

    def document(self) -> dict[str, Any]:
        """Everything that a run of the same settings needs to continue this one."""
        return {
            "head": self.head.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.epoch, self.steps, self.best_epoch],
            "train_losses": self.train_losses,
            "watched": vars(self.held_out),
        }

    def restore(self, document: dict[str, Any]) -> None:
        """Continue from what `document` gave."""
        self.head.load_state_dict(document["head"])
        self.optimizer.load_state_dict(document["optimizer"])
        self.epoch, self.steps, self.best_epoch = (int(n) for n in document["counters"])
        self.best, self.train_losses = document["best"], list(document["train_losses"])
        vars(self.held_out).update(document["watched"])
        self.schedule.last_epoch = self.epoch
        for group, base in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = base * self.schedule.lr_lambdas[0](self.epoch)


class State:
    """The file that a killed training continues from: the folds that are over, and the run under way.

    path: the file; None: nothing is kept.
    identity: what a training must share with the one that wrote the file (`run_identity`).
    folds: number of folds of the cross-validation whose run is over.
    held_out: the predictions of these folds.

    Raises:
        UserError: the file is damaged, or of another training.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self.folds, self.held_out = 0, HeldOut()
        self._under_way: dict[str, Any] | None = None
        self._saved = -math.inf
        if path is None or not path.exists():
            return
        with self._reading(path):
            document: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if document["identity"] != identity:
                raise UserError(
                    f"{path}: this state belongs to a run with other data or settings; remove the file to start anew"
                )
            self.folds = int(document["folds"])
            vars(self.held_out).update(document["held_out"])
            self._under_way = document["run"]

    def continue_run(self, run: Run) -> None:
        """Bring a run that starts to where the file has it. Raises UserError where the file does not fit it."""
        document, self._under_way = self._under_way, None
        if document is not None and self.path is not None:
            with self._reading(self.path):
                run.restore(document)

    def fold_over(self, run: Run) -> None:
        """Keep the predictions of a fold whose run is over. The next `save` writes them."""
        self.held_out.join(run.held_out)
        self.folds += 1

    def save(self, run: Run) -> None:
        """Write the run under way, at most every SAVE_SECONDS. Raises UserError where the file cannot be written."""
        if self.path is None or time.monotonic() - self._saved < SAVE_SECONDS:
            return
        document = {
            "identity": self.identity,
            "folds": self.folds,
            "held_out": vars(self.held_out),
            "run": run.document(),
        }
        content = io.BytesIO()  # torch.save to a full disk raises an error from deep inside PyTorch
        torch.save(document, content)
        atomic.write(self.path, content.getbuffer())
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the training is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path.with_name(f"{self.path.name}.part").unlink(missing_ok=True)

    @staticmethod
    @contextlib.contextmanager
    def _reading(path: Path) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a damaged file raises many types; all mean the same to the user
            raise UserError(
                f"{path}: not the state of a training run ({type(error).__name__}); remove the file to start anew"
            ) from None


def run_identity(data: EmbeddedSet, recipe: Recipe, epochs: int) -> str:
    """A hash of all that a state must share with the run that continues it: settings, versions and data."""
    digest = hashlib.sha256(json.dumps([STATE_VERSION, torch.__version__, asdict(recipe), epochs]).encode())
    digest.update(repr((data.name, len(data), data.logit_scale)).encode())
    for tensor in (data.image.normalised, data.text.normalised, data.labels):
        if tensor is not None:
            for rows in tensor.split(BLOCK):
                digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
