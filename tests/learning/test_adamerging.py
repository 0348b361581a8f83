"""AdaMerging against the entropy's derivative on paper, its levels, and what it refuses."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmerge as jm
from jaxmerge.learning import adamerging, block_labels

TASKS, BATCHES, EXAMPLES, FEATURES, CLASSES = 2, 3, 5, 4, 3


def problem() -> tuple[Any, list[Any], list[np.ndarray]]:
    rng = np.random.default_rng(0)

    def tree() -> dict[str, Any]:
        kernels = {"layers_0": (FEATURES, FEATURES), "layers_1": (FEATURES, CLASSES)}
        named = {
            name: {"kernel": rng.normal(size=shape).astype(np.float32)}
            for name, shape in kernels.items()
        }
        return {**named, "scale": np.ones((), np.float32), "step": np.int32(3)}

    inputs = [
        rng.normal(size=(BATCHES, EXAMPLES, FEATURES)).astype(np.float32) for _ in range(TASKS)
    ]
    return tree(), [tree() for _ in range(TASKS)], inputs


def network(params: Any, x: Any) -> Any:
    return params["scale"] * (x @ params["layers_0"]["kernel"] @ params["layers_1"]["kernel"])


def linear_head(params: Any, x: Any) -> Any:
    return x @ params["w"]


def reversed_head(params: Any, x: Any) -> Any:
    return -2.0 * linear_head(params, x)


def test_one_step_follows_the_derivative_of_the_entropy() -> None:
    rng = np.random.default_rng(2)
    base, *models = [{"w": rng.normal(size=(FEATURES, CLASSES))} for _ in range(1 + TASKS)]
    inputs = [rng.normal(size=(1, EXAMPLES, FEATURES)) for _ in range(TASKS)]
    start = np.array([0.3, 0.6])
    found = adamerging(
        [linear_head, reversed_head],
        models,
        inputs,
        base=base,
        start=start,
        steps=1,
        optimizer=optax.sgd(1.0),
    )
    deltas = [model["w"] - base["w"] for model in models]
    merged = base["w"] + sum(s * d for s, d in zip(start, deltas, strict=True))
    total, gradient = 0.0, np.zeros(TASKS)
    for x, factor in zip(inputs, (1.0, -2.0), strict=True):
        logits = factor * (x[0] @ merged)
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        entropy = -np.sum(shares * np.log(shares), axis=1)
        total += entropy.mean()
        # dH/dz_j = -p_j (log p_j + H)
        slope = -shares * (np.log(shares) + entropy[:, None]) / EXAMPLES
        gradient += [np.sum(slope * factor * (x[0] @ delta)) for delta in deltas]
    np.testing.assert_allclose(found.losses, [total], rtol=1e-5)
    np.testing.assert_allclose(start - found.hyperparams["weight"], gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("level", "blocks"),
    [
        ("task", None),
        ("layer", ("layers_0", "layers_1", "scale")),
        ("tensor", ("layers_0/kernel", "layers_1/kernel", "scale")),
    ],
)
def test_the_entropy_falls_at_every_level(level: Any, blocks: Any) -> None:
    base, models, inputs = problem()
    found = adamerging(
        network, models, inputs, base=base, level=level, steps=30, optimizer=optax.adam(0.02)
    )
    weight = found.hyperparams["weight"]
    if blocks is None:
        assert weight.shape == (TASKS,)
    else:
        assert weight.blocks == blocks
        assert weight.values.shape == (len(blocks), TASKS)
        assert not np.allclose(weight.values[0], weight.values[1])
    assert float(jnp.mean(found.losses[-BATCHES:])) < float(jnp.mean(found.losses[:BATCHES])) - 0.1
    assert found.params["step"] == 3


def test_trimmed_task_vectors_are_added_rather_than_averaged() -> None:
    base, model = {"w": np.zeros((2, 2))}, {"w": np.array([[4.0, 1.0], [-2.0, 3.0]])}
    found = adamerging(
        linear_head,
        [model],
        [np.eye(2)[None]],
        base=base,
        method=jm.methods.ties(scope="tensor"),
        hyperparams={"density": 0.5},
        start=0.25,
        steps=1,
        optimizer=optax.sgd(0.0),
    )
    np.testing.assert_array_equal(found.params["w"], [[1.0, 0.0], [0.0, 0.75]])


def test_layers_are_read_from_the_checkpoints_names() -> None:
    tree = {"params": {"layers": {"w": np.zeros((2, 3))}, "head": {"w*": np.zeros(2)}, "n": 1}}
    layout = jm.tree.stacked_layout(tree, {"params/layers/": "params/layers.{layer}."})
    layers = block_labels(tree, layout=layout)
    assert layers == {
        "params/head/w[*]": "params/head",
        "params/layers/w": ("params/layers.0", "params/layers.1"),
    }
    tensors = block_labels(tree, "tensor", layout=layout)
    assert tensors["params/layers/w"] == ("params/layers.0.w", "params/layers.1.w")
    values = jm.tree.per_block(np.zeros(3), layers)
    assert values.rows("params/layers/w", layout.of("params/layers/w")) == [1, 2]
    with pytest.raises(ValueError, match="level is"):
        block_labels(tree, "block")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": [np.ones((1, 2, 4))]}, "one task per model, 2, found 1 arrays of inputs"),
        ({"apply_fns": [network] * 3}, "one task per model, 2, found 3 functions"),
        ({"method": jm.methods.slerp()}, "slerp has none"),
        ({"level": "model"}, "level is"),
        ({"start": [0.1, 0.2, 0.3]}, r"2 numbers .* found shape \[3\]"),
        ({"hyperparams": {"scael": 1.0}}, "did you mean 'scale'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    base, models, inputs = problem()
    arguments = {"apply_fns": network, "models": models, "inputs": inputs, "base": base, **change}
    with pytest.raises(ValueError, match=message):
        adamerging(**arguments)
