"""Merges that are learned: hyperparameters by gradients through the merge."""

from jaxmerge.learning.adamerging import adamerging
from jaxmerge.learning.block_labels import block_labels
from jaxmerge.learning.fit import FitResult, fit
from jaxmerge.learning.regmean_plus_plus import regmean_plus_plus
from jaxmerge.learning.soup import SoupResult, learned_soup

__all__ = [
    "FitResult",
    "SoupResult",
    "adamerging",
    "block_labels",
    "fit",
    "learned_soup",
    "regmean_plus_plus",
]
