"""Small decoders of characters: one trained on both domains, and from it one on each."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge.models import Decoder, DecoderConfig, LayerKind
from search_sections import corpora

LENGTH = 32
BATCH = 32
DEPTH = 6

MODEL = Decoder(
    DecoderConfig(
        vocabulary_size=len(corpora.CHARACTERS),
        width=32,
        layers=(LayerKind(),) * DEPTH,
        heads=4,
        key_heads=4,
        head_width=8,
        mlp_width=64,
        tied=True,
        stacked=True,
    )
)


class Split(NamedTuple):
    """int32 [domains, pieces, LENGTH + 1] for the search, and to hold out."""

    search: jax.Array
    held: jax.Array


class Trained(NamedTuple):
    """What one seed gives: variables of `MODEL`, stacked, and data that none was trained on."""

    base: Any
    experts: tuple[Any, Any]
    data: Split


def train_all(
    seed: int, *, steps: int, more_steps: int, searched: int, held: int, rate: float
) -> Trained:
    """Trains the base on both domains in equal parts, and the experts from it.

    Args:
      seed: of initial weights, of the split of texts, and of batches.
      steps: of the base.
      more_steps: of each expert.
      searched, held: pieces of each domain to search on, and to hold out.
      rate: of Adam, at the beginning of a cosine.
    """
    domains = [corpora.split(texts, seed) for texts in (corpora.prose(), corpora.source_code())]
    pools = [corpora.windows(train, len(train), LENGTH + 1, seed) for train, _, _ in domains]
    rng = np.random.default_rng(seed)

    def batches(count: int, of: tuple[int, ...]) -> np.ndarray:
        share = BATCH // len(of)
        drawn = [pools[i][rng.integers(0, len(pools[i]), (count, share))] for i in of]
        return np.concatenate(drawn, axis=1)

    start = MODEL.init(jax.random.key(seed), jnp.zeros((1, LENGTH), jnp.int32))
    base = _train(start, batches(steps, (0, 1)), rate)
    first, second = (_train(base, batches(more_steps, (i,)), rate / 2) for i in (0, 1))

    def pieces(part: int, count: int) -> jax.Array:
        drawn = [corpora.windows(one[part], count, LENGTH + 1, seed) for one in domains]
        return jnp.asarray(np.stack(drawn))

    return Trained(base, (first, second), Split(pieces(1, searched), pieces(2, held)))


@functools.partial(jax.jit, static_argnames=("rate",))
def _train(params: Any, batches: jax.Array, rate: float) -> Any:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 20, len(batches))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = MODEL.apply(params, tokens[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    def step(state: Any, tokens: jax.Array) -> Any:
        params, moments = state
        updates, moments = adam.update(jax.grad(loss)(params, tokens), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), batches)
    return params
