"""Merges made again from their own records."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint, open_checkpoint, save_checkpoint
from jaxmerge.recipes import PlanError, make_plan, parse, reproduce, run

RECIPE = """
merge_method: dare_linear
base_model: base
models:
- {model: a, parameters: {weight: 0.3, density: 0.5}}
- {model: b, parameters: {weight: 0.7, density: 0.5}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    for name in ("base", "a", "b"):
        tied = rng.normal(size=(8, 4)).astype("f4")
        tensors = {"embed": tied, "layers.0.w": rng.normal(size=(4, 4)).astype("f4"), "head": tied}
        save_checkpoint(name, tensors, metadata={"format": "pt"})
        Path(name, "config.json").write_text(json.dumps({"dtype": "float32"}))
    return tmp_path


def merge(out: str, **arguments: Any) -> None:
    run(make_plan(parse(RECIPE), out=out, seed=5), **arguments)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_output_is_made_again_bit_for_bit(folder: Path, out: str) -> None:
    merge(out, shard_size=100)
    found = reproduce(out)
    assert found.equal
    assert (found.tensors, found.notes) == (3, ())


def test_what_differs_is_named_and_measured(folder: Path) -> None:
    merge("out")
    tensors = {**load_checkpoint("out")}
    changed = tensors["layers.0.w"].copy()
    changed[1, 2] += 0.5
    changed[3, 3] -= 2
    with open_checkpoint("out") as checkpoint:
        metadata = checkpoint.metadata
    save_checkpoint("out", {**tensors, "layers.0.w": changed, "more": changed}, metadata=metadata)
    Path("out/config.json").write_text("{}")
    found = reproduce("out")
    assert [one.name for one in found.differences] == ["layers.0.w", "more"]
    assert found.differences[0].entries == 2
    assert found.differences[0].largest == pytest.approx(2)
    assert found.differences[1].entries is None
    assert found.files == ("config.json",)


def test_sources_may_have_moved(folder: Path) -> None:
    merge("out")
    Path("elsewhere").mkdir()
    for name in ("base", "a"):
        shutil.move(name, f"elsewhere/{name}")
    with pytest.raises(PlanError, match="no file or folder"):
        reproduce("out")
    with pytest.raises(PlanError, match=r"no source 'bse'; did you mean 'base'"):
        reproduce("out", sources={"bse": "elsewhere/base"})
    moved = {"base": "elsewhere/base", "a": "elsewhere/a"}
    found = reproduce("out", sources=moved)
    assert found.equal
    assert found.notes == ()


def test_other_sources_and_versions_are_noted(folder: Path) -> None:
    merge("out")
    record = json.loads(Path("out/jaxmerge.json").read_text())
    record["versions"]["jax"] = "0.0.1"
    Path("out/jaxmerge.json").write_text(json.dumps(record))
    save_checkpoint("b", load_checkpoint("a"), metadata={"format": "pt"})
    found = reproduce("out")
    assert not found.equal
    assert found.notes[0].startswith("made with jax 0.0.1, compared with")
    assert found.notes[1] == "b: model.safetensors is not the file that was merged"


def test_an_output_without_a_record_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"a: there is no record of a merge in jaxmerge.json"):
        reproduce("a")
    with pytest.raises(PlanError, match="no record of a merge in its metadata"):
        reproduce("a/model.safetensors")


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[]",
        '{"recipe": 1, "seed": 0, "sources": []}',
        '{"recipe": "", "seed": 0, "sources": [{"name": "a", "files": [1]}]}',
    ],
)
def test_a_record_of_another_form_is_refused(folder: Path, record: str) -> None:
    Path("a/jaxmerge.json").write_text(record)
    with pytest.raises(PlanError, match="there is no record of a merge"):
        reproduce("a")


def test_layers_that_moved_are_recorded_with_where_they_were(folder: Path) -> None:
    for name in "ab":
        tensors = load_checkpoint(name)
        save_checkpoint(name, {**tensors, "layers.1.w": tensors["layers.0.w"] + 1})
    text = """
    merge_method: passthrough
    slices:
    - sources: [{model: a, layer_range: [0, 2]}]
    - sources: [{model: b, layer_range: [1, 2]}]
    """
    run(make_plan(parse(text), out="stack"))
    made = json.loads(Path("stack/jaxmerge.json").read_text())["tensors"]
    assert made[-1]["names"] == ["layers.2.w", "head"]
    assert made[-1]["from"] == {"layers.2.w": ["layers.1.w"]}
    assert "from" not in made[0]
    assert reproduce("stack").equal


def test_the_metadata_say_how_every_tensor_was_made(folder: Path) -> None:
    merge("out.safetensors")
    with open_checkpoint("out.safetensors") as checkpoint:
        record = json.loads(checkpoint.metadata["jaxmerge"])
    (made,) = record["tensors"]
    assert made["method"] == "dare_linear"
    assert made["hyperparameters"]["weight"] == [0.3, 0.7]
    assert made["names"] == ["embed", "layers.0.w", "head"]
    assert record["seed"] == 5
    assert all(len(set(file["sha256"])) > 1 for s in record["sources"] for file in s["files"])
    assert str(folder) not in json.dumps(record)
