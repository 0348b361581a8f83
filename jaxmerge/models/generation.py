"""Text generation: one compiled program reads the prompts and draws all new tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.models.causal import Cache, CausalLM, empty_cache


class Sampling(NamedTuple):
    """How tokens are drawn; every value is traced, None leaves a step out.

    Attributes:
      temperature: divides the logits.
      top_k: only the k most likely tokens (and those as likely as the last of them).
      top_p: of those, the fewest whose probabilities sum to p or more.
    """

    temperature: Any = None
    top_k: Any = None
    top_p: Any = None


def generate(
    model: CausalLM,
    params: Any,
    input_ids: Any,
    *,
    new_tokens: int,
    attention_mask: Any = None,
    key: jax.Array | None = None,
    temperature: Any = None,
    top_k: Any = None,
    top_p: Any = None,
    end: int | Sequence[int] = (),
    pad: int = 0,
) -> jax.Array:
    """Continues prompts, greedily without a key and by sampling with one.

    One program per shape of the prompts reads them in one pass and then draws token by token with a cache of keys and
    values. Weights, sampling values, end tokens and keys are traced: other ones compile nothing new.

    Args:
      model: a causal model, stacked or not (static).
      params: its variables.
      input_ids: int [batch, length], the prompts; shorter ones padded on the left.
      new_tokens: how many tokens to draw (static).
      attention_mask: [batch, length], 0 at padding; None: no padding.
      key: of the draws; None: the most likely token each time.
      temperature: divides the logits, above 0.
      top_k: draws from the k most likely tokens only.
      top_p: draws from the fewest tokens whose probabilities sum to p or more.
      end: token ids that end a text.
      pad: the token that follows the end.

    Returns:
      int32 [batch, new_tokens], without the prompts.

    Raises:
      ValueError: sampling values without a key, values out of range, or prompts padded on the right.

    Example:
      >>> from jaxmerge.models.gpt2 import GPT2, GPT2Config
      >>> model = GPT2(GPT2Config(vocabulary_size=50, context_length=8, width=16, depth=1, heads=2, mlp_width=32))
      >>> prompts = jnp.ones((2, 3), jnp.int32)
      >>> params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), prompts)
      >>> generate(model, params, prompts, new_tokens=4).shape
      (2, 4)
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(sampling, key, attention_mask, new_tokens)
    ends = jnp.asarray([end] if isinstance(end, int) else list(end), jnp.int32)
    options = Sampling(
        *(
            None if value is None else jnp.asarray(value, dtype)
            for value, dtype in zip(sampling, (jnp.float32, jnp.int32, jnp.float32), strict=True)
        )
    )
    ids = jnp.asarray(input_ids, jnp.int32)
    mask = None if attention_mask is None else jnp.asarray(attention_mask, bool)
    filler = jnp.asarray(pad, jnp.int32)
    return _generate(model, new_tokens, params, ids, mask, key, options, ends, filler)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Applies temperature, top-k and top-p, in this order.

    Args:
      logits: float [..., vocabulary].
      sampling: see `Sampling`.

    Returns:
      The logits that tokens are drawn from, -inf for those that are left out.

    Example:
      >>> filter_logits(jnp.array([1.0, 3.0, 2.0]), Sampling(top_k=jnp.array(2)))
      Array([-inf,   3.,   2.], dtype=float32)

    Reference:
      Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020 (top-p).
    """
    if sampling.temperature is not None:
        logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return logits
    descending = jnp.sort(logits, axis=-1, descending=True)
    kept = jnp.ones_like(descending, bool)
    if sampling.top_k is not None:
        rank = jnp.minimum(sampling.top_k, logits.shape[-1]) - 1
        least = jnp.take(descending, rank, axis=-1)[..., None]
        kept &= descending >= least
    if sampling.top_p is not None:
        probability = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        first = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,)) == 0
        kept &= (before < sampling.top_p) | first
    least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


@partial(jax.jit, static_argnames=("model", "new_tokens"))
def _generate(
    model: CausalLM,
    new_tokens: int,
    params: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    key: jax.Array | None,
    sampling: Sampling,
    ends: jax.Array,
    pad: jax.Array,
) -> jax.Array:
    batch, length = input_ids.shape

    def read(
        cache: Cache, tokens: jax.Array, mask: jax.Array | None, index: Any
    ) -> tuple[jax.Array, Cache]:
        logits, cache = cast(
            tuple[jax.Array, Cache],
            model.apply(params, tokens, mask, cache=cache, last=True),
        )
        if key is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache
        chosen = filter_logits(logits, sampling)
        drawn = jax.random.categorical(jax.random.fold_in(key, index), chosen, axis=-1)
        return drawn.astype(jnp.int32), cache

    def step(carry: tuple[Cache, jax.Array, jax.Array], index: jax.Array) -> Any:
        cache, token, done = carry
        drawn, cache = read(cache, token[:, None], None, index)
        drawn = jnp.where(done, pad, drawn)
        return (cache, drawn, done | jnp.isin(drawn, ends)), drawn

    # The last token is drawn but never read.
    cache = empty_cache(model.config, batch, length + new_tokens - 1)
    first, cache = read(cache, input_ids, attention_mask, 0)
    carry = (cache, first, jnp.isin(first, ends))
    _, rest = jax.lax.scan(step, carry, jnp.arange(1, new_tokens))
    return jnp.concatenate([first[None], rest]).T


def _check(sampling: Sampling, key: Any, attention_mask: Any, new_tokens: int) -> None:
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, found {new_tokens}")
    given = {name: value for name, value in sampling._asdict().items() if value is not None}
    if given and key is None:
        raise ValueError(f"{sorted(given)} need a key: without one the most likely token is taken")
    concrete = {name: v for name, v in given.items() if not isinstance(v, jax.core.Tracer)}
    if "temperature" in concrete and not concrete["temperature"] > 0:
        raise ValueError(f"temperature must be above 0, found {concrete['temperature']}")
    if "top_k" in concrete and not concrete["top_k"] >= 1:
        raise ValueError(f"top_k must be at least 1, found {concrete['top_k']}")
    if "top_p" in concrete and not 0 < concrete["top_p"] <= 1:
        raise ValueError(f"top_p must lie in (0, 1], found {concrete['top_p']}")
    if attention_mask is None or isinstance(attention_mask, jax.core.Tracer):
        return
    if not np.asarray(attention_mask)[:, -1].all():
        raise ValueError("prompts must be padded on the left: attention_mask ends in 0")
