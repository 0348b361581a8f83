"""Plans: all that headers can tell, before any tensor is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxmerge.converters import Checkpoint, save_checkpoint
from jaxmerge.recipes import output
from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.output import UNFINISHED
from jaxmerge.recipes.plan import Plan
from jaxmerge.recipes.planning import make_plan
from jaxmerge.recipes.schema import parse
from jaxmerge.recipes.streaming.memory import INTERPRETER

Tensors = dict[str, np.ndarray]


def tensors() -> Tensors:
    return {
        "fc1.weight": np.ones((4, 3), np.float32),
        "fc1.bias": np.ones(4, ml_dtypes.bfloat16),
        "steps": np.array(7, np.int64),
        "mask": np.ones(2, bool),
        "empty": np.ones((0, 5), np.float32),
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the checkpoints base, a and b."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        save_checkpoint(tmp_path / name, tensors())
    return tmp_path


def replace(folder: Path, name: str, change: Callable[[Tensors], Any]) -> None:
    changed = tensors()
    change(changed)
    shutil.rmtree(folder / name)
    save_checkpoint(folder / name, changed)


TIES = """\
merge_method: ties
base_model: base
models:
- model: a
- model: b
parameters: {weight: 1}
"""


def plan(text: str = TIES, **options: Any) -> Plan:
    return make_plan(parse(text, filename="soup.yaml"), **options)


def problems(text: str = TIES, **options: Any) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        plan(text, **options)
    return caught.value.problems


def test_plan_reads_no_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    monkeypatch.setattr(Checkpoint, "read_flat", refuse)
    plan(out="out")
    assert not (folder / "out").exists()


def test_plan_lists_the_output(folder: Path) -> None:
    made = plan()
    assert [(t.name, t.action, t.dtype, t.nbytes) for t in made.tensors] == [
        ("fc1.weight", "merge", "float32", 48),
        ("fc1.bias", "merge", "bfloat16", 8),
        ("steps", "carry", "int64", 8),
        ("mask", "carry", "bool", 2),
        ("empty", "carry", "float32", 0),
    ]
    assert [source.name for source in made.sources] == ["base", "a", "b"]
    assert (made.base, made.models) == (0, (1, 2))
    # What is carried over is read from the donor alone.
    assert made.bytes_read == 3 * 56 + 10
    assert made.bytes_written == 66
    # 3 sources of 48 bytes, 5 float32 copies of 12 elements, an output of 48 bytes.
    assert made.memory == INTERPRETER + 3 * 48 + 4 * 12 * 5 + 48
    assert made.notes == ()


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ("dtype: float16", "float16"),
        ("out_dtype: float16", "float16"),
        ("dtype: float32\nout_dtype: bfloat16", "bfloat16"),
    ],
)
def test_dtype_is_that_of_merged_tensors(folder: Path, keys: str, dtype: str) -> None:
    made = plan(TIES + keys)
    assert [t.dtype for t in made.tensors] == [dtype, dtype, "int64", "bool", "float32"]
    assert made.bytes_written == 2 * 16 + 10


def test_a_checkpoint_named_twice_is_one_source(folder: Path) -> None:
    made = plan(
        "merge_method: linear\nbase_model: base\n"
        "models: [{model: a}, {model: ./a}, {model: base}]\n"
        "parameters: {weight: 1}"
    )
    assert [source.name for source in made.sources] == ["base", "a"]
    assert (made.base, made.models) == (0, (1, 1, 0))


def test_other_float_dtypes_are_noted(folder: Path) -> None:
    replace(folder, "a", lambda t: t.update({"fc1.weight": np.ones((4, 3), np.float16)}))
    made = plan()
    assert [one.dtype for one in made.tensors[0].inputs] == ["float32", "float16", "float32"]
    assert made.tensors[0].dtype == "float32"
    assert "'fc1.weight': float16, float32" in made.notes[0]


def test_ties_of_all_sources_stay(folder: Path) -> None:
    for name in ("base", "a", "b"):
        replace(folder, name, lambda t: t.update({"head": t["fc1.weight"]}))
    made = plan()
    assert made.ties == (("fc1.weight", "head"),)
    assert made.tensors[-1].tied_to == "fc1.weight"
    assert made.describe()[-1]["action"] == "tied to fc1.weight"
    # What is carried over is read from the donor alone.
    assert made.bytes_read == 3 * 56 + 10
    assert made.bytes_written == 66 + 48


def test_ties_of_some_sources_are_noted(folder: Path) -> None:
    for name in ("base", "a"):
        replace(folder, name, lambda t: t.update({"head": t["fc1.weight"]}))
    replace(folder, "b", lambda t: t.update({"head": t["fc1.weight"].copy()}))
    made = plan()
    assert made.ties == ()
    assert "base: 'fc1.weight', 'head' are tied there but not in every source" in made.notes[0]


@pytest.mark.torch
def test_torch_files_by_their_nested_key(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}
    for name in ("x.pt", "y.pt"):
        torch.save({"model": {"state_dict": state}, "epoch": 3}, folder / name)
    made = plan(
        "merge_method: linear\n"
        "models: [{model: x.pt#model.state_dict}, {model: y.pt#model.state_dict}]\n"
        "parameters: {weight: 1}"
    )
    assert made.sources[0].key == "model.state_dict"
    assert [(t.name, t.shape, t.dtype) for t in made.tensors] == [("w", (2, 3), "bfloat16")]


def test_a_base_under_another_name_is_noted(folder: Path) -> None:
    (folder / "link").symlink_to("base")
    made = plan(TIES.replace("model: a", "model: link"))
    assert made.models == (0, 1)
    assert made.notes == ("base is also a model to merge: its task vector is 0",)


# What is wrong with sources ----------------------------------------------------------------------


def test_a_missing_tensor_names_source_and_nearest(folder: Path) -> None:
    replace(folder, "a", lambda t: t.update({"fc1.wieght": t.pop("fc1.weight")}))
    assert problems() == (
        "a: tensor 'fc1.weight' is missing (base has float32[4, 3]); did you mean 'fc1.wieght'?",
        "a: extra tensor 'fc1.wieght' (float32[4, 3]), which base does not have; "
        "`tensors: intersection` in the recipe merges only what all have, `tensors: union` also what "
        "some have",
    )


def test_a_prefix_is_recognised(folder: Path) -> None:
    replace(folder, "a", lambda t: t.update({"module.fc1.bias": t.pop("fc1.bias")}))
    assert "did you mean 'module.fc1.bias'?" in problems()[0]


def test_wrong_shapes_and_kinds_are_told_together(folder: Path) -> None:
    replace(folder, "a", lambda t: t.update({"fc1.weight": np.ones((3, 4), np.float32)}))
    replace(folder, "b", lambda t: t.update({"steps": np.array(7.0), "mask": np.ones(2, np.int8)}))
    assert problems() == (
        "a: tensor 'fc1.weight' has shape [3, 4], expected [4, 3] as in base",
        "b: tensor 'steps' is float64, expected a kind of int as in base (int64)",
        "b: tensor 'mask' is int8, expected a kind of bool as in base (bool)",
    )


def test_many_differences_are_counted(folder: Path) -> None:
    replace(folder, "a", lambda t: t.update({f"x{i}": np.ones(1) for i in range(9)}))
    assert problems()[-1].startswith("a: 4 more extra tensors; `tensors: intersection`")


def test_complex_tensors_are_refused(folder: Path) -> None:
    for name in ("base", "a", "b"):
        replace(folder, name, lambda t: t.update({"z": np.ones(1, np.complex64)}))
    assert problems() == ("base: tensor 'z' is complex; no method merges it",)


def test_quantised_sources_are_refused(folder: Path) -> None:
    replace(folder, "b", lambda t: t.update({"fc1.qweight": np.ones(2, np.int32)}))
    assert problems()[0].startswith("soup.yaml:5: b: quantised")


def test_quantisation_named_by_the_config_is_refused(folder: Path) -> None:
    config = {"quantization_config": {"quant_method": "awq"}}
    (folder / "a" / "config.json").write_text(json.dumps(config))
    assert "awq" in problems()[0]


def test_missing_files_are_told_at_their_lines(folder: Path) -> None:
    found = problems(
        TIES.replace("base_model: base", "base_model: bsae").replace(": b\n", ": organ/b\n")
    )
    assert found[0].startswith("soup.yaml:2: no file or folder 'bsae' (looked in ")
    assert found[0].endswith("did you mean 'base'?")
    assert found[1].startswith("soup.yaml:5: no file or folder 'organ/b'")


def test_truncated_and_corrupt_files_are_told(folder: Path) -> None:
    file = folder / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (folder / "b" / "model.safetensors").write_bytes(b"not a checkpoint")
    found = problems()
    assert found[0].startswith("soup.yaml:4: a/model.safetensors")
    assert "truncated" in found[0]
    assert found[1].startswith("soup.yaml:5: b/model.safetensors")


def test_a_broken_index_is_told(folder: Path) -> None:
    shutil.rmtree(folder / "a")
    (folder / "a").mkdir()
    index = {"weight_map": {"fc1.weight": "../base/model.safetensors"}}
    (folder / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'../base/model.safetensors'" in problems()[0]


def test_an_empty_folder_is_told(folder: Path) -> None:
    (folder / "a" / "model.safetensors").unlink()
    assert "no checkpoint" in problems()[0]


def test_sources_and_output_are_told_together(folder: Path) -> None:
    replace(folder, "a", lambda t: t.pop("mask"))
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    found = problems(out="out")
    assert len(found) == 2
    assert "--overwrite" in found[1]


# The output --------------------------------------------------------------------------------------


def test_an_empty_or_absent_output_is_taken(folder: Path) -> None:
    (folder / "out").mkdir()
    assert plan(out="out").output == Path("out")
    assert plan(out="some/new/folder").resumes is False
    assert plan(out="new.safetensors").output == Path("new.safetensors")


def test_an_output_folder_in_use_is_refused(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    (found,) = problems(out="out")
    assert "out: the output folder is not empty (notes.txt)" in found
    assert "--overwrite" in found
    assert plan(out="out", overwrite=True).resumes is False


def test_an_output_file_in_use_is_refused(folder: Path) -> None:
    (folder / "out.safetensors").write_text("mine")
    (found,) = problems(out="out.safetensors")
    assert "--overwrite" in found
    plan(out="out.safetensors", overwrite=True)


def test_only_the_very_plan_resumes(folder: Path) -> None:
    (folder / "out").mkdir()
    marker = folder / "out" / UNFINISHED
    marker.write_text(json.dumps({"fingerprint": plan().fingerprint}) + "\n")
    (folder / "out" / "model.safetensors.partial").write_bytes(b"begun")
    assert plan(out="out").resumes
    assert plan(out="out", overwrite=True).resumes
    assert "an unfinished run of another plan" in problems(out="out", seed=1)[0]
    marker.write_text("{")
    assert "is not empty (model.safetensors.partial)" in problems(out="out")[0]


@pytest.mark.parametrize("out", ["a", "a/model.safetensors", "."])
def test_a_source_is_never_overwritten(folder: Path, out: str) -> None:
    (found,) = problems(out=out, overwrite=True)
    assert "would overwrite the source" in found


@pytest.mark.parametrize("kind", ["gguf", "orbax"])
def test_a_format_that_is_not_written_is_refused(folder: Path, kind: str) -> None:
    (found,) = problems(out=f"merged.{kind}")
    assert found == f"merged.{kind}: a merge is written as safetensors or PyTorch, not as {kind}"


def test_folder_and_file_are_not_confused(folder: Path) -> None:
    (folder / "x.safetensors").mkdir()
    (folder / "file").write_text("")
    assert "a folder stands where" in problems(out="x.safetensors")[0]
    assert "a file stands where" in problems(out="file", overwrite=True)[0]
    assert "is a file, not a folder" in problems(out="file/out")[0]


def test_no_space_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    assert "no space: the output takes 66 B, and" in problems(out="out")[0]
    (folder / "out").mkdir()
    (folder / "out" / UNFINISHED).write_text(json.dumps({"fingerprint": plan().fingerprint}) + "\n")
    (folder / "out" / "model.safetensors.partial").write_bytes(bytes(66))
    assert plan(out="out").resumes


def test_no_permission_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.os, "access", lambda *_: False)
    assert "no permission to write" in problems(out="out")[0]


# The fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_is_that_of_what_decides_the_result(folder: Path) -> None:
    first = plan().fingerprint
    assert len(first) == 64
    assert plan().fingerprint == first
    assert plan("# a remark\n" + TIES, out="out").fingerprint == first
    assert plan(TIES + "dtype: float16\n").fingerprint != first
    assert plan(TIES.replace("weight: 1", "weight: 1.0000001")).fingerprint != first
    assert plan(seed=1).fingerprint != first
    file = folder / "a" / "model.safetensors"
    os.utime(file, ns=(0, 0))
    assert plan().fingerprint != first


def test_plan_as_json(folder: Path) -> None:
    made = plan(out="out")
    data = json.loads(made.to_json())
    assert data["fingerprint"] == made.fingerprint
    assert data["recipe"]["hyperparameters"]["density"] == 1.0
    assert data["merges"] == [{"method": "ties", "options": dict(made.resolved.options)}]
    assert data["tensors"][0]["models"][1]["source"] == 2
    assert data["tensors"][0]["hyperparameters"]["weight"] == 1.0
    assert made.describe()[0] == {
        "tensor": "fc1.weight",
        "shape": "4x3",
        "from": "float32",
        "to": "float32",
        "action": "merge",
    }
