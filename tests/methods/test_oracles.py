"""Every method against a float64 oracle written from the formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import averages, spherical, task_vectors

import jaxmerge as jm
from jaxmerge.methods import draws

SHAPES = {"a": (7, 9), "b": (5,), "c": (2, 3, 4), "d": ()}
MODELS = 3


def trees(
    seed: int, ties: bool = False
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A base and models; with `ties`, task vectors of few distinct values and many zeros."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        values = rng.integers(-2, 3, shape) / 4 if ties else rng.normal(size=shape)
        return np.asarray(values, np.float32)

    base = {name: draw(shape) for name, shape in SHAPES.items()}
    return base, [{name: base[name] + draw(SHAPES[name]) for name in SHAPES} for _ in range(MODELS)]


def per_tensor(oracle: Any, base: Any, models: list[Any], *args: Any, **kwargs: Any) -> Any:
    return {n: oracle(base[n], [m[n] for m in models], *args, **kwargs) for n in SHAPES}


def agree(merged: Any, expected: Any) -> None:
    for name in SHAPES:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


WEIGHTS = [[1.0, 1.0, 1.0], [0.2, 0.7, 1.5], [0.5, -0.3, 0.9], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_linear(weight: list[float], normalize: bool) -> None:
    _, models = trees(0)
    expected = {n: averages.linear([m[n] for m in models], weight, normalize) for n in SHAPES}
    agree(jm.merge("linear", models, weight=weight, normalize=normalize), expected)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(weight: list[float], normalize: bool) -> None:
    base, models = trees(1)
    expected = per_tensor(task_vectors.task_arithmetic, base, models, weight, 0.7, normalize)
    hyperparams = {"weight": weight, "scale": 0.7, "normalize": normalize}
    agree(jm.merge("task_arithmetic", models, base=base, **hyperparams), expected)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, [0.3, 0.7, 1.0]])
@pytest.mark.parametrize("equal_magnitudes", [False, True])
@pytest.mark.parametrize("divisor", ["absolute", "signed"])
def test_ties_per_tensor(weight: Any, density: Any, equal_magnitudes: bool, divisor: Any) -> None:
    base, models = trees(2, equal_magnitudes)
    options = {"scope": "tensor", "divisor": divisor}
    for normalize, rescale in ((True, False), (False, True)):
        expected = per_tensor(
            task_vectors.ties, base, models, weight, density, 1.3, normalize, rescale, divisor
        )
        hyperparams = {"weight": weight, "density": density, "scale": 1.3}
        flags = {"normalize": normalize, "rescale": rescale}
        merged = jm.merge("ties", models, base=base, options=options, **hyperparams, **flags)
        agree(merged, expected)


def test_ties_keeps_at_least_one_entry_on_demand() -> None:
    base, models = trees(3)
    expected = per_tensor(task_vectors.ties, base, models, 1.0, 0.001, keep_one=True)
    options = {"scope": "tensor", "minimum": 1}
    agree(jm.merge("ties", models, base=base, density=0.001, options=options), expected)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    density=st.lists(st.floats(0, 1), min_size=MODELS, max_size=MODELS),
    equal_magnitudes=st.booleans(),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_ties_over_the_whole_model(
    seed: int, density: list[float], equal_magnitudes: bool, flags: tuple[bool, bool]
) -> None:
    base, models = trees(seed, equal_magnitudes)
    weight = [0.3, 0.9, 1.1]
    expected = task_vectors.ties_model_scope(base, models, weight, density, 1.0, *flags)
    hyperparams = {"weight": weight, "density": density}
    switches = {"normalize": flags[0], "rescale": flags[1]}
    agree(jm.merge("ties", models, base=base, **hyperparams, **switches), expected)
    method = jm.methods.ties()
    state = method.init(models, base)
    agree(method.apply(state, {**hyperparams, **switches}), expected)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("norm", ["paper", "l1"])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_dare_with_its_own_masks(name: str, norm: Any, density: float) -> None:
    base, models = trees(4)
    key = jax.random.key(11)
    words = draws.key_words(key)
    weight = [0.5, 1.0, 0.8]
    expected = {}
    for tensor, shape in SHAPES.items():
        hashed = jnp.asarray(jm.tree.name_words(tensor), jnp.uint32)
        seeds = draws.tensor_seeds(words, hashed, MODELS)
        masks = [u < density for u in draws.uniform(seeds, MODELS, shape, jnp.uint32(0))]
        arguments = (base[tensor], [m[tensor] for m in models], weight, density, masks)
        oracle = task_vectors.dare if name == "dare_linear" else task_vectors.dare_ties
        expected[tensor] = oracle(*arguments, 0.9, False, norm)
    hyperparams = {"weight": weight, "density": density, "scale": 0.9, "normalize": False}
    options = {"rescale_norm": norm}
    agree(jm.merge(name, models, base=base, key=key, options=options, **hyperparams), expected)


@pytest.mark.parametrize("t", [-0.2, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("zero_norm", ["line", "arc"])
def test_slerp(t: float, zero_norm: Any) -> None:
    base, (model, *_) = trees(5)
    model["b"] = base["b"] * 2
    model["c"] = -base["c"]
    model["d"] = np.zeros((), np.float32)
    dialect = zero_norm == "arc"
    expected = {n: spherical.slerp(base[n], model[n], t, dialect) for n in SHAPES}
    options = {"zero_norm": zero_norm}
    agree(jm.merge("slerp", [model], base=base, t=t, options=options), expected)
    agree(jm.merge("slerp", [base, model], t=t, options=options), expected)
