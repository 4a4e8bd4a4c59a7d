"""Named training settings: a default for data of any size, and the published ones."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from vilu.errors import UserError

FORMS = ("authors", "paper")
LOSSES = ("bce", "mse")
OPTIMIZERS = ("adamw", "sgd")
CROSS_VALIDATION_LIMIT = 4000  # samples; with more of them, one validation share is enough to choose the epoch


@dataclass(frozen=True)
class Recipe:
    """How a head is trained.

    form: "authors" (one matrix for keys and values, attention at CLIP's logit scale) or "paper" (three matrices,
        attention at 1 / sqrt(dim)).
    parts: what the MLP reads, of `vilu.head.PARTS`; None: all.
    prior: start from CLIP's own log-odds (the prior of `ViLUHead`, fitted to the training data) and learn a correction.
    linear: with the prior, start from a linear function of what the MLP reads besides (`vilu.training.linear`).
    loss: "bce" (weighted cross-entropy), or "mse" of 1 − P(failure) against CLIP's probability of the true class.
    failure_weight: weight of the wrong samples; None: log(1 + n_right / n_wrong) of the batch ("adaptative").
    optimizer: "adamw" or "sgd".
    learning_rate: the highest learning rate.
    weight_decay: decoupled for "adamw", added to the gradient for "sgd".
    momentum: of "sgd" only.
    epochs: passes over the data.
    batch_size: samples in a batch; in caption mode also the number of candidates.
    min_steps: a small data set gets more epochs, until it has had this many steps.
    warmup_epochs: the learning rate rises linearly from a tenth over these epochs, times a cosine that falls to 0 over
        all epochs.
    freeze_steps: number of first steps in which the projections stay the identity; None: they always do.
    validation: share of the training data, drawn by the seed, that chooses the epoch; 0: the last epoch is kept.
    folds: up to CROSS_VALIDATION_LIMIT samples, cross-validation with this many folds chooses the epoch instead, and
        the head is trained on all of the data; 1: no cross-validation.
    patience: stop after this many epochs without a better one; None: never stop early.
    seed: seed of the validation share, the first weights and the order of the samples.

    Raises:
        UserError: a setting out of range.
    """

    form: str = "authors"
    parts: tuple[str, ...] | None = None
    prior: bool = True
    linear: bool = True
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
    patience: int | None = 20
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

    @property
    def projection(self) -> str:
        """The `projection` of the head that this recipe trains."""
        if self.form == "paper":
            return "separate"
        return "identity" if self.freeze_steps is None else "shared"


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
    patience=None,
)

# "plain" is the head of the paper, without the prior, with the optimizer of "default": to compare at any size.
# The others are the settings of the authors' released scripts (github.com/ykrmm/ViLU, scripts/ and vilu/config/).
RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    "plain": Recipe(prior=False, min_steps=0, folds=1, patience=None),
    "paper-cifar10": _SCRIPT,
    "paper-imagenet": replace(_SCRIPT, learning_rate=0.001, epochs=300, batch_size=512, freeze_steps=None),
    "paper-captions": replace(_SCRIPT, learning_rate=0.001, epochs=10, batch_size=1024, freeze_steps=None),
    "paper-lvu": replace(_SCRIPT, parts=("image",), loss="mse", freeze_steps=None),
}


def recipe_named(name: str, **changes: object) -> Recipe:
    """A recipe of `RECIPES`, with some settings changed.

    Args:
        name: a key of `RECIPES`.
        changes: fields of `Recipe` with their new values. A number of epochs is obeyed: without a `min_steps` beside
            it, min_steps becomes 0.

    Raises:
        UserError: an unknown name or setting, or a setting out of range.

    Example:
        >>> recipe_named("paper-imagenet", epochs=10).epochs
        10
    """
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    known = [field.name for field in fields(Recipe)]
    for setting in changes:
        if setting not in known:
            raise UserError(f"recipe: no setting {setting!r}; there are {', '.join(known)}")
    if "epochs" in changes:
        changes = {"min_steps": 0, **changes}
    return replace(RECIPES[name], **changes)  # type: ignore[arg-type]
