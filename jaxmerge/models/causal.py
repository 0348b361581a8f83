"""What causal language models share: slots and positions, a cache, layers in a row or stacked."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.linear import precision_of


class CausalConfig(Protocol):
    """What `CausalLM` reads of a family's configuration."""

    @property
    def vocabulary_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def key_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def layer_kinds(self) -> tuple[int, ...]: ...
    @property
    def tied(self) -> bool: ...
    @property
    def dtype(self) -> str: ...
    @property
    def stacked(self) -> bool: ...


class Layer(NamedTuple):
    """One layer, or several stacked on axis 0 of every leaf.

    Attributes:
      params: the layer's parameters.
      kind: int32 [] (or [layers]), which entry of `Contexts` the layer reads.
    """

    params: Any
    kind: Any


class LayerCache(NamedTuple):
    """Keys and values of one layer: [batch, slots, key_heads, head_width] each."""

    key: jax.Array
    value: jax.Array


class Cache(NamedTuple):
    """What a model remembers of the tokens that it has read.

    Attributes:
      layers: one `LayerCache` per layer, or one with a leading axis of layers where the model is stacked.
      valid: bool [batch, slots], true where a slot holds a token, false where it is padding or empty.
      used: int32 [], the number of slots that are filled.
    """

    layers: Any
    valid: jax.Array
    used: jax.Array


class Places(NamedTuple):
    """Where the tokens of one call lie.

    Attributes:
      positions: int32 [batch or 1, length], counted from the first token that is not padding.
      slots: int32 [length], the tokens' own slots among those that can be read.
      valid: bool [batch or 1, slots], which slots hold a token.
    """

    positions: jax.Array
    slots: jax.Array
    valid: jax.Array

    def visible(self, window: int | None = None) -> jax.Array:
        """bool [batch or 1, length, slots]: what each token may read, at most the last `window` slots up to its own."""
        distance = self.slots[:, None] - jnp.arange(self.valid.shape[1])[None, :]
        causal = distance >= 0
        if window is not None:
            causal &= distance < window
        return causal[None] & self.valid[:, None, :]


class Head(nn.Module):
    """Logits of a vocabulary: hidden states [..., width] -> float32 [..., features]."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        initial = nn.initializers.lecun_normal()
        kernel = self.param("kernel", initial, (hidden.shape[-1], self.features))
        return scores(hidden, kernel, axis=0, precision=precision_of(self.dtype))


class CausalLM(nn.Module):
    """A causal language model; a subclass says what a layer is, what it reads, and which norms there are.

    A layer is a module `(hidden, kind, contexts, cache, start) -> (hidden, cache)`.
    """

    config: Any
    layer: ClassVar[type[nn.Module]]

    def setup(self) -> None:
        config: CausalConfig = self.config
        self.token_embedding = nn.Embed(
            config.vocabulary_size, config.width, dtype=jnp.dtype(config.dtype)
        )
        self.layers: Any
        if config.stacked:
            self.layers = nn.scan(
                self.layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, 0, nn.broadcast),
                length=config.depth,
            )(config)
        else:
            self.layers = [self.layer(config) for _ in range(config.depth)]
        self.norm = self.final_norm()
        if not config.tied:
            self.head = Head(config.vocabulary_size, config.dtype)

    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        raise NotImplementedError

    def contexts(self, places: Places) -> Any:
        """What layers of each kind read beside the hidden states: a tree with a leading axis of kinds."""
        raise NotImplementedError

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The first hidden states [batch, length, width]."""
        return self.token_embedding(tokens)

    def begin(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Any]:
        """The hidden states before the first layer, and the contexts that the layers read.

        Args:
          input_ids: int [batch, length].
          attention_mask: [batch, length], 0 at padding; None: no padding.
          position_ids: int [batch, length]; None: counted from the first token that is not padding.
          cache: the tokens follow those that it holds.
        """
        return self._begin(input_ids, _places(input_ids, attention_mask, position_ids, cache))

    def _begin(self, input_ids: jax.Array, places: Places) -> tuple[jax.Array, Any]:
        return self.embedded(input_ids, places.positions), self.contexts(places)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The last layer's hidden states [..., width] -> float32 [..., vocabulary]."""
        hidden = self.norm(hidden)
        if not self.config.tied:
            return self.head(hidden)
        table = self.token_embedding.embedding
        return scores(hidden, table, axis=1, precision=precision_of(self.config.dtype))

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: Cache | None = None,
        last: bool = False,
    ) -> Any:
        """Logits float32 [batch, length, vocabulary], of the last token only ([batch, vocabulary]) where `last` is set.

        With a cache the result is (logits, cache).
        """
        places = _places(input_ids, attention_mask, position_ids, cache)
        hidden, contexts = self._begin(input_ids, places)
        layers = None if cache is None else cache.layers
        start = None if cache is None else cache.used
        if self.config.stacked:
            kinds = jnp.asarray(self.config.layer_kinds, jnp.int32)
            hidden, layers = self.layers(hidden, kinds, contexts, layers, start)
        else:
            written = []
            for index, (layer, kind) in enumerate(
                zip(self.layers, self.config.layer_kinds, strict=True)
            ):
                one = None if layers is None else layers[index]
                hidden, one = layer(hidden, kind, contexts, one, start)
                written.append(one)
            layers = tuple(written)
        logits = self.logits(hidden[:, -1] if last else hidden)
        if cache is None:
            return logits
        return logits, Cache(layers, places.valid, cache.used + input_ids.shape[1])


