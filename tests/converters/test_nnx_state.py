"""nnx states: the same values in linen's variables and in nnx modules, both ways."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmerge.converters import (
    CheckpointError,
    from_nnx_state,
    load_orbax,
    save_orbax,
    to_nnx_state,
)
from jaxmerge.models import MLP, MLPConfig, ResNet, ResNetConfig
from jaxmerge.tree import flatten


class Network(nnx.Module):
    """The linen MLP's dense layers, and a list of two more modules."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.dense_0 = nnx.Linear(3, 4, rngs=rngs)
        self.dense_1 = nnx.Linear(4, 2, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

    def __call__(self, x: Any) -> Any:
        return self.dense_1(nnx.relu(self.dense_0(x)))


def equal(first: Any, second: Any) -> bool:
    one, two = flatten(first)[0], flatten(second)[0]
    return list(one) == list(two) and all(np.array_equal(one[path], two[path]) for path in one)


def test_linen_variables_run_in_an_nnx_module() -> None:
    model = MLP(MLPConfig((3, 4, 2)))
    params = model.init(jax.random.key(1, impl="rbg"), jnp.ones((1, 3)))
    module = Network()
    nnx.update(module, to_nnx_state(params))
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(module(x), model.apply(params, x))


def test_a_module_gives_its_weights_and_takes_them_back() -> None:
    module = Network()
    params = from_nnx_state(module)
    assert sorted(params) == ["batch_stats", "params"]
    assert list(params["batch_stats"]["norms"]["0"]) == ["mean", "var"]
    other = Network()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    nnx.update(other, to_nnx_state(doubled))
    assert equal(from_nnx_state(nnx.state(other)), doubled)
    assert not equal(from_nnx_state(module), doubled)


def test_running_statistics_survive_the_way_through_nnx_and_orbax(tmp_path: Any) -> None:
    model = ResNet(ResNetConfig((1,), (4,), 3))
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))
    state = to_nnx_state(params)
    save_orbax(tmp_path / "state", nnx.to_pure_dict(state))
    pure, _ = load_orbax(tmp_path / "state")
    nnx.replace_by_pure_dict(state, pure)
    assert equal(from_nnx_state(state), params)


def test_what_has_no_counterpart_is_named() -> None:
    with pytest.raises(CheckpointError, match="collection 'cache': expected 'params' or"):
        to_nnx_state({"cache": {"k": jnp.zeros(1)}})
    with pytest.raises(CheckpointError, match="two collections have the leaf 'a'"):
        to_nnx_state({"params": {"a": jnp.zeros(1)}, "batch_stats": {"a": jnp.zeros(1)}})
    with pytest.raises(CheckpointError, match=r"'step' is a Variable: expected an nnx.Param"):
        from_nnx_state(nnx.from_flat_state({("step",): nnx.Variable(jnp.zeros(()))}))
