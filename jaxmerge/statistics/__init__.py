"""What models do on data, for the methods that weigh by it: Fisher information."""

from jaxmerge.statistics.information import batch_fisher, fisher
from jaxmerge.statistics.moments import fisher_from_moments

__all__ = ["batch_fisher", "fisher", "fisher_from_moments"]
