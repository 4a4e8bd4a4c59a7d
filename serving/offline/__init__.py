"""Offline scoring: an exported repository's answers for whole data sets, on Ray Data, without a server or torch."""

from vilu.serving.offline.job import Answers, Workers, run_job, score
from vilu.serving.offline.scorer import Scorer

__all__ = ["Answers", "Scorer", "Workers", "run_job", "score"]
