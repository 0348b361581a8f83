"""A technique per block, searched for, and written as a recipe."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.converters import load_checkpoint, save_checkpoint
from jaxmerge.recipes import make_plan, parse, run
from jaxmerge.search.blockwise import AutoMerge, automerge
from jaxmerge.search.blockwise.recipe import options_of
from jaxmerge.tree import Layout, TensorLayout

LAYOUT = Layout(
    {
        "layers/w": TensorLayout(
            tuple(f"layers.{i}.weight" for i in range(3)), axes=(1, 0), stacked=True
        ),
        "head/w": TensorLayout(("head.weight",), axes=(1, 0)),
    }
)


def network(seed: int, near: Any = None) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"layers": {"w": (3, 6, 6)}, "head": {"w": (6, 4)}}
    drawn = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return drawn if near is None else jax.tree.map(lambda a, b: a + 0.5 * b, near, drawn)


BASE = network(0)
MODELS = [network(1, BASE), network(2, BASE)]
INPUTS = jax.random.normal(jax.random.key(5), (32, 6))


def outputs(params: Any, x: jax.Array) -> jax.Array:
    for w in params["layers"]["w"]:
        x = jnp.tanh(x @ w)
    return x @ params["head"]["w"]


def evaluate(params: Any, key: jax.Array, data: jax.Array) -> jax.Array:
    """How near the outputs are to each source's: [tasks, examples]."""
    found = outputs(params, data)
    return jnp.stack(
        [jnp.exp(-jnp.sum((found - outputs(model, data)) ** 2, axis=1)) for model in MODELS]
    )


@pytest.fixture(scope="module")
def found() -> AutoMerge:
    return automerge(
        MODELS,
        BASE,
        evaluate,
        key=jax.random.key(0),
        blocks={"layers/**": ("low", "low", "high"), "head/*": "high"},
        methods=["linear", jm.methods.ties(scope="tensor"), "dare_linear"],
        data=INPUTS,
        layout=LAYOUT,
        seed=7,
        strategy="random",
        population=32,
        generations=2,
    )


def test_the_result_is_the_best_point_merged(found: AutoMerge) -> None:
    state = found.method.init(MODELS, BASE, layout=LAYOUT)
    merged = found.method.apply(state, found.hyperparams, jax.random.key(7))
    chex.assert_trees_all_close(merged, found.params, rtol=1e-6)
    scores = np.asarray(evaluate(merged, jax.random.key(0), INPUTS)).mean(1)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    np.testing.assert_allclose(found.preservation, scores / found.sources, rtol=1e-5)
    np.testing.assert_allclose(found.sources, [1.0, 1.0], rtol=1e-5)
    kept = found.preservation
    assert found.score == pytest.approx(kept.mean() - 0.5 * abs(kept[0] - kept[1]), rel=1e-5)
    assert -found.history["best"][-1] == pytest.approx(found.score, rel=1e-5)
    assert found.evaluations == 64


@pytest.mark.parametrize("technique", ["linear", "ties", "dare_linear", "della"])
def test_the_recipe_merges_files_to_the_searched_parameters(
    found: AutoMerge, technique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tree in zip(("base", "a", "b"), (BASE, *MODELS), strict=True):
        save_checkpoint(tmp_path / name, as_checkpoint(tree))
    if technique != "linear":
        # The search's own choice is one case; the others are forced, per block with other numbers.
        found = automerge(
            MODELS,
            BASE,
            evaluate,
            key=jax.random.key(1),
            blocks={"layers/**": ("low", "low", "high"), "head/*": "high"},
            methods=[technique],
            data=INPUTS,
            layout=LAYOUT,
            seed=7,
            strategy="random",
            population=4,
            generations=1,
        )
    text = found.recipe(["a", "b"], "base")
    run(make_plan(parse(text), out="out", seed=found.seed))
    written, searched = load_checkpoint("out"), as_checkpoint(found.params)
    assert set(written) == set(searched)
    for name, array in written.items():
        np.testing.assert_allclose(array, searched[name], rtol=2e-6, atol=2e-7)


def as_checkpoint(tree: Any) -> dict[str, np.ndarray]:
    layers = {f"layers.{i}.weight": np.asarray(w).T for i, w in enumerate(tree["layers"]["w"])}
    return {**layers, "head.weight": np.asarray(tree["head"]["w"]).T}


def test_a_search_is_traced_once_whatever_its_length_seed_and_balance() -> None:
    traces = 0

    def counting(params: Any, key: jax.Array, data: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return evaluate(params, key, data)

    def search(seed: int, balance: float) -> None:
        automerge(
            MODELS, BASE, counting, key=jax.random.key(seed), blocks=2, layout=LAYOUT, data=INPUTS,
            methods=["linear", "task_arithmetic"], sources=[1.0, 1.0], strategy="random",
            population=4, generations=3, balance=balance,
        )  # fmt: skip

    search(0, 0.5)
    first = traces
    search(1, 0.25)
    # Shapes are looked at and the winner is scored outside of the program, which is not traced again.
    assert traces - first < first


def test_a_search_over_the_whole_model_stands_beside() -> None:
    result = automerge(
        MODELS, BASE, evaluate, key=jax.random.key(0), blocks=2, methods=["linear", "ties"],
        data=INPUTS, layout=LAYOUT, whole=True, population=4, generations=2,
        strategy="random", balance=0.0,
    )  # fmt: skip
    assert result.whole is not None
    assert list(result.whole.chosen) == ["model"]
    assert result.whole.evaluations == result.evaluations
    assert len(result.chosen) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"balance": -1.0}, "balance must be 0 or more"),
        ({"sources": [1.0]}, "one score per task"),
        ({"sources": [1.0, 0.0]}, "task 1: its source scores 0"),
        ({"evaluate": lambda params, key, data: jnp.ones(3)}, "3 tasks for 2 models"),
        ({"evaluate": lambda params, key, data: jnp.ones(())}, "scores \\[tasks\\]"),
        ({"blocks": {"layers/**": "low"}}, "no label for 'head/w'"),
        ({"methods": ["tise"]}, "'ties'"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "key": jax.random.key(0), "data": INPUTS, "layout": LAYOUT, "evaluate": evaluate, **arguments
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        automerge(MODELS, BASE, given.pop("evaluate"), **given)


def test_options_are_found_again() -> None:
    assert options_of(jm.methods.ties(scope="tensor")) == {"scope": "tensor"}
    assert options_of(jm.methods.linear()) == {}
    with pytest.raises(ValueError, match="not a registered method"):
        options_of(jm.methods.choose([jm.methods.linear(), jm.methods.ties()]))
