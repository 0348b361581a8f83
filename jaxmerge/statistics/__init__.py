"""What models do on data, for the methods that weigh by it: Fisher information, Gram matrices."""

from jaxmerge.statistics.grams import GramSum, batch_grams, grams
from jaxmerge.statistics.information import batch_fisher, fisher
from jaxmerge.statistics.kronecker import batch_factors, kronecker_factors
from jaxmerge.statistics.moments import fisher_from_moments

__all__ = [
    "GramSum",
    "batch_factors",
    "batch_fisher",
    "batch_grams",
    "fisher",
    "fisher_from_moments",
    "grams",
    "kronecker_factors",
]
