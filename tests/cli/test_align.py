"""`jaxmerge align`."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.converters import load_model, save_checkpoint

WIDTHS = (16, 8, 6, 3)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints a, and b with the units of a in another order; inputs.npz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    rng = np.random.default_rng(0)
    a = {}
    for i, (n, m) in enumerate(itertools.pairwise(WIDTHS), start=1):
        a[f"fc{i}.weight"] = rng.standard_normal((m, n)).astype(np.float32)
        a[f"fc{i}.bias"] = rng.standard_normal(m).astype(np.float32)
    p, q = rng.permutation(8), rng.permutation(6)
    b = {
        "fc1.weight": a["fc1.weight"][p],
        "fc1.bias": a["fc1.bias"][p],
        "fc2.weight": a["fc2.weight"][q][:, p],
        "fc2.bias": a["fc2.bias"][q],
        "fc3.weight": a["fc3.weight"][:, q],
        "fc3.bias": a["fc3.bias"],
    }
    for name, tensors in (("a", a), ("b", b)):
        save_checkpoint(name, tensors)
    Path("b/notes.txt").write_text("mine")
    np.savez("inputs.npz", x=rng.standard_normal((50, 16)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("method", ["weight", "activation", "dual"])
def test_b_comes_back_in_the_order_of_a(models: Path, call: Any, method: str) -> None:
    result = call("align", "a", "b", "out/new", "--method", method, "--data", "inputs.npz")
    assert result.exit_code == 0, result.output
    assert "out/new: mean similarity 1.0000" in result.stdout
    apply_fn, of_a, _ = load_model("a")
    _, of_new, _ = load_model("out/new")
    x = jnp.asarray(np.load("inputs.npz")["x"])
    np.testing.assert_allclose(apply_fn(of_new, x), apply_fn(of_a, x), atol=1e-5)
    np.testing.assert_array_equal(
        of_new["params"]["dense_0"]["kernel"], of_a["params"]["dense_0"]["kernel"]
    )
    record = json.loads(Path("out/new/alignment.json").read_text())
    assert record["method"] == method
    assert sorted(map(len, record["permutations"].values())) == [6, 8]
    assert Path("out/new/notes.txt").read_text() == "mine"
    assert sorted(path.name for path in Path("out").iterdir()) == ["new"]


def test_json_is_the_record(models: Path, call: Any) -> None:
    result = call("align", "a", "b", "out", "--method", "weight", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(Path("out/alignment.json").read_text())


def test_the_plan_of_a_recipe_says_what_is_aligned(models: Path, call: Any) -> None:
    recipe = (
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\nalign:"
    )
    Path("recipe.yaml").write_text(recipe)
    result = call("plan", "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert "Aligns first: b to a by weights; 14 units of mlp_fc may move" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "method 'dual' compares activations: give inputs"),
        (("--data", "none.npz"), "none.npz: no such file"),
        (("--data", "wide.npy"), "expected numbers [n, 16], found float32 [3, 5]"),
        (("--data", "a/model.safetensors"), "no .npy or .npz file of plain numbers"),
        (("--data", "inputs.npz", "--alpha", 2), "from 0 to 1; found 2"),
        (("--data", "two.npz"), "expected one array, found 'x', 'y'"),
        (("--data", "nan.npy"), "NaN or infinity"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    models: Path, call: Any, arguments: Any, message: str
) -> None:
    np.save("wide.npy", np.ones((3, 5), np.float32))
    np.save("nan.npy", np.full((3, 16), np.nan, np.float32))
    np.savez("two.npz", x=np.ones(3), y=np.ones(3))
    result = call("align", "a", "b", "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not Path("out").exists()


def test_models_that_do_not_fit_and_outputs_that_exist_are_refused(models: Path, call: Any) -> None:
    narrow = {"fc1.weight": np.ones((3, 16), np.float32), "fc1.bias": np.ones(3, np.float32)}
    save_checkpoint("c", narrow)
    result = call("align", "a", "c", "out", "--method", "weight")
    assert result.exit_code == 2, result.output
    assert "expected [8] as in a, found [3]" in result.stderr
    result = call("align", "a", "b", "c", "--method", "weight")
    assert "c: exists already" in result.stderr
