"""The plan's checkpoints, open for reading; every value that a merge sees is checked."""

from __future__ import annotations

import contextlib
import math
from types import TracebackType
from typing import Self

import numpy as np

from jaxmerge.converters import CheckpointError, non_finite, open_checkpoint
from jaxmerge.recipes.plan import Plan, PlannedInput

_CHECKED = 1 << 22


class Sources:
    """The sources of a plan; a context manager that closes them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stack = contextlib.ExitStack()
        with self._stack:
            self._open = [
                self._stack.enter_context(open_checkpoint(source.path, key=source.key))
                for source in plan.sources
            ]
            self._stack = self._stack.pop_all()

    def read(self, one: PlannedInput, start: int, stop: int, *, check: bool = True) -> np.ndarray:
        """Reads elements start..stop of an input, flat.

        Args:
          one: the input.
          start: first element.
          stop: one past the last element.
          check: whether to look for NaN and infinity; once is enough.

        Raises:
          CheckpointError: they hold NaN or infinity, or cannot be read.
        """
        array = self._open[one.source].read_flat(one.name, start, stop)
        if check and non_finite(array):
            bad = self._bad(one)
            raise CheckpointError(
                f"{self._plan.sources[one.source].name}: tensor {one.name!r} holds {bad} value(s) "
                "that are NaN or infinite; merging would spread them. Repair or replace the "
                "checkpoint"
            )
        return array

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _bad(self, one: PlannedInput) -> int:
        size = math.prod(one.shape)
        return sum(
            non_finite(self.read(one, start, min(start + _CHECKED, size), check=False))
            for start in range(0, size, _CHECKED)
        )
