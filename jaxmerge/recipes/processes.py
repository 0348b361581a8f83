"""Several processes that carry out one plan together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """This process among those that run one plan.

    Attributes:
        index: from 0; the first one makes the output's place and completes the output.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def wait(self, stage: str) -> None:
        """Waits until all processes have come to a stage."""


ALONE = Processes()
