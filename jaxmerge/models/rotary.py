"""Rotary position embeddings, and the ways to stretch them to longer contexts."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Scaling(Protocol):
    """Changes the frequencies of rotary embeddings; a frozen dataclass."""

    def frequencies(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
        """The frequencies of `width / 2` planes and the factor on cosines and sines.

        Args:
          theta: the base.
          width: the head's width.
          length: the number of positions up to the last one in use, int32 [] (may be traced).

        Returns:
          Radians per position, float32 [width / 2], and the factor.
        """
        ...


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation; Chen et al., arXiv 2306.15595)."""

    factor: float

    def frequencies(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
        return _frequencies(theta, width) / np.float32(self.factor), 1.0


@dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with the length once it exceeds `context_length`, the length of training."""

    factor: float
    context_length: int

    def frequencies(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
        stretch = jnp.maximum(length, self.context_length) / self.context_length
        growth = (self.factor * stretch - (self.factor - 1)) ** (width / (width - 2))
        return 1 / (theta * growth) ** _exponents(width), 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, and a blend between (Llama 3.1).

    A plane is low where it turns fewer than `low_frequency_factor` times over `original_length`, high where it turns
    more than `high_frequency_factor` times.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def frequencies(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
        plain = _frequencies(theta, width)
        turns = self.original_length * plain / (2 * np.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        kept = np.clip((turns - self.low_frequency_factor) / span, 0, 1)
        return (plain * (kept + (1 - kept) / self.factor)).astype(np.float32), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: a ramp over the planes between the plain and the interpolated frequencies.

    Attributes:
      factor: of the interpolation.
      original_length: context length before stretching.
      attention_factor: on cosines and sines; None: 0.1 mscale ln(factor) + 1, over the same with `mscale_all_dim`.
      beta_fast: turns over `original_length` above which a plane is kept.
      beta_slow: turns below which it is interpolated.
      mscale: of the default attention factor; counts where both it and `mscale_all_dim` are given.
      mscale_all_dim: of the default attention factor's denominator.
      truncate: the ramp's ends are rounded to whole planes.

    Reference:
      Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, ICLR 2024.
    """

    factor: float
    original_length: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
        low, high = (
            self._plane(theta, width, self.beta_fast),
            self._plane(theta, width, self.beta_slow),
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        # Ends that coincide make a step.
        span = (high - low) or 0.001
        interpolated = np.clip((np.arange(width // 2) - low) / span, 0, 1)
        plain = _frequencies(theta, width)
        blend = plain * (1 - interpolated) + plain / self.factor * interpolated
        return blend.astype(np.float32), self._attention_factor()

    def _plane(self, theta: float, width: int, turns: float) -> float:
        """The plane, as a real number, that makes so many turns over the original length."""
        return (
            width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE: a searched factor per plane, one set for short contexts and one for longer ones.

    Attributes:
      short_factor: [width / 2], divides the frequencies up to `original_length`.
      long_factor: [width / 2], beyond it.
      original_length: context length before stretching.
      factor: context length over `original_length`; sets the default attention factor.
      attention_factor: on cosines and sines; None: sqrt(1 + ln(factor) / ln(original_length)).

    Reference:
      Ding et al., LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens, ICML 2024.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    factor: float
    attention_factor: float | None = None

    def frequencies(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
        plain = _frequencies(theta, width)
        short, long = (
            plain / np.asarray(factors, np.float32)
            for factors in (self.short_factor, self.long_factor)
        )
        attention = self.attention_factor
        if attention is None:
            stretched = math.log(max(self.factor, 1.0)) / math.log(self.original_length)
            attention = math.sqrt(1 + stretched)
        return jnp.where(length > self.original_length, long, short), attention


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: plane i of a head turns by `position * theta ** (-2 i / width)` radians.

    Reference:
      Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None


def rotations(
    rotary: Rotary | None, positions: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles by which queries and keys turn.

    Args:
      rotary: None for no turn at all.
      positions: int32 [batch, length].
      width: the head's width, even.

    Returns:
      Two float32 arrays [batch, length, width / 2].

    Example:
      >>> cosine, sine = rotations(Rotary(), jnp.arange(3)[None], 4)
      >>> np.asarray(sine[0], float).round(2).tolist()
      [[0.0, 0.0], [0.84, 0.01], [0.91, 0.02]]
    """
    if rotary is None:
        shape = (*positions.shape, width // 2)
        return jnp.ones(shape), jnp.zeros(shape)
    if rotary.scaling is None:
        frequencies, factor = _frequencies(rotary.theta, width), 1.0
    else:
        length = positions.max() + 1
        frequencies, factor = rotary.scaling.frequencies(rotary.theta, width, length)
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(heads: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turns each head's planes (i, i + width / 2).

    Args:
      heads: [batch, length, heads, width].
      cosine: [batch or 1, length, width / 2].
      sine: likewise.

    Returns:
      Like `heads`, in float32 or wider.
    """
    wide = heads.astype(jnp.promote_types(heads.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )


def _exponents(width: int) -> np.ndarray:
    return np.arange(0, width, 2, dtype=np.float32) / np.float32(width)


def _frequencies(theta: float, width: int) -> np.ndarray:
    return np.float32(1) / np.float32(theta) ** _exponents(width)
