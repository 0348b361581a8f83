"""Data flow: which layers of which models run in which order, searched as one compiled program."""

from jaxmerge.search.dataflow.path import Path, path_of
from jaxmerge.search.dataflow.program import LayerFunction, Scale, neighbours, run
from jaxmerge.search.dataflow.scales import FORMS, Form, factors, scale_function
from jaxmerge.search.dataflow.searching import Flow, FlowResult, around, dataflow
from jaxmerge.search.dataflow.slots import Slots, slots_of
from jaxmerge.search.dataflow.spaces import PairSpace, flow_space

__all__ = [
    "FORMS",
    "Flow",
    "FlowResult",
    "Form",
    "LayerFunction",
    "PairSpace",
    "Path",
    "Scale",
    "Slots",
    "around",
    "dataflow",
    "factors",
    "flow_space",
    "neighbours",
    "path_of",
    "run",
    "scale_function",
    "slots_of",
]
