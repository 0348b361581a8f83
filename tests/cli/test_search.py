"""`jaxmerge search`: from a file to a recipe that merges what was searched."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint, save_checkpoint
from jaxmerge.recipes import make_plan, read, run
from jaxmerge.searching import make_task, read_search
from jaxmerge.searching.results import FILES

TARGETS = """\
import jax.numpy as jnp

def near(tensors):
    return -jnp.stack([jnp.mean((tensors[name] - aim) ** 2) for name, aim in
                       [("fc.weight", 0.3), ("head.weight", -0.2)]])

def in_numpy(tensors):
    assert type(tensors["fc.weight"]).__module__ == "numpy"
    return -float(abs(tensors["fc.weight"]).mean())
"""

SEARCH = """\
base_model: base
models: [a, b]
methods: [task_arithmetic, {method: dare_ties, options: {}}]
blocks: {body: "fc.*", head: "**"}
space: {weight: [0.0, 1.5], density: [0.2, 1.0]}
parameters: {scale: 0.9}
objective: targets.py:near
population: 8
budget: 84
seed: 3
"""


@pytest.fixture
def search(folder: Path) -> Path:
    Path("targets.py").write_text(TARGETS)
    Path("search.yaml").write_text(SEARCH)
    return folder


def score_of(recipe: Path, seed: int) -> float:
    out = Path("merged.safetensors")
    run(make_plan(read(recipe), out=out, seed=seed, overwrite=True))
    tensors = load_checkpoint(out)
    parts = [
        -np.mean((tensors[name].astype(float) - aim) ** 2)
        for name, aim in (("fc.weight", 0.3), ("head.weight", -0.2))
    ]
    return float(np.mean(parts))


def test_the_best_recipe_merges_to_what_was_searched(search: Path, call: Any) -> None:
    done = call("search", "search.yaml", "out")
    assert done.exit_code == 0, done.output
    assert "80 candidates" in done.stdout
    assert "Merge it: jaxmerge merge out/best-recipe.yaml OUT --seed 3" in done.stdout
    files = {path.name for path in Path("out").iterdir()}
    assert files == {*FILES, "search.yaml", "checkpoints"} - {"front.csv", "front.png"}
    record = json.loads(Path("out/results.json").read_text())
    assert record["evaluations"] == 80
    assert record["strategy"] == "catcma"
    # Blocks whose method is random too: the recipe, merged with its seed, is the candidate.
    np.testing.assert_allclose(
        score_of(Path("out/best-recipe.yaml"), 3), np.mean(record["best"]["scores"]), rtol=1e-5
    )
    np.testing.assert_allclose(
        record["history"]["best"][-1], -np.mean(record["best"]["scores"]), rtol=1e-5
    )
    with open("out/history.csv") as file:
        assert len(list(csv.DictReader(file))) == 10
    with open("out/choices.csv") as file:
        assert {row["block"] for row in csv.DictReader(file)} == {"body", "head"}
    assert Path("out/convergence.png").read_bytes().startswith(b"\x89PNG")
    # A larger budget goes on; anything else does not.
    again = call("search", "search.yaml", "out")
    assert again.exit_code == 2
    assert "give --resume to go on" in again.stderr
    Path("search.yaml").write_text(SEARCH.replace("84", "96"))
    more = call("search", "search.yaml", "out", "--resume")
    assert more.exit_code == 0, more.output
    assert json.loads(Path("out/results.json").read_text())["evaluations"] == 96
    Path("search.yaml").write_text(SEARCH.replace("seed: 3", "seed: 4"))
    other = call("search", "search.yaml", "out", "--resume")
    assert other.exit_code == 2
    assert "`seed` was 3, is 4 now" in other.stderr


def test_every_point_is_merged_as_it_is_searched(search: Path) -> None:
    task = make_task(read_search("search.yaml"))
    for seed, names in enumerate([[0, 1], [1, 0], [1, 1]]):
        genome = np.random.default_rng(seed).random(task.space.size).astype(np.float32)
        point = task.space.decode(jnp.asarray(genome))
        for label, index in zip(("body", "head"), names, strict=True):
            point[label]["method"] = jnp.int32(index)
        Path("recipe.yaml").write_text("")
        recipe = task.recipe(point)
        out = Path(f"out{seed}.safetensors")
        run(make_plan(recipe, out=out, seed=3))
        tensors = load_checkpoint(out)
        parts = [
            -np.mean((tensors[name].astype(float) - aim) ** 2)
            for name, aim in (("fc.weight", 0.3), ("head.weight", -0.2))
        ]
        np.testing.assert_allclose(task.scores(point), parts, rtol=1e-5)


def test_several_scores_give_a_front_of_recipes(search: Path, call: Any) -> None:
    text = SEARCH.replace('blocks: {body: "fc.*", head: "**"}\n', "pareto: true\n")
    Path("search.yaml").write_text(text.replace("dare_ties", "ties"))
    done = call("search", "search.yaml", "out")
    assert done.exit_code == 0, done.output
    with open("out/front.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert sorted(path.name for path in Path("out/front").iterdir()) == [
        f"{i:03d}.yaml" for i in range(len(rows))
    ]
    for row in (rows[0], rows[-1]):
        found = np.mean([float(row["task 0"]), float(row["task 1"])])
        np.testing.assert_allclose(score_of(Path("out") / row["recipe"], 3), found, rtol=1e-5)


def test_numpy_objectives_run_on_the_host(search: Path, call: Any) -> None:
    text = SEARCH.replace("targets.py:near", "targets.py:in_numpy").replace("84", "16")
    text += "strategy: random\n"
    Path("search.yaml").write_text(text)
    done = call("search", "search.yaml", "out")
    assert done.exit_code == 0, done.output
    assert "cannot be traced" in done.stderr
    assert json.loads(Path("out/results.json").read_text())["compiled"] is False


def test_metrics_score_models_of_a_known_family(folder: Path, call: Any) -> None:
    rng = np.random.default_rng(0)
    for seed, name in enumerate(("base", "a", "b")):
        drawn = np.random.default_rng(seed)
        layers = {"fc1": (8, 4), "fc2": (3, 8)}
        tensors = {f"{k}.weight": drawn.normal(size=s) for k, s in layers.items()}
        tensors |= {f"{k}.bias": drawn.normal(size=s[0]) for k, s in layers.items()}
        save_checkpoint(name + "m", {k: v.astype(np.float32) for k, v in tensors.items()})
    inputs = rng.normal(size=(20, 4)).astype(np.float32)
    np.savez("val.npz", inputs=inputs, labels=rng.integers(0, 3, 20))
    Path("search.yaml").write_text(
        "base_model: basem\nmodels: [am, bm]\nmethods: ties\nblocks: layer\n"
        "space: {weight: [0, 1]}\nobjective: {metric: cross_entropy, data: val.npz}\n"
        "population: 8\nbudget: 40\nstrategy: snes\n"
    )
    done = call("search", "search.yaml", "out")
    assert done.exit_code == 0, done.output
    record = json.loads(Path("out/results.json").read_text())
    assert set(record["best"]["blocks"]) == {"fc1", "fc2"}
    run(make_plan(read("out/best-recipe.yaml"), out="merged"))
    t = {k: v.astype(float) for k, v in load_checkpoint("merged").items()}
    hidden = np.maximum(inputs @ t["fc1.weight"].T + t["fc1.bias"], 0)
    logits = hidden @ t["fc2.weight"].T + t["fc2.bias"]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    labels = np.load("val.npz")["labels"]
    expected = log_p[np.arange(20), labels].mean()
    np.testing.assert_allclose(record["best"]["scores"], [expected], rtol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budget: 84", "budget: 7", "the budget of 7 is below one generation, which takes 8"),
        ("density: [", "densty: [", "search.yaml:5: no method has a hyperparameter 'densty'"),
        ("[0.2, 1.0]", "[0.2, 1.5]", r"density must lie in \[0, 1\]"),
        ("models: [a, b]", "models: [a, c]", "search.yaml: no file or folder 'c'"),
        ("methods: [task", "methods: [taks", "search.yaml:3: unknown merge method 'taks_arith"),
        ("near", "neer", "search.yaml:7: .*has no function 'neer'; did you mean 'near'"),
        ('head: "**"', 'head: "heads.*"', "no block holds the tensor 'head.weight'"),
        ("scale: 0.9", "weight: 1", "'weight' is in `space` too"),
        ("base_model: base\n", "", "base"),
    ],
)
def test_bad_searches_are_refused(
    search: Path, call: Any, old: str, new: str, message: str
) -> None:
    assert old in SEARCH
    Path("search.yaml").write_text(SEARCH.replace(old, new))
    done = call("search", "search.yaml", "out")
    assert done.exit_code == 2, done.output
    assert re.search(message, done.stderr), done.stderr
    assert not Path("out/best-recipe.yaml").exists()
