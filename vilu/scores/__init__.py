"""Confidence scores for CLIP's zero-shot answer: the baselines that ViLU is compared with, and ViLU itself.

Every score is used in the same way (`base.Score`):

    score = SCORES["Rel-U"]()
    score.fit(train_embedding, labels, text_embeddings, logit_scale=100.0)     # where score.needs_fit
    score.confidence(image_embedding, text_embeddings, logit_scale=100.0)      # (B,), higher = more likely right

The answer that a score judges is argmax_j v · t_j. "ViLU" is built from a trained head, `SCORES["ViLU"](head)`; the
others need no argument. Only "BayesVLM" reads more than normalised embeddings: it needs `Embeddings` that hold the
input and output of CLIP's projections. The other scores take such objects too.

A new score is a subclass of `base.Score` in a file of this folder, with an entry in SCORES.
"""

from collections.abc import Callable

from vilu.embeddings import Embeddings
from vilu.scores.base import Score
from vilu.scores.bayes import BayesVLM
from vilu.scores.closed_form import MCM, Doctor, Entropy, RelU
from vilu.scores.learned import LVU, ConfidNet, ViLU
from vilu.scores.network import Training
from vilu.scores.per_class import ClassBias, TrustVLM
from vilu.scores.probvlm import ProbVLM

SCORES: dict[str, Callable[..., Score]] = {
    "MCM": MCM,
    "Entropy": Entropy,
    "Doctor": Doctor,
    "Rel-U": RelU,
    "TrustVLM": TrustVLM,
    "class bias": ClassBias,
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
    "ClassBias",
    "ConfidNet",
    "Doctor",
    "Embeddings",
    "Entropy",
    "ProbVLM",
    "RelU",
    "Score",
    "Training",
    "TrustVLM",
    "ViLU",
]
