"""Models cut into blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.search.blockwise import segment
from jaxmerge.tree import Layout, TensorLayout, paths


def convolutional_transformer(seed: int, change: float = 0.0) -> dict[str, Any]:
    """Two convolutions, three layers and a head; the layers change more than the rest."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, Any] = {
        "tokens": {"0": {"kernel": (3, 3, 3, 8)}, "1": {"kernel": (3, 3, 8, 16)}},
        "layers": {str(i): {"q": (16, 16), "mlp": (16, 32), "norm": (16,)} for i in range(3)},
        "head": {"kernel": (16, 10)},
    }

    def draw(path: Any, shape: tuple[int, ...]) -> jax.Array:
        scale = change * (10 if "layers" in jax.tree_util.keystr(path) else 1)
        return jnp.ones(shape) + scale * jnp.asarray(rng.normal(size=shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(
        draw, shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def test_blocks_are_parts_of_one_kind_next_to_each_other() -> None:
    base = convolutional_transformer(0)
    tuned = [convolutional_transformer(seed, 0.01) for seed in (1, 2)]
    labels = segment(tuned, base, blocks=2)
    assert list(labels) == paths(base)
    blocks: dict[str, set[str]] = {}
    for path, label in labels.items():
        blocks.setdefault(str(label), set()).add(path.split("/")[0])
    assert sorted(map(sorted, blocks.values())) == [["head", "layers"], ["tokens"]]


def test_one_block_is_the_whole_model_and_there_are_no_more_than_units() -> None:
    base = convolutional_transformer(0)
    tuned = [convolutional_transformer(1, 0.01)]
    assert len(set(segment(tuned, base, blocks=1).values())) == 1
    assert len(set(segment(tuned, base, blocks=99).values())) == 6


def test_the_program_gives_the_order() -> None:
    params = {
        "a": {"w": jnp.ones((4, 4))},
        "b": {"w": jnp.ones((4, 4))},
        "c": {"w": jnp.ones((4, 4))},
    }
    tuned = {
        name: {"w": leaf["w"] + (0.5 if name == "c" else 0.1)} for name, leaf in params.items()
    }

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ params["c"]["w"]) @ params["a"]["w"]) @ params["b"]["w"]

    labels = segment([tuned], params, blocks=2, apply_fn=apply_fn, inputs=jnp.ones((2, 4)))
    assert labels == {"a/w": "a..b", "b/w": "a..b", "c/w": "c"}


def test_stacked_layers_are_units_of_their_own() -> None:
    base = {"layers": {"w": jnp.ones((4, 8, 8))}}
    change = jnp.array([0.01, 0.01, 1.0, 1.0])[:, None, None]
    layout = Layout(
        {"layers/w": TensorLayout(tuple(f"model.layers.{i}.w" for i in range(4)), stacked=True)}
    )
    tuned = {"layers": {"w": base["layers"]["w"] + change}}
    (labels,) = segment([tuned], base, blocks=2, layout=layout).values()
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_what_the_cut_depends_on_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    base, first, second = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(3))
    from jaxmerge.search.blockwise.segmenting import _sums

    found = np.asarray(_sums([jnp.asarray(first), jnp.asarray(second)], jnp.asarray(base)))
    b = base.astype(np.float64)
    d = [first - b, second - b]
    expected = [
        15,
        (b**2).sum(),
        np.mean([(x**2).sum() for x in d]),
        np.mean([(x**4).sum() for x in d]),
        (sum(map(np.abs, d)) - np.abs(sum(d))).sum(),
        sum(np.abs(x).sum() for x in d),
        (d[0] * d[1]).sum(),
        np.linalg.norm(d[0]) * np.linalg.norm(d[1]),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": []}, "at least one model"),
        ({"blocks": 0}, "one block or more"),
        ({"apply_fn": lambda params, x: x}, "go together"),
    ],
)
def test_what_cannot_be_cut_is_refused(arguments: dict[str, Any], message: str) -> None:
    base = convolutional_transformer(0)
    given = {"models": [convolutional_transformer(1, 0.1)], "base": base, **arguments}
    with pytest.raises(ValueError, match=message):
        segment(given.pop("models"), given.pop("base"), **given)


def test_labels_go_into_by_block() -> None:
    base = convolutional_transformer(0)
    tuned = [convolutional_transformer(seed, 0.01) for seed in (1, 2)]
    labels = segment(tuned, base, blocks=2)
    method = jm.methods.by_block(dict.fromkeys(labels.values(), jm.methods.linear()), labels)
    merged = jm.merge(method, tuned)
    np.testing.assert_allclose(
        merged["head"]["kernel"],
        (tuned[0]["head"]["kernel"] + tuned[1]["head"]["kernel"]) / 2,
        rtol=1e-6,
    )
