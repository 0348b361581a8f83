"""How good a model is: scores of predictions, in batches, as pure functions that compile and map over populations."""

from jaxmerge.evaluation.batches import over_batches, score_batches
from jaxmerge.evaluation.calibration import brier_score, calibration_error
from jaxmerge.evaluation.retrieval import cosine_similarity, mean_reciprocal_rank, recall_at_k
from jaxmerge.evaluation.scores import (
    Scores,
    accuracy,
    cross_entropy,
    perplexity,
    score,
    score_next_tokens,
)

__all__ = [
    "Scores",
    "accuracy",
    "brier_score",
    "calibration_error",
    "cosine_similarity",
    "cross_entropy",
    "mean_reciprocal_rank",
    "over_batches",
    "perplexity",
    "recall_at_k",
    "score",
    "score_batches",
    "score_next_tokens",
]
