"""Training settings under a name: the published ones, and the one that holds at every size of data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from vilu.errors import UserError

FORMS = ("authors", "paper")
LOSSES = ("bce", "mse")
OPTIMIZERS = ("adamw", "sgd")
FOLDED_SAMPLES = 4000  # above, a share of the data is enough to choose by


@dataclass(frozen=True)
class Recipe:
    """How a head is trained.

    form: "authors" (one matrix for keys and values, attention at CLIP's logit scale) or "paper" (three matrices,
        attention at 1 / sqrt(dim)).
    parts: what the MLP sees, of `vilu.head.PARTS`; None: all.
    prior: start from CLIP's own log-odds (`ViLUHead`'s prior, fitted on the training data) and learn a correction.
    loss: "bce", or "mse" of 1 − P(failure) to p[true class].
    failure_weight: weight of the wrong samples; None: log(1 + n_right / n_wrong) of the batch ("adaptative").
    optimizer, learning_rate, weight_decay, momentum (of SGD).
    epochs, batch_size; min_steps: a small set is gone through more often, until so many steps are made.
    warmup_epochs: the rate rises linearly from a tenth over these; from there, and multiplied with it, a cosine to 0.
    freeze_steps: steps in which the projections stay the identity; None: always.
    validation: share cut from the training data, by the seed, that chooses the epoch; 0: none, the last is kept.
    folds: up to FOLDED_SAMPLES samples, cross-validation with so many folds chooses the epoch instead, and all of the
        data is trained on; 1: never.
    patience: stop after so many epochs without a better one; None: never.
    seed: of the cut, the first weights and the order.

    Raises:
        UserError: a setting out of range.
    """

    form: str = "authors"
    parts: tuple[str, ...] | None = None
    prior: bool = True
    loss: str = "bce"
    failure_weight: float | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    momentum: float = 0.9
    epochs: int = 30
    batch_size: int = 256
    min_steps: int = 300
    warmup_epochs: int = 0
    freeze_steps: int | None = None
    validation: float = 0.15
    folds: int = 5
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "form": self.form in FORMS,
            "loss": self.loss in LOSSES,
            "failure_weight": self.failure_weight is None or 0 < self.failure_weight < float("inf"),
            "optimizer": self.optimizer in OPTIMIZERS,
            "learning_rate": 0 < self.learning_rate < float("inf"),
            "weight_decay": 0 <= self.weight_decay < float("inf"),
            "momentum": 0 <= self.momentum < 1,
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 2,
            "min_steps": self.min_steps >= 0,
            "warmup_epochs": self.warmup_epochs >= 0,
            "freeze_steps": self.freeze_steps is None or self.freeze_steps >= 0,
            "validation": 0 <= self.validation < 1,
            "folds": self.folds >= 1,
            "patience": self.patience is None or self.patience >= 1,
        }
        for name, good in checks.items():
            if not good:
                raise UserError(f"recipe: {name} cannot be {getattr(self, name)!r}")


_SCRIPT = Recipe(
    prior=False,
    optimizer="sgd",
    learning_rate=0.01,
    weight_decay=5e-4,
    batch_size=128,
    epochs=800,
    min_steps=0,
    warmup_epochs=5,
    freeze_steps=1000,
    validation=0.0,
    folds=1,
)

# "plain" is the paper's idea without the prior, under the optimizer of "default": for comparisons at any size.
# The others are the authors' released scripts (github.com/ykrmm/ViLU, scripts/ and vilu/config/).
RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    "plain": Recipe(prior=False, min_steps=0, folds=1),
    "paper-cifar10": _SCRIPT,
    "paper-imagenet": replace(_SCRIPT, learning_rate=0.001, epochs=300, batch_size=512, freeze_steps=None),
    "paper-captions": replace(_SCRIPT, learning_rate=0.001, epochs=10, batch_size=1024, freeze_steps=None),
    "paper-lvu": replace(_SCRIPT, parts=("image",), loss="mse", freeze_steps=None),
}


def recipe_named(name: str, **changes: object) -> Recipe:
    """A recipe of `RECIPES` with some settings changed. Raises UserError for an unknown name."""
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    known = {field.name for field in fields(Recipe)}
    assert set(changes) <= known, set(changes) - known
    return replace(RECIPES[name], **changes)  # type: ignore[arg-type]
