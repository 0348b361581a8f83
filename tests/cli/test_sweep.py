"""Sweeps: compiled once, equal to separate merges, honest about their score."""

import csv
import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.converters import load_checkpoint, save_checkpoint
from jaxmerge.recipes import dump, make_plan, parse, read, resolve, run
from jaxmerge.sweeping import EvaluatorError, Grid, Sweep, make_grid, parse_axis, sweep

FLOATS = ("fc.weight", "fc.bias", "head.weight")


def flat(params: Any) -> jax.Array:
    """Every number of a candidate as a score of its own: the sweep then returns the candidates."""
    return jnp.concatenate([jnp.ravel(params[name]).astype(jnp.float32) for name in FLOATS])


def grid(text: str, *axes: str) -> Grid:
    return make_grid(parse(text), [parse_axis(axis) for axis in axes])


def swept(text: str, *axes: str, seed: int = 0, **options: Any) -> Sweep:
    made = grid(text, *axes)
    return sweep(
        made, make_plan(made.resolved, seed=seed), options.pop("evaluate", flat), **options
    )


def merged(recipe: Any, seed: int = 0) -> np.ndarray:
    out = Path(f"merged-{len(list(Path().iterdir()))}.safetensors")
    run(make_plan(recipe, out=out, seed=seed))
    return np.asarray(flat(load_checkpoint(out)))


def recipe(method: str, parameters: str, *, dialect: str = "mergekit", base: bool = True) -> str:
    models = "[{model: a}, {model: b}]" if method != "slerp" else "[{model: a}]"
    head = f"dialect: {dialect}\nmerge_method: {method}\nmodels: {models}\n"
    return head + ("base_model: base\n" if base else "") + f"parameters: {parameters}\n"


def test_256_candidates_are_traced_once_and_equal_separate_merges(folder: Path) -> None:
    text = recipe("ties", "{weight: 1}")
    axes = ("density=0.1:1:8", "weight[0]=0.25:1:4", "weight[1]=-0.5:1.5:8")
    evaluate = chex.assert_max_traces(flat, n=1)
    found = swept(text, *axes, evaluate=evaluate, batch=64)
    assert found.parts.shape == (256, 48)
    assert found.compiled
    models, base = [load_checkpoint(name) for name in ("a", "b")], load_checkpoint("base")
    for i, (density, first, second) in enumerate(found.grid.points):
        expected = jm.merge(
            resolve(parse(text)).method,
            models,
            base=base,
            density=density,
            weight=[first, second],
            normalize=1.0,
        )
        np.testing.assert_allclose(found.parts[i], flat(expected), rtol=1e-6, atol=1e-7)


METHODS = [
    (recipe("linear", "{weight: 1}", base=False), ("weight[0]=0.3,0.7", "normalize=false,true")),
    (recipe("linear", "{weight: 1}"), ("weight=0.3,0.7", "weight[1]=0.1,0.9")),
    (recipe("task_arithmetic", "{weight: 0.3}"), ("lambda=0.5,1,2",)),
    (recipe("ties", "{weight: 0.3, density: 0.7}"), ("density[1]=0.1:0.9:5", "scale=0.7,1")),
    (recipe("ties", "{density: 0.7}", dialect="jaxmerge"), ("density=0.1:0.9:5", "rescale=0,1")),
    (recipe("dare_linear", "{weight: 0.3, density: 0.7}"), ("density=0.1:0.9:5",)),
    (recipe("dare_ties", "{density: [0.3, 0.7]}", dialect="jaxmerge"), ("density[0]=0.1:0.9:3",)),
    (recipe("slerp", "{t: 0.3}"), ("t=0.1:0.9:5",)),
]


