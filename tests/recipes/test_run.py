"""A recipe carried out: what stands in the output, and what does not after an error."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.converters import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint
from jaxmerge.recipes import PlanError, make_plan, parse, read, run
from jaxmerge.recipes.output import UNFINISHED

SHAPES = {"fc.weight": (6, 4), "fc.bias": (6,), "head.weight": (3, 6), "scale": ()}


def tensors(seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    drawn = {
        name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()
    }
    return {**drawn, "steps": np.array([seed], np.int64), "none": np.zeros((0, 2), np.float32)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        save_checkpoint(tmp_path / name, tensors(seed), metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"from": name}))
    return tmp_path


def recipe(
    method: str, *lines: str, models: tuple[str, ...] = ("a", "b"), base: bool = True
) -> str:
    listed = "\n".join(f"  - model: {name}" for name in models)
    head = f"dialect: jaxmerge\nmerge_method: {method}\nmodels:\n{listed}\n"
    return head + ("base_model: base\n" if base else "") + "\n".join(lines)


def carry_out(text: str, out: str, **arguments: Any) -> Path:
    return run(make_plan(parse(text), out=out, **arguments))


RECIPES = [
    recipe("linear", "parameters: {weight: [0.3, 0.7]}", base=False),
    recipe("task_arithmetic", "parameters: {lambda: 0.5}"),
    recipe("ties", "parameters: {density: 0.4}"),
    recipe("ties", "parameters: {density: 0.4}", "options: {scope: tensor}"),
    recipe("dare_linear", "parameters: {density: 0.5}"),
    recipe("dare_ties", "parameters: {density: [0.5, 0.6]}"),
    recipe("slerp", "parameters: {t: 0.3}", models=("a",)),
]


@pytest.mark.parametrize("text", RECIPES)
def test_the_output_is_what_merging_in_memory_gives(folder: Path, text: str) -> None:
    plan = make_plan(parse(text), out="out", seed=4)
    run(plan)
    resolved = plan.resolved
    merged = jm.merge(
        resolved.method,
        [load_checkpoint(str(model)) for model in resolved.models],
        base=load_checkpoint("base") if resolved.base else None,
        key=jax.random.key(4),
        **resolved.hyperparameters,
    )
    written = load_checkpoint("out")
    assert set(written) == set(merged)
    for name, array in written.items():
        np.testing.assert_allclose(array, merged[name], rtol=1e-6, atol=1e-7)
    donor = load_checkpoint("base" if resolved.base else "a")
    np.testing.assert_array_equal(written["steps"], donor["steps"])


def test_the_folder_holds_weights_recipe_provenance_and_the_donors_other_files(
    folder: Path,
) -> None:
    carry_out(RECIPES[1], "out", seed=7)
    assert sorted(os.listdir("out")) == [
        "README.md",
        "config.json",
        "jaxmerge.json",
        "model.safetensors",
        "recipe.yaml",
    ]
    assert json.loads(Path("out/config.json").read_text()) == {"from": "base"}
    assert json.loads(Path("out/jaxmerge.json").read_text())["seed"] == 7
    carry_out(Path("out/recipe.yaml").read_text(), "again", seed=7)
    first, second = Path("out/model.safetensors"), Path("again/model.safetensors")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_output_has_the_dtype_asked_for(folder: Path, dtype: str) -> None:
    carry_out(recipe("linear", f"dtype: {dtype}", base=False), "out.safetensors")
    written = load_checkpoint("out.safetensors")
    expected = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    assert written["fc.weight"].dtype == expected
    assert written["steps"].dtype == np.int64


@pytest.mark.parametrize("text", [RECIPES[1], RECIPES[2]])
def test_a_wider_output_is_not_rounded_on_the_way(folder: Path, text: str) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        save_checkpoint(folder / name, tensors(seed, ml_dtypes.bfloat16))
    carry_out(text + "\ndtype: float32", "out")
    merged = load_checkpoint("out")["fc.weight"]
    assert np.any(merged != merged.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_float64_is_merged_in_float64(folder: Path) -> None:
    a, b = tensors(1, np.float64), tensors(2, np.float64)
    save_checkpoint("a64", a)
    save_checkpoint("b64", b)
    carry_out(recipe("linear", models=("a64", "b64"), base=False), "out")
    merged = load_checkpoint("out")["fc.weight"]
    assert merged.dtype == np.float64
    np.testing.assert_allclose(merged, (a["fc.weight"] + b["fc.weight"]) / 2, rtol=1e-15)


def test_tied_tensors_stay_tied(folder: Path) -> None:
    for name in ("tied_a", "tied_b"):
        shared = tensors(len(name))["fc.weight"] + (name == "tied_b")
        save_checkpoint(name, {"embed.weight": shared, "lm_head.weight": shared})
    carry_out(recipe("linear", models=("tied_a", "tied_b"), base=False), "out")
    with open_checkpoint("out") as checkpoint:
        assert checkpoint.ties == [("embed.weight", "lm_head.weight")]
    merged = load_checkpoint("out")
    assert merged["embed.weight"] is merged["lm_head.weight"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("text", [RECIPES[0], RECIPES[2]])
def test_a_source_that_is_not_finite_is_refused_and_leaves_nothing(
    folder: Path, bad: float, text: str
) -> None:
    broken = tensors(2)
    broken["head.weight"][1, 2] = bad
    save_checkpoint(folder / "b", broken)
    with pytest.raises(CheckpointError, match=r"b: tensor 'head.weight' holds 1 value"):
        carry_out(text, "out")
    assert not Path("out").exists()


def test_a_failed_replacement_leaves_the_old_output_whole(folder: Path) -> None:
    carry_out(RECIPES[0], "out")
    before = Path("out/model.safetensors").read_bytes()
    broken = tensors(2)
    broken["scale"] = np.asarray(np.nan, np.float32)
    save_checkpoint(folder / "b", broken)
    with pytest.raises(CheckpointError, match="scale"):
        carry_out(RECIPES[0], "out", overwrite=True)
    assert Path("out/model.safetensors").read_bytes() == before
    assert sorted(os.listdir(".")) == ["a", "b", "base", "out"]


def test_overwriting_replaces_the_whole_folder(folder: Path) -> None:
    Path("out").mkdir()
    Path("out/old.txt").write_text("old")
    with pytest.raises(PlanError, match="--overwrite"):
        carry_out(RECIPES[0], "out")
    carry_out(RECIPES[0], "out", overwrite=True)
    assert not Path("out/old.txt").exists()
    assert sorted(os.listdir(".")) == ["a", "b", "base", "out"]


def test_a_source_changed_since_the_plan_is_refused(folder: Path) -> None:
    plan = make_plan(parse(RECIPES[0]), out="out")
    save_checkpoint(folder / "b", tensors(9))
    os.utime(folder / "b" / "model.safetensors", ns=(1, 1))
    with pytest.raises(PlanError, match="has changed since the plan"):
        run(plan)
    assert not Path("out").exists()


def test_progress_counts_every_byte(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run(make_plan(parse(RECIPES[0]), out="out"), progress=lambda *step: seen.append(step))
    assert {name for name, _, _ in seen} == set(tensors(0))
    assert seen[-1][1] == seen[-1][2] == sum(array.nbytes for array in tensors(0).values())


def test_a_kill_leaves_a_marked_folder_and_the_same_command_finishes(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPES[2])
    code = (
        "import sys, time; from jaxmerge.recipes import *\n"
        "def slow(*step): print('step', flush=True); time.sleep(60)\n"
        "run(make_plan(read('recipe.yaml'), out='out'), progress=slow)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"step\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Path("out", UNFINISHED).exists()
    with pytest.raises(CheckpointError):
        load_checkpoint("out")
    with pytest.raises(PlanError, match="unfinished run of another plan"):
        carry_out(RECIPES[1], "out")
    carry_out(RECIPES[2], "out")
    carry_out(RECIPES[2], "undisturbed")
    assert sorted(os.listdir("out")) == sorted(os.listdir("undisturbed"))
    left, right = Path("out/model.safetensors"), Path("undisturbed/model.safetensors")
    assert left.read_bytes() == right.read_bytes()


@pytest.mark.torch
def test_a_nested_pytorch_file_comes_back_in_its_own_structure(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    for seed, name in enumerate(("x", "y")):
        state = {k: torch.from_numpy(v) for k, v in tensors(seed).items()}
        torch.save(
            {"model": {"state_dict": state, "args": {"width": 6}}, "epoch": 3}, f"{name}.pth.tar"
        )
    text = recipe("linear", models=("x.pth.tar#model.state_dict", "y.pth.tar"), base=False)
    carry_out(text, "out.pth.tar")
    loaded = torch.load("out.pth.tar", weights_only=True)
    assert loaded["model"]["args"] == {"width": 6}
    assert loaded["epoch"] == 3
    merged = loaded["model"]["state_dict"]["fc.weight"].numpy()
    expected = (tensors(0)["fc.weight"] + tensors(1)["fc.weight"]) / 2
    np.testing.assert_allclose(merged, expected, rtol=1e-6)


def test_two_files_of_one_name_are_told_apart_in_a_note(folder: Path) -> None:
    (folder / "sub").mkdir()
    save_checkpoint(folder / "sub" / "a", tensors(7))
    (folder / "sub" / "soup.yaml").write_text(RECIPES[0])
    plan = make_plan(read("sub/soup.yaml"))
    assert any("a, beside the recipe, exists too" in note for note in plan.notes)