def scores(
    hidden: jax.Array, table: jax.Array, *, axis: int, precision: jax.lax.Precision | None
) -> jax.Array:
    """Hidden states against every token's vector, summed up in float32 or wider whatever the dtype: losses need it."""
    contracting = ((hidden.ndim - 1,), (axis,))
    return jax.lax.dot_general(
        hidden,
        table.astype(hidden.dtype),
        (contracting, ((), ())),
        precision=precision,
        preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
    )


def empty_cache(config: CausalConfig, batch: int, slots: int) -> Cache:
    """A cache that holds nothing yet and has room for so many tokens a row."""
    shape = (batch, slots, config.key_heads, config.head_width)

    def empty(*axes: int) -> LayerCache:
        zeros = jnp.zeros((*axes, *shape), jnp.dtype(config.dtype))
        return LayerCache(zeros, zeros)

    if config.stacked:
        layers: Any = empty(config.depth)
    else:
        layers = tuple(empty() for _ in range(config.depth))
    return Cache(layers, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))


def remember(
    cache: LayerCache | None, key: jax.Array, value: jax.Array, start: jax.Array | None
) -> tuple[jax.Array, jax.Array, LayerCache | None]:
    """Writes a call's keys and values behind those in the cache; returns all that can be read."""
    if cache is None or start is None:
        return key, value, None
    at = (0, start, 0, 0)
    key = jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), at)
    value = jax.lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), at)
    return key, value, LayerCache(key, value)


def layers_of(config: CausalConfig, params: Any) -> Layer:
    """The layers of a stacked model, to scan over in any order with `layer_function`.

    Args:
      config: with `stacked=True`.
      params: the variables of the stacked model.

    Returns:
      A tree whose leaves have a leading axis of layers.
    """
    kinds = jnp.asarray(config.layer_kinds, jnp.int32)
    return Layer(params["params"]["layers"], kinds)


def layer_function(
    model: CausalLM,
) -> Callable[[Layer, jax.Array, Any], jax.Array]:
    """One layer as a pure function `(layer, hidden, contexts) -> hidden`.

    Args:
      model: a causal model.

    Returns:
      A function of one layer (an element of `layers_of`), hidden states [batch, length, width], and the contexts that
      `model.apply(params, input_ids, method="begin")` returns beside the first hidden states.
    """
    module = model.layer(model.config)

    def apply(layer: Layer, hidden: jax.Array, contexts: Any) -> jax.Array:
        variables = {"params": layer.params}
        hidden, _ = cast(Any, module.apply(variables, hidden, layer.kind, contexts, None, None))
        return hidden

    return apply


def _places(
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    position_ids: jax.Array | None,
    cache: Cache | None,
) -> Places:
    own = jnp.arange(input_ids.shape[1])
    if cache is None and attention_mask is None:
        valid = jnp.ones((1, own.size), bool)
        return Places(own[None] if position_ids is None else position_ids, own, valid)
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask
    new = mask.astype(bool)
    positions = jnp.cumsum(new, axis=1) - 1
    if cache is None:
        slots, valid = own, new
    else:
        slots = cache.used + own
        valid = jax.lax.dynamic_update_slice(cache.valid, new, (0, cache.used))
        positions = positions + cache.valid.sum(axis=1, keepdims=True)
    counted = jnp.maximum(positions, 0)
    return Places(counted if position_ids is None else position_ids, slots, valid)