@pytest.mark.parametrize(("text", "axes"), METHODS)
def test_merging_a_points_recipe_gives_its_candidate(
    folder: Path, text: str, axes: tuple[str, ...]
) -> None:
    found = swept(text, *axes, seed=5)
    for i in {0, len(found.scores) // 2, len(found.scores) - 1}:
        # As a user would: through the file.
        again = parse(dump(found.grid.recipe(i)))
        np.testing.assert_allclose(found.parts[i], merged(again, seed=5), rtol=1e-6, atol=1e-7)


def test_a_density_keeps_the_same_entries_swept_and_merged(folder: Path) -> None:
    # 0.1, 0.2, ... of 10 entries: float32 and float64 of these fall on both sides of whole numbers.
    for name, scale in (("base", 0.0), ("a", 1.0)):
        Path(name, "model.safetensors").unlink()
        save_checkpoint(name, {"w": scale * np.arange(1, 11, dtype=np.float32)})
    text = (
        "dialect: jaxmerge\nmerge_method: ties\nbase_model: base\nmodels: [{model: a}]\n"
        "options: {scope: tensor}\n"
    )
    found = swept(text, "density=0:1:21", evaluate=lambda params: params["w"])
    for i in range(21):
        run(make_plan(found.grid.recipe(i), out=f"{i}.safetensors"))
        np.testing.assert_array_equal(found.parts[i], load_checkpoint(f"{i}.safetensors")["w"])


def test_every_batch_size_gives_the_same_scores(folder: Path) -> None:
    text, axis = recipe("dare_linear", "{weight: 1, rescale: 0}"), "density=0.1:1:7"
    whole = swept(text, axis, seed=1, batch=7)
    traces: list[int] = []

    def counted(params: Any) -> jax.Array:
        traces.append(size)
        return flat(params)

    for size in (1, 3, 100):
        parts = swept(text, axis, seed=1, batch=size, evaluate=counted).parts
        np.testing.assert_allclose(parts, whole.parts, rtol=1e-6, atol=1e-7)
    assert traces == [1, 3, 100]


def test_the_batch_shrinks_until_memory_holds_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(params: Any) -> jax.Array:
        large = jnp.outer(jnp.ones(10**6), params["fc.bias"])
        return jnp.sum(jax.lax.cummax(large))

    text = recipe("linear", "{weight: 1}", base=False)
    module = importlib.import_module("jaxmerge.sweeping.sweep")
    monkeypatch.setattr(module, "available_memory", lambda: 10**8)
    assert 1 <= swept(text, "weight[0]=0:1:16", evaluate=evaluate).batch < 16
    assert swept(text, "weight[0]=0:1:16").batch == 16


def test_sources_that_memory_does_not_hold_are_refused(
    folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("jaxmerge.sweeping.sweep")
    monkeypatch.setattr(module, "available_memory", lambda: 100)
    result = call("sweep", "ties.yaml", "--grid", "density=0.1,1")
    assert result.exit_code == 2
    assert "the sweep keeps all sources in memory and needs about" in result.stderr
    assert "100 B are free" in result.stderr


def test_tied_and_carried_tensors_reach_the_evaluator(folder: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        Path(name, "model.safetensors").unlink()
        shared = np.full(3, value, np.float32)
        save_checkpoint(name, {"embed": shared, "head": shared, "ids": np.array([2**40 + 1])})
    text = recipe("linear", "{weight: 1}", base=False)

    def on_host(params: dict[str, Any]) -> float:
        score = float(params["embed"][0] + params["head"][0])
        assert params["ids"].tolist() == [2**40 + 1]
        return score

    host = swept(text, "weight[0]=1,3", evaluate=on_host)
    traced = swept(text, "weight[0]=1,3", evaluate=lambda p: p["embed"][0] + p["head"][0])
    np.testing.assert_allclose(host.scores, [3.0, 2.5], rtol=1e-6)
    np.testing.assert_allclose(traced.scores, host.scores, rtol=1e-6)
    assert (host.compiled, traced.compiled) == (False, True)
    assert "cannot be traced (ConcretizationTypeError)" in host.notes[0]


def test_float64_sources_are_swept_in_float64(folder: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        Path(name, "model.safetensors").unlink()
        save_checkpoint(name, {"w": np.random.default_rng(seed).normal(size=4)})
    text = recipe("linear", "{weight: 1}", base=False)
    seen: list[np.ndarray] = []

    def on_host(params: dict[str, Any]) -> float:
        seen.append(np.asarray(params["w"]))
        return 0.0

    found = swept(text, "weight[0]=0.5,1", evaluate=on_host)
    run(make_plan(found.grid.recipe(0), out="out.safetensors"))
    assert seen[-2].dtype == np.float64
    np.testing.assert_allclose(seen[-2], load_checkpoint("out.safetensors")["w"], rtol=1e-15)


def test_tasks_are_ranked_by_their_mean(folder: Path) -> None:
    def evaluate(params: Any) -> jax.Array:
        bias = params["fc.bias"][0]
        return jnp.stack([bias, -3 * bias])

    found = swept(recipe("linear", "{weight: 1}", base=False), "weight[0]=0,1,2", evaluate=evaluate)
    np.testing.assert_allclose(found.scores, found.parts.mean(axis=1))
    assert found.best == int(np.argmax(found.scores))


def test_a_nan_score_comes_last(folder: Path) -> None:
    def evaluate(params: Any) -> jax.Array:
        bias = params["fc.bias"][0]
        return jnp.where(bias == jnp.max(bias), jnp.nan, 0.0)

    text = recipe("linear", "{weight: 1}", base=False)
    with pytest.raises(EvaluatorError, match="every score is NaN"):
        swept(text, "weight[0]=0,1", evaluate=evaluate)
    scores = itertools.cycle([float("nan"), 1.0, 2.0])
    calls: list[Any] = []

    def on_host(params: Any) -> float:
        calls.append(float(params["fc.bias"][0]))
        return next(scores)

    found = swept(text, "weight[0]=0,1,2", evaluate=on_host)
    assert found.order.tolist() == [2, 1, 0]
    assert found.notes[-1] == "1 of 3 scores are NaN and come last"


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda p: p["fc.bais"], "failed with KeyError: 'fc.bais'; did you mean 'fc.bias'?"),
        (lambda p: p["fc.weight"], r"found float32\[6, 4\]"),
        (lambda p: jnp.zeros(0), r"found float32\[0\]"),
        (lambda p: "good", "one number per task"),
        (lambda p: p["fc.bias"] * 1j, "complex"),
    ],
)
def test_an_evaluator_that_fails_is_told(folder: Path, evaluate: Any, message: str) -> None:
    with pytest.raises(EvaluatorError, match=message):
        swept(recipe("linear", "{weight: 1}"), "weight=1,2", evaluate=evaluate)


def test_the_balance_score_is_the_smallest_cosine(folder: Path) -> None:
    found = swept(recipe("task_arithmetic", "{weight: 1}"), "weight[0]=0.25,1", evaluate=None)
    base, a, b = (np.asarray(flat(load_checkpoint(n)), np.float64) for n in ("base", "a", "b"))
    for row, (weight,) in zip(found.parts, found.grid.points, strict=True):
        vector = weight * (a - base) + (b - base)
        expected = [
            vector @ delta / np.linalg.norm(vector) / np.linalg.norm(delta)
            for delta in (a - base, b - base)
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.scores, found.parts.min(axis=1))
    assert found.best == 1


def test_without_a_base_models_are_compared_with_the_merge(folder: Path) -> None:
    found = swept(recipe("slerp", "{t: 0}"), "t=0,0.5,1", evaluate=None)
    base, a = (np.asarray(flat(load_checkpoint(name)), np.float64) for name in ("base", "a"))
    cosine = base @ a / np.linalg.norm(base) / np.linalg.norm(a)
    np.testing.assert_allclose(found.parts[0], [1.0, cosine], rtol=1e-5, atol=1e-6)
    assert found.best == 1


def test_a_merge_that_stays_at_the_base_has_balance_0(folder: Path) -> None:
    found = swept(recipe("task_arithmetic", "{weight: 1}"), "lambda=0,1", evaluate=None)
    assert found.parts[0].tolist() == [0.0, 0.0]
    assert found.best == 1


# The command


def test_the_command_writes_a_recipe_that_stands_alone(
    folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("score.py").write_text(
        "import jax.numpy as jnp\n"
        "def nearness(params):\n"
        "    return -jnp.abs(params['fc.bias'][0] - 0.3)\n"
    )
    axes = ("--grid", "density=0.1:1:4", "--grid", "weight[1]=0.2,1", "--seed", 4)
    Path("dare.yaml").write_text(Path("ties.yaml").read_text().replace("ties", "dare_linear"))
    arguments = ("sweep", "dare.yaml", *axes, "--evaluate", "score.py:nearness", "--out", "found")
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert "8 points in" in result.stdout
    assert "Merge it: jaxmerge merge found/best-recipe.yaml OUT --seed 4" in result.stdout
    assert sorted(p.name for p in Path("found").iterdir()) == [
        "best-recipe.yaml",
        "results.csv",
        "results.json",
    ]
    record = json.loads(Path("found/results.json").read_text())
    rows = list(csv.DictReader(Path("found/results.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == [p["score"] for p in record["points"]]
    assert record["best"]["score"] == max(point["score"] for point in record["points"])
    # From another folder, by the command that was printed.
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    best = folder / "found" / "best-recipe.yaml"
    assert call("merge", best, "out", "--seed", 4).exit_code == 0
    bias = load_checkpoint("out")["fc.bias"][0]
    assert -abs(bias - 0.3) == pytest.approx(record["best"]["score"], abs=1e-6)
    monkeypatch.chdir(folder)
    again = call(*arguments)
    assert again.exit_code == 2
    assert "there are results already" in again.stderr
    assert call(*arguments, "--overwrite").exit_code == 0


def test_the_proxy_is_named_and_long_tables_are_cut(folder: Path, call: Any) -> None:
    result = call("sweep", "ties.yaml", "--grid", "density=0.1:1:30")
    assert result.exit_code == 0
    assert "score (proxy)" in result.stdout
    assert "... 10 more points" in result.stdout
    assert "the score is a proxy, made without data" in result.stderr
    assert "merge_method: ties" in result.stdout


def test_json_is_all_of_stdout(folder: Path, call: Any) -> None:
    result = call("sweep", "ties.yaml", "--grid", "lambda=0,1", "--json")
    found = json.loads(result.stdout)
    assert [point["values"] for point in found["points"]] == [{"lambda": 0.0}, {"lambda": 1.0}]
    assert found["best"]["values"] == {"lambda": 1.0}
    assert parse(found["best"]["recipe"]).parameters["lambda"] == 1.0


@pytest.mark.torch
def test_an_evaluator_in_pytorch_runs_on_the_host(folder: Path, call: Any) -> None:
    pytest.importorskip("torch")
    Path("torch_score.py").write_text(
        "import torch\ndef norm(params):\n    return -torch.from_numpy(params['fc.bias']).norm()\n"
    )
    result = call("sweep", "ties.yaml", "--grid", "lambda=0,1", "--evaluate", "torch_score.py:norm")
    assert result.exit_code == 0, result.output
    assert "note: the evaluator cannot be traced" in result.stderr
    assert "(on the host)" in result.stdout


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["densty=0.1"], "ties has no hyperparameter 'densty'; did you mean 'density'?"),
        (["scope=1"], "'scope' is an option of ties"),
        (["density"], "write name=start:stop:count"),
        (["density=0:1"], "write name=start:stop:count"),
        (["density=0:1:0"], "expected a count from 1 to 1000000, found '0'"),
        (["density=a,b"], "'a' is not a number"),
        (["density=nan"], "'nan' is not a finite float32 number"),
        (["weight=1e39"], "'1e39' is not a finite float32 number"),
        (["density=0:2:3"], "'density' must lie in [0, 1], found 2"),
        (["normalize=0.5"], "'normalize' is a flag (true or false), found 0.5"),
        (["lambda[0]=1"], "'lambda' is shared by all models; leave out the index"),
        (["weight[2]=1"], "the recipe has 2 models, the last is weight[1]"),
        (["density=1", "density=0"], "'density' is given twice"),
        (["lambda=1", "scale=0"], "is given twice"),
        (["weight[0]=0:1:2000", "weight[1]=0:1:2000"], "has 4000000 points"),
    ],
)
def test_a_bad_grid_is_told(folder: Path, call: Any, axes: list[str], message: str) -> None:
    options = [part for axis in axes for part in ("--grid", axis)]
    result = call("sweep", "ties.yaml", *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ("score", "expected module:function or file.py:function"),
        ("nowhere.py:f", "no such file: nowhere.py"),
        ("not_a_module_here:f", "importing not_a_module_here failed: no such module"),
        ("math:sqtr", "math has no function 'sqtr'; did you mean 'sqrt'?"),
        ("math:pi", "math:pi is no function but a float"),
        ("broken.py:f", "importing broken.py failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_evaluator_is_told(folder: Path, call: Any, evaluate: str, message: str) -> None:
    Path("broken.py").write_text("1 / 0\n")
    result = call("sweep", "ties.yaml", "--grid", "density=1", "--evaluate", evaluate)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_base_among_the_models_is_no_model_of_the_grid(folder: Path, call: Any) -> None:
    text = Path("ties.yaml").read_text().replace("models:\n", "models:\n- {model: base}\n")
    Path("listed.yaml").write_text(text)
    result = call("sweep", "listed.yaml", "--grid", "weight[0]=1")
    assert result.exit_code == 2
    assert "that model is the base, which is not merged as one" in result.stderr
    made = make_grid(read("listed.yaml"), [parse_axis("weight[2]=0.25")])
    assert made.swept["weight"].tolist() == [[0.5, 0.25]]
    assert made.recipe(0).models[2].parameters == {"weight": 0.25}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "models: [{model: a}]\nparameters: {weight: 1, density: [0.1, 1]}",
            "gradients or filters",
        ),
        (
            "models: [{model: a}]\nparameters: {weight: {filter: fc, value: 1}}",
            "gradients or filters",
        ),
        (
            "slices: [{sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]}]\n"
            "parameters: {weight: 1}",
            "slices or modules",
        ),
        (
            "modules: {default: {models: [{model: a, parameters: {weight: 1}}]}}",
            "slices or modules",
        ),
        ("models: [{model: a}]\ntensors: union\nparameters: {weight: 1}", "tensors: union"),
    ],
)
def test_a_sweep_needs_whole_models_and_one_number_for_all_tensors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(f"merge_method: ties\nbase_model: base\n{text}\n", "lambda=1,2")


def test_a_gradient_that_the_grid_varies_is_replaced() -> None:
    text = (
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\n"
        "parameters: {weight: 1, density: [0.1, 1]}\n"
    )
    made = grid(text, "density=0.25,0.5")
    assert [made.recipe(i).parameters["density"] for i in range(2)] == [0.25, 0.5]


def test_what_the_grid_sets_may_be_missing_in_the_recipe(folder: Path) -> None:
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    assert grid(text, "weight=0.5,1").swept["weight"].tolist() == [0.5, 1.0]
    both = grid(text, "weight[0]=0.5,1", "weight[1]=2")
    assert both.swept["weight"].tolist() == [[0.5, 2.0], [1.0, 2.0]]
