"""Causal models whose layers stand in a row of several models' layers, or along a path through such a row."""

import functools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.models.causal import CausalLM, LayerCache
from jaxmerge.models.stacking import stack_layers
from jaxmerge.tree import flatten

_OUTSIDE = ("vocabulary_size", "context_length", "tied", "stacked")
"""What of a configuration layers do not read."""


def in_a_row(
    models: Sequence[CausalLM], params: Sequence[Any], *, ends: int = 0
) -> tuple[CausalLM, Any]:
    """Puts the layers of several models one behind the other.

    Args:
      models: of one family, with equal configurations but for the layers' number and kinds, the vocabulary and the
        context's length.
      params: the variables of each, with a subtree per layer or stacked as its configuration says.
      ends: the model that gives embeddings, final norm and head.

    Returns:
      The model that runs all layers after each other, stacked, and its variables: `layers_of` and `layer_function` make
      of them what a search through data flow takes, and `along` a path through them.

    Raises:
      ValueError: models of different families or layers, or layers that know their place in their model (GPT-2 with
        `scale_by_layer`).

    Example:
      >>> from jaxmerge.models import GPT2, GPT2Config
      >>> model = GPT2(GPT2Config(vocabulary_size=9, context_length=4, width=4, depth=2, heads=2, mlp_width=8))
      >>> tokens = jnp.ones((1, 3), jnp.int32)
      >>> variables = [jax.jit(model.init)(jax.random.key(i, impl="rbg"), tokens) for i in range(2)]
      >>> row, joined = in_a_row([model, model], variables)
      >>> row.config.depth, joined["params"]["layers"]["mlp"]["up"]["kernel"].shape
      (4, (4, 4, 8))
    """
    if len(models) != len(params) or not models:
        raise ValueError(f"found {len(models)} models and {len(params)} variables")
    if not 0 <= ends < len(models):
        raise ValueError(f"ends={ends} is none of the {len(models)} models")
    for number, model in enumerate(models):
        _check_same(models[ends], model, number)
    origins = [(model.config, i) for model in models for i in range(model.config.depth)]
    row = type(models[ends])(replace(models[ends].config.of_layers(origins), stacked=True))
    trees = [
        (one if model.config.stacked else stack_layers(one))["params"]
        for model, one in zip(models, params, strict=True)
    ]
    shapes = [
        {path: leaf.shape[1:] for path, leaf in flatten(tree["layers"])[0].items()}
        for tree in trees
    ]
    for number, found in enumerate(shapes):
        if found != shapes[0]:
            path = next(p for p in {**shapes[0], **found} if shapes[0].get(p) != found.get(p))
            raise ValueError(
                f"a layer's {path!r} has shape {shapes[0].get(path)} in model 0, but "
                f"{found.get(path)} in model {number}"
            )
    layers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(t["layers"] for t in trees))
    return row, {"params": {**trees[ends], "layers": layers}}


def along(
    model: CausalLM, params: Any, layers: Sequence[int], scales: Sequence[float] | None = None
) -> tuple[CausalLM, Any]:
    """The model that runs some of a model's layers, in any order and as often as is wanted.

    Args:
      model: stacked.
      params: its variables.
      layers: which ones, in the order in which they run.
      scales: what each one's input is multiplied by; None: 1, and the model is one of its family, which can be saved.

    Returns:
      The model, stacked, and its variables. With scales the layers are `ScaledLayer`s: what they hold stands under
      `layers/layer`, the scales [len(layers)] under `layers/scale`. It is called, trained and asked for text as any
      other.

    Raises:
      ValueError: no layers, a number that the model does not have, another number of scales, or a model that is not
        stacked.

    Example:
      >>> from jaxmerge.models import GPT2, GPT2Config
      >>> config = GPT2Config(vocabulary_size=9, context_length=4, width=4, depth=2, heads=2, mlp_width=8, stacked=True)
      >>> tokens = jnp.ones((1, 3), jnp.int32)
      >>> variables = jax.jit(GPT2(config).init)(jax.random.key(0, impl="rbg"), tokens)
      >>> found, chosen = along(GPT2(config), variables, [1, 0, 1], scales=[1.0, 0.5, 2.0])
      >>> chosen["params"]["layers"]["scale"]
      Array([1. , 0.5, 2. ], dtype=float32)
      >>> found.apply(chosen, tokens).shape
      (1, 3, 9)
    """
    config = model.config
    if not config.stacked:
        raise ValueError("a path leads through a model with stacked layers: see stack_layers")
    if not layers:
        raise ValueError("a model has layers: the path is empty")
    for layer in layers:
        if not 0 <= layer < config.depth:
            raise ValueError(f"the model has layers 0 to {config.depth - 1}, found {layer}")
    if scales is not None and len(scales) != len(layers):
        raise ValueError(f"{len(layers)} layers, but {len(scales)} scales")
    chosen = np.asarray(layers, np.int32)
    picked = jax.tree.map(lambda leaf: leaf[chosen], params["params"]["layers"])
    kind: Any = type(model)
    if scales is not None:
        kind = scaled(kind)
        picked = {"layer": picked, "scale": jnp.asarray(scales, jnp.float32)}
    found = kind(config.of_layers([(config, layer) for layer in layers]))
    return found, {**params, "params": {**params["params"], "layers": picked}}


class ScaledLayer(nn.Module):
    """A layer whose input is multiplied by a learned number."""

    config: Any
    layer: ClassVar[type[nn.Module]]

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        kind: int | jax.Array,
        contexts: Any,
        cache: LayerCache | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        scale = self.param("scale", nn.initializers.ones, ())
        layer: Any = type(self).layer(self.config, name="layer")
        hidden = hidden * scale.astype(hidden.dtype)
        return layer(hidden, kind, contexts, cache, start)


@functools.cache
def scaled(kind: type[CausalLM]) -> type[CausalLM]:
    """The family of models like `kind` whose layers are `ScaledLayer`s.

    Example:
      >>> from jaxmerge.models import GPT2
      >>> scaled(GPT2).__name__
      'ScaledGPT2'
    """
    layer = type(f"Scaled{kind.layer.__name__}", (ScaledLayer,), {"layer": kind.layer})
    return type(f"Scaled{kind.__name__}", (kind,), {"layer": layer})


def _check_same(first: CausalLM, other: CausalLM, number: int) -> None:
    if type(other) is not type(first):
        raise ValueError(
            f"model {number} is a {type(other).__name__}, expected a {type(first).__name__}"
        )
    for name in (field.name for field in fields(first.config)):
        if name in _OUTSIDE or name in type(first.config).per_layer:
            continue
        wanted, found = getattr(first.config, name), getattr(other.config, name)
        if wanted != found:
            raise ValueError(f"model {number} has {name}={found!r}, expected {wanted!r}")
