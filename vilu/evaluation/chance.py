"""CLIP's accuracy beside chance: what an answer without looking at the image would get right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vilu.evaluation.metrics import Bools
from vilu.evaluation.results import too_few


@dataclass(frozen=True)
class Accuracy:
    """How often CLIP is right on N images, and how often chance would be.

    samples: number N of images.
    right: number of right answers.
    chance: the larger of 1/K and the share of the largest class; 1/K for captions.
    rule: which of the two `chance` is, in words.
    """

    samples: int
    right: int
    chance: float
    rule: str

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / self.samples

    def __str__(self) -> str:
        return f"right on {self.share:.1%} of {self.samples:,} images; chance is {self.chance:.1%} ({self.rule})"

    @property
    def warning(self) -> str:
        """Why little can be learned from these answers, in one line; "" where nothing is wrong.

        CLIP counts as at chance up to two standard errors above it, or up to a fifth of the smaller of chance and
        1 − chance.
        """
        error = math.sqrt(self.chance * (1 - self.chance) / self.samples)
        if self.share <= self.chance + max(2 * error, 0.2 * min(self.chance, 1 - self.chance)):
            return "CLIP is at chance on this data: its answers are guesses, and no failure predictor mends that"
        few = too_few(self.samples - self.right, self.samples)
        if not few:
            return ""
        side = "right" if self.share > 0.5 else "wrong"
        always = f"CLIP is nearly always {side}: " if abs(self.share - 0.5) > 0.4 else ""
        return f"{always}{few}; they are too few to learn from"


def accuracy(right: Bools, labels: np.ndarray | None, candidates: int) -> Accuracy:
    """Return CLIP's accuracy beside chance.

    Args:
        right: (N,) whether each answer is right.
        labels: (N,) int, the class of each image; None for captions.
        candidates: number K of classes, or of captions in a group.

    Example:
        >>> str(accuracy(np.array([True, True, False, True]), np.array([0, 1, 0, 1]), 2))
        'right on 75.0% of 4 images; chance is 50.0% (1 of 2 classes)'
    """
    chance, rule = 1 / candidates, f"1 of {candidates:,} {'classes' if labels is not None else 'captions'}"
    if labels is not None and len(labels):
        largest = int(np.bincount(labels).max()) / len(labels)
        # A class that is drawn a little more often than the others says nothing.
        if largest > chance + 2 * math.sqrt(chance * (1 - chance) / len(labels)):
            chance, rule = largest, "always the largest class"
    return Accuracy(len(right), int(np.sum(right)), chance, rule)
