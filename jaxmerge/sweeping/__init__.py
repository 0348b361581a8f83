"""Sweeps: every point of a grid of hyperparameters, merged and scored by one compiled program."""

from jaxmerge.free_memory import available_memory
from jaxmerge.sweeping.axis import Axis, parse_axis
from jaxmerge.sweeping.evaluator import EvaluatorError, import_source, load_evaluator
from jaxmerge.sweeping.grid import Grid, make_grid
from jaxmerge.sweeping.sweep import Sweep, sweep

__all__ = [
    "Axis",
    "EvaluatorError",
    "Grid",
    "Sweep",
    "available_memory",
    "import_source",
    "load_evaluator",
    "make_grid",
    "parse_axis",
    "sweep",
]
