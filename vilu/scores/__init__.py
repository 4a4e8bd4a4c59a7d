"""Confidence scores for CLIP's zero-shot answer, the baselines ViLU is compared with and ViLU itself.

Every score has the same shape (`base.Score`):

    score = SCORES["Rel-U"]()
    score.fit(train_embedding, labels, text_embeddings, logit_scale=100.0)     # where score.needs_fit
    score.confidence(image_embedding, text_embeddings, logit_scale=100.0)      # (B,), higher = more likely right

The answer they judge is argmax_j v · t_j. "ViLU" is built from a trained head, `SCORES["ViLU"](head)`; the rest
need no argument. Only "BayesVLM" reads more than normalised embeddings: give it `Embeddings` that keep each
projection's input and output; the others take the same objects.
"""

from collections.abc import Callable

from vilu.embeddings import Embeddings
from vilu.scores.base import Score
from vilu.scores.bayes import BayesVLM
from vilu.scores.closed_form import MCM, Doctor, Entropy, RelU
from vilu.scores.learned import LVU, ConfidNet, ProbVLM, Training, ViLU

SCORES: dict[str, Callable[..., Score]] = {
    "MCM": MCM,
    "Entropy": Entropy,
    "Doctor": Doctor,
    "Rel-U": RelU,
    "LVU-BCE": lambda **options: LVU("bce", **options),
    "LVU-MSE": lambda **options: LVU("mse", **options),
    "ConfidNet": ConfidNet,
    "ProbVLM": ProbVLM,
    "BayesVLM": BayesVLM,
    "ViLU": ViLU,
}

__all__ = [
    "LVU",
    "MCM",
    "SCORES",
    "BayesVLM",
    "ConfidNet",
    "Doctor",
    "Embeddings",
    "Entropy",
    "ProbVLM",
    "RelU",
    "Score",
    "Training",
    "ViLU",
]
