"""Walks through the traced program of a model: where its parameters meet its activations."""

from jaxmerge.tracing.interpreter import Interpretation, interpret, sites
from jaxmerge.tracing.site import Record, Site, Use, Visit, Visitor

__all__ = [
    "Interpretation",
    "Record",
    "Site",
    "Use",
    "Visit",
    "Visitor",
    "interpret",
    "sites",
]
