"""Adapters on the fly: a model's tensors with LoRA terms added as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmerge.converters import Checkpoint
from jaxmerge.converters.peft_adapter import LowRankUpdate, delta


@dataclass(frozen=True)
class AdapterTerm:
    """A low-rank term that is added to a tensor as it is read.

    Attributes:
        source: index into the plan's sources of the adapter.
        update: names and scale of its factors.
    """

    source: int
    update: LowRankUpdate


def applied(
    checkpoints: Sequence[Checkpoint] | Mapping[int, Checkpoint],
    terms: Sequence[AdapterTerm],
    values: np.ndarray,
    rows: slice | np.ndarray,
) -> np.ndarray:
    """Adds terms to rows of a tensor: W + s B A, normalised row by row where it is DoRA.

    Args:
        checkpoints: the plan's sources, open.
        terms: in the order in which they are added.
        values: `[rows, ...]`, whole rows of W.
        rows: which rows they are.

    Returns:
        float32 `[rows, ...]`.
    """
    for term in terms:
        update, checkpoint = term.update, checkpoints[term.source]
        added = delta(update, checkpoint.read(update.a), checkpoint.read(update.b), rows)
        values = values.astype(np.float32) + added.reshape(values.shape)
        if update.magnitude is not None:
            magnitudes = checkpoint.read(update.magnitude).astype(np.float32)[rows]
            values *= (magnitudes / np.linalg.norm(values, axis=1))[:, None]
    return values
