"""Discrete variables as tables of probabilities: what the levels of a genome are, and genomes with given levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

if TYPE_CHECKING:
    from jaxmerge.search.space import Space


@dataclass(frozen=True)
class Levels:
    """Some of a space's discrete variables, n of them with at most `most` levels. Everything is static.

    Attributes:
      kinds: the variables' kinds: "binary", "categorical", "integer".
      counts: int32 [n], the levels of each.
      starts: int32 [n], the first coordinate of each in the genome.
      exists: bool [n, most], whether a variable has a level.
      coordinates: int32, the coordinates of all of them in the genome.
    """

    kinds: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    exists: np.ndarray
    coordinates: np.ndarray

    @classmethod
    def of(cls, space: Space, kinds: Sequence[str]) -> Levels:
        """The variables of some kinds, in the order of the genome."""
        chosen = [
            (column, count)
            for column, count in zip(space.columns, space.levels.tolist(), strict=True)
            if column.kind in kinds
        ]
        counts = np.array([count for _, count in chosen], np.int32)
        most = int(counts.max(initial=1))
        coordinates = [np.arange(one.start, one.start + one.width) for one, _ in chosen]
        return cls(
            np.array([one.kind for one, _ in chosen], "U11"),
            counts,
            np.array([one.start for one, _ in chosen], np.int32),
            np.arange(most)[None] < counts[:, None],
            np.concatenate([np.zeros(0, int), *coordinates]).astype(np.int32),
        )

    @property
    def free(self) -> int:
        """The free parameters of the tables: the levels but one of each variable."""
        return int(np.sum(self.counts - 1))

    def read(self, population: jax.Array) -> jax.Array:
        """The levels as ones among zeros.

        Args:
          population: float32 [population, size].

        Returns:
          float32 [population, n, most].
        """
        places = self.starts[:, None] + np.where(self.exists, np.arange(self.exists.shape[1]), 0)
        scores = jnp.where(self.exists[None], population[:, places], -jnp.inf)
        first = population[:, self.starts]
        cells = jnp.floor(first * self.counts[None].astype(np.float32)).astype(jnp.int32)
        level = jnp.where(
            (self.kinds == "categorical")[None],
            jnp.argmax(scores, axis=2),
            jnp.where(
                (self.kinds == "binary")[None],
                first > 0.5,
                jnp.clip(cells, 0, self.counts[None] - 1),
            ),
        )
        return jax.nn.one_hot(level, self.exists.shape[1])

    def sample(self, key: jax.Array, table: jax.Array, population: int) -> jax.Array:
        """Draws levels and writes them as `coordinates` of genomes.

        Args:
          key: one key.
          table: float32 [n, most], probabilities.
          population: how many.

        Returns:
          float32 [population, coordinates]: 0 or 1 for a binary variable, for each choice of a categorical one, and the
          centre of the cell of an integer one.
        """
        shape = (population, len(self.counts))
        level = jax.random.categorical(key, jnp.log(table)[None], axis=-1, shape=shape)
        variable = np.repeat(
            np.arange(len(self.counts)), np.where(self.kinds == "categorical", self.counts, 1)
        )
        choice = self.coordinates - self.starts[variable]
        drawn = level[:, variable]
        kind = self.kinds[variable]
        centre = (drawn + 0.5) / self.counts[variable][None].astype(np.float32)
        return jnp.where(
            (kind == "categorical")[None],
            drawn == choice[None],
            jnp.where((kind == "binary")[None], drawn, centre),
        ).astype(jnp.float32)

    def table(self, mean: jax.Array, spread: jax.Array) -> jax.Array:
        """The first probabilities.

        Args:
          mean: float32 [size], a genome: its coordinate is the probability of a binary variable, and those of a
            categorical one are in proportion to the choices' (0 everywhere: all alike).
          spread: the standard deviation of an integer variable's coordinate.

        Returns:
          float32 [n, most].
        """
        most = np.arange(self.exists.shape[1])
        places = self.starts[:, None] + np.where(self.exists, most, 0)
        chosen = jnp.where(self.exists, jnp.clip(mean[places], 0, 1), 0)
        total = jnp.sum(chosen, axis=1, keepdims=True)
        chosen = jnp.where(
            total > 0, chosen / jnp.maximum(total, 1e-30), self.exists / self.counts[:, None]
        )
        on = jnp.clip(mean[self.starts], 0, 1)[:, None]
        switched = jnp.where(most[None] == 1, on, 1 - on)
        edges = np.arange(1, self.exists.shape[1])[None] / self.counts[:, None].astype(np.float32)
        below = norm.cdf((edges - mean[self.starts][:, None]) / spread)
        below = jnp.where(edges < 1, below, 1)
        cells = jnp.diff(below, axis=1, prepend=0.0, append=1.0)
        kind = self.kinds[:, None]
        table = jnp.where(
            kind == "categorical", chosen, jnp.where(kind == "binary", switched, cells)
        )
        return jnp.where(self.exists, table, 0).astype(jnp.float32)

    def bounded(self, table: jax.Array, least: jax.typing.ArrayLike) -> jax.Array:
        """Lifts every probability to a least one and takes the sum from what lies above it, in proportion.

        Args:
          table: float32 [n, most].
          least: float32 [n], at most 1 / levels.

        Returns:
          float32 [n, most], rows of sum 1.
        """
        low = jnp.where(self.exists, jnp.asarray(least, jnp.float32)[:, None], 0)
        lifted = jnp.where(self.exists, jnp.maximum(table, low), 0)
        room = jnp.sum(lifted - low, axis=1, keepdims=True)
        spare = 1 - jnp.sum(low, axis=1, keepdims=True)
        even = self.exists / self.counts[:, None].astype(np.float32)
        part = jnp.where(room > 0, (lifted - low) / jnp.maximum(room, 1e-30), even)
        bounded = low + spare * part
        return bounded / jnp.sum(bounded, axis=1, keepdims=True)
