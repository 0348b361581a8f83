"""The sections of methods.py: each takes `Options` and gives its tables one by one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What all sections are told.

    Attributes:
      methods: which registered methods.
      elements: elements of each model in the sections on speed.
      runs: how many runs a figure is the median of; None for the section's own number.
      seed: of the models, extras and keys.
    """

    methods: tuple[str, ...]
    elements: int
    runs: int | None
    seed: int
