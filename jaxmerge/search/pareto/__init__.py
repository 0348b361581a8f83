"""Several objectives at once: which candidates no other betters, how they spread, and what they cover."""

from jaxmerge.search.pareto.hypervolume import hypervolume
from jaxmerge.search.pareto.nsga2 import NSGA2
from jaxmerge.search.pareto.sorting import crowding_distance, nondominated_ranks

__all__ = ["NSGA2", "crowding_distance", "hypervolume", "nondominated_ranks"]
