"""Bad input is named before any work: the tensor, what was expected, what was found, the nearest name."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxmerge as jm


def model(**changes: Any) -> dict[str, Any]:
    params = {"fc1": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "steps": jnp.asarray(1)}
    return {**params, **changes}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (model(fc1={"bias": jnp.ones(2)}), r"models\[1\] lacks tensor 'fc1/kernel' of models\[0\]"),
        (
            model(fc1={"kernels": jnp.ones((3, 2)), "bias": jnp.ones(2)}),
            r"lacks tensor 'fc1/kernel'.*nearest name there is 'fc1/kernels'",
        ),
        (model(fc2=jnp.ones(1)), r"models\[1\] has tensor 'fc2', which models\[0\] lacks"),
        (
            model(fc1={"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)}),
            r"tensor 'fc1/kernel': models\[0\] has shape \[3, 2\], models\[1\] has \[2, 3\]",
        ),
        (
            model(fc1={"kernel": jnp.ones((3, 2), jnp.int32), "bias": jnp.ones(2)}),
            r"tensor 'fc1/kernel': models\[0\] has dtype float32, models\[1\] has int32",
        ),
        (
            model(fc1={"kernel": jnp.ones((3, 2), jnp.complex64), "bias": jnp.ones(2)}),
            r"tensor 'fc1/kernel' of models\[1\] is complex",
        ),
    ],
)
def test_models_that_do_not_match(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jm.merge("linear", [model(), other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tise"}, r"unknown merge method 'tise'; did you mean 'ties'\?"),
        ({"models": []}, "needs at least one model"),
        ({"base": None}, "works on task vectors and needs base="),
        ({"densty": 0.5}, r"no hyperparameter 'densty'; did you mean 'density'\?"),
        ({"weight": [1.0]}, r"weight needs 2 values \(one per model\), found 1"),
        ({"weight": [[1.0, 2.0]]}, r"found shape \[1, 2\]"),
        ({"weight": "heavy"}, "needs a number"),
        ({"weight": [1.0, float("nan")]}, "not finite"),
        ({"density": 1.5}, r"density must lie in \[0, 1\], found 1.5"),
        ({"scale": [1.0, 2.0]}, "shared by all models, found 2 values"),
        ({"options": {"scop": "tensor"}}, r"no option 'scop'; did you mean 'scope'\?"),
        ({"options": {"scope": "layer"}}, "option scope must be one of 'model', 'tensor'"),
        ({"layout": jm.tree.Layout({"x": jm.tree.TensorLayout(("x",))})}, "describes 'x'"),
        ({"extras": {"fisher": 1}}, "takes no extra"),
        ({"method": "dare_linear"}, "is random and needs key="),
        ({"method": "slerp"}, "takes 2 model.*found 3"),
        (
            {"density": jm.tree.per_block([0.5], {"**": "all"})},
            "share of the whole model and cannot differ between blocks",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    call = {"method": "ties", "models": [model(), model()], "base": model(), **arguments}
    method, models = call.pop("method"), call.pop("models")
    with pytest.raises((ValueError, TypeError), match=message):
        jm.merge(method, models, **call)


def test_a_mistake_is_found_inside_a_trace_too() -> None:
    with pytest.raises(ValueError, match="one per model"):
        jax.jit(lambda w: jm.merge("linear", [model(), model()], weight=w))(jnp.ones(3))


def test_registering_refuses_a_taken_name_and_positional_options() -> None:
    def linear() -> Any: ...

    with pytest.raises(ValueError, match="registered already"):
        jm.methods.register(linear)

    def mine(scale: float) -> Any: ...

    with pytest.raises(ValueError, match="keyword-only"):
        jm.methods.register(mine)


def test_a_single_array_is_a_model() -> None:
    merged = jm.merge("linear", [jnp.zeros(2), jnp.ones(2)])
    assert merged.tolist() == [0.5, 0.5]
