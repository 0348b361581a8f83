"""The `align` section of a recipe: models are brought into one order before they are merged."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import models
from jaxmerge.align import checkpoints
from jaxmerge.align.checkpoints import How, align_checkpoints
from jaxmerge.converters import (
    ModelConfig,
    families,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
    save_model,
)
from jaxmerge.converters.families.family import variables_of
from jaxmerge.models.decoder import LayerKind
from jaxmerge.recipes import (
    PlanError,
    dump,
    load_sources,
    make_plan,
    make_plans,
    parse,
    reproduce,
    resolve,
    run,
)
from jaxmerge.recipes.errors import RecipeError
from jaxmerge.recipes.output import journal_of
from jaxmerge.recipes.streaming.merging import merged

WIDTHS = (16, 8, 6, 3)
MODELS = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def _compiled_in_haste() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mlp(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors = {}
    for i, (n, m) in enumerate(itertools.pairwise(WIDTHS), start=1):
        tensors[f"fc{i}.weight"] = rng.standard_normal((m, n)).astype(np.float32)
        tensors[f"fc{i}.bias"] = rng.standard_normal(m).astype(np.float32)
    return tensors


def relabelled(tensors: Tensors) -> Tensors:
    rng = np.random.default_rng(9)
    p, q = rng.permutation(8), rng.permutation(6)
    return {
        "fc1.weight": tensors["fc1.weight"][p],
        "fc1.bias": tensors["fc1.bias"][p],
        "fc2.weight": tensors["fc2.weight"][q][:, p],
        "fc2.bias": tensors["fc2.bias"][q],
        "fc3.weight": tensors["fc3.weight"][:, q],
        "fc3.bias": tensors["fc3.bias"],
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MLPs: a, b with a's units in another order, c and d of their own; inputs.npz."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("a", mlp(0))
    save_checkpoint("b", relabelled(mlp(0)))
    save_checkpoint("c", mlp(1))
    save_checkpoint("d", mlp(2))
    rng = np.random.default_rng(3)
    np.savez("inputs.npz", x=rng.standard_normal((50, 16)).astype(np.float32))
    return tmp_path


def merge(text: str, out: str = "out", **options: Any) -> Tensors:
    run(make_plan(parse(text), out=out), **options)
    return load_checkpoint(out)


def check_equal(found: Tensors, expected: Tensors, atol: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=atol, err_msg=name)


def draw(name: str, config: Any, seed: int) -> Any:
    def leaf(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.standard_normal(shape.shape).astype(np.float32)

    rng = np.random.default_rng(seed)
    return jax.tree.map(leaf, variables_of(families.get(name), config))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit", models.ViTConfig((8, 8), (4, 4), 12, 1, 3, 10, num_labels=3)),
        (
            "qwen3",
            models.DecoderConfig(
                11, 12, (LayerKind(),), 4, 2, 4, 10, 16, query_key_norm=True, tied=True
            ),
        ),
    ],
)
def test_a_relabelled_model_merges_to_the_model_itself(
    name: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family, params = families.get(name), draw(name, config, 0)
    spec = jm.align.symmetry(family.apply_fn(config), params, family.inputs(config))
    other = jm.align.permute(spec, jm.align.random(spec, jax.random.key(1)), params)
    save_model("a", params, ModelConfig(name, config))
    save_model("b", other, ModelConfig(name, config))
    if name == "qwen3":
        # A head that is stored beside the embedding it is tied to moves with it.
        for one in "ab":
            tensors = load_checkpoint(one)
            save_checkpoint(
                one, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
            )
    check_equal(merge(MODELS + "align: {method: weight}"), load_checkpoint("a"), atol=1e-6)
    record = json.loads(Path("out/jaxmerge.json").read_text())["alignment"]
    assert record["family"] == name
    assert record["models"][0]["score"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "align", ["align:", "align: {to: b}", "align: {method: activation, data: inputs.npz}"]
)
def test_units_come_to_the_order_of_the_reference(folder: Path, align: str) -> None:
    to = "b" if "to" in align else "a"
    check_equal(merge(MODELS + align), load_checkpoint(to), atol=1e-6)


def test_the_result_is_that_of_aligning_and_then_merging(folder: Path) -> None:
    how = How("dual", 0.3, seed=4)
    for name in "cd":
        align_checkpoints("a", name, f"{name}_in_a", how, data="inputs.npz")
    text = """
    merge_method: ties
    base_model: a
    models:
    - {{model: {c}, parameters: {{weight: 0.6, density: 0.5}}}}
    - {{model: {d}, parameters: {{weight: 0.7}}}}
    """
    expected = merge(text.format(c="c_in_a", d="d_in_a"), "expected")
    align = "align: {alpha: 0.3, data: inputs.npz, seed: 4}"
    plan = make_plan(parse(text.format(c="c", d="d").replace("\n    ", "\n") + align), out="out")
    assert [plan.sources[i].name for i in plan.alignment.models] == ["c", "d"]
    run(plan)
    check_equal(load_checkpoint("out"), expected)
    recorded = json.loads(Path("out/alignment.json").read_text())
    apart = json.loads(Path("c_in_a/alignment.json").read_text())
    assert recorded["to"] == "a"
    assert recorded["models"][0]["permutations"] == apart["permutations"]
    base, loaded = load_sources(plan)[::-1]
    check_equal(loaded[0], load_checkpoint("c_in_a"))
    check_equal(base, load_checkpoint("a"))
    with pytest.raises(ValueError, match="not aligned yet"):
        next(merged(plan, plan.tensors))


def test_records_say_how_models_were_aligned(folder: Path) -> None:
    merge(MODELS + "align: {data: inputs.npz}")
    merge(MODELS + "align: {data: inputs.npz}", "one.safetensors")
    record = json.loads(Path("out/jaxmerge.json").read_text())["alignment"]
    assert (record["method"], record["alpha"], record["to"]) == ("dual", 0.5, "a")
    assert record["data"]["name"] == "inputs.npz"
    assert len(record["data"]["sha256"]) == 64
    assert record["models"][0]["model"] == "b"
    with open_checkpoint("one.safetensors") as checkpoint:
        assert json.loads(checkpoint.metadata["jaxmerge"])["alignment"] == record
    card = Path("out/README.md").read_text()
    assert "the units of b (similarity 1.000) were brought into the order of a" in card
    merge(MODELS, "plain")
    assert not Path("plain/alignment.json").exists()
    assert "alignment" not in json.loads(Path("plain/jaxmerge.json").read_text())
    # The record of an alignment is none of a model's files.
    shutil.move("out", "a2")
    merge("merge_method: linear\nmodels: [{model: a2}]\nparameters: {weight: 1}", "copy")
    assert not Path("copy/alignment.json").exists()


COMMAND = """
import sys, time
from jaxmerge.recipes import make_plan, read, run
run(make_plan(read("recipe.yaml"), out=sys.argv[1]), progress=lambda *_: time.sleep(60))
"""


def refuse(*_: object) -> None:
    raise AssertionError("the models were matched again")


def test_a_killed_merge_goes_on_with_what_was_matched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MODELS.replace("model: b", "model: c") + "align: {restarts: 2}"
    Path("recipe.yaml").write_text(text)
    with subprocess.Popen([sys.executable, "-c", COMMAND, "out"]) as process:
        journal = journal_of(Path("out"))
        while process.poll() is None:
            if journal.exists() and b'"aligned"' in journal.read_bytes():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    os.mkdir("undisturbed")
    run(make_plan(parse(text), out="undisturbed/out"))
    monkeypatch.setattr(checkpoints, "match_models", refuse)
    plan = make_plan(parse(text), out="out")
    assert plan.resumes
    run(plan)
    names = sorted(file.name for file in Path("out").iterdir())
    assert "alignment.json" in names
    assert names == sorted(file.name for file in Path("undisturbed/out").iterdir())
    for name in names:
        found, expected = Path("out", name), Path("undisturbed/out", name)
        assert found.read_bytes() == expected.read_bytes(), name


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_error_after_matching_keeps_what_was_matched(
    folder: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    plan = make_plan(parse(MODELS + "align:"), out=out)
    with pytest.raises(Stop):
        run(plan, progress=stop)
    assert b'"aligned"' in journal_of(Path(out)).read_bytes()
    if out == "out":
        with pytest.raises(PlanError, match="unfinished run of another plan"):
            make_plan(parse(MODELS + "align: {seed: 1}"), out=out)
    monkeypatch.setattr(checkpoints, "match_models", refuse)
    check_equal(merge(MODELS + "align:", out), load_checkpoint("a"), atol=1e-6)


def test_an_aligned_merge_is_reproduced(folder: Path) -> None:
    text = MODELS.replace("model: b", "model: c") + "align: {data: inputs.npz}"
    merge(text)
    found = reproduce("out")
    assert found.equal
    assert found.notes == ()
    shutil.move("inputs.npz", "moved.npz")
    with pytest.raises(PlanError, match=r"no file 'inputs.npz'"):
        reproduce("out")
    assert reproduce("out", sources={"inputs.npz": "moved.npz"}).equal
    rng = np.random.default_rng(8)
    np.savez("inputs.npz", x=rng.standard_normal((50, 16)).astype(np.float32))
    found = reproduce("out")
    assert not found.equal
    assert "inputs.npz: not the inputs that the models were aligned on" in found.notes
    assert "c: its units are matched in another way" in found.notes


def test_inputs_that_change_after_the_plan_stop_the_merge(folder: Path) -> None:
    plan = make_plan(parse(MODELS + "align: {data: inputs.npz}"), out="out")
    np.savez("inputs.npz", x=np.ones((3, 16), np.float32))
    with pytest.raises(PlanError, match=r"inputs.npz: has changed since the plan was made"):
        run(plan)


def test_models_that_cannot_be_compared_are_named_and_nothing_is_left(folder: Path) -> None:
    broken = mlp(1)
    broken["fc1.weight"][0, 0] = np.nan
    save_checkpoint("b", broken)
    plan = make_plan(parse(MODELS + "align:"), out="out")
    with pytest.raises(PlanError, match="b cannot be aligned with a: the similarity of node"):
        run(plan)
    assert not Path("out").exists()


def test_a_merge_of_the_same_file_is_aligned_once_it_is_made(folder: Path) -> None:
    texts = [
        "name: soup\nmerge_method: linear\nmodels: [{model: b}]\nparameters: {weight: 1}",
        "merge_method: linear\nmodels: [{model: a}, {model: soup}]\nparameters: {weight: 0.5}\nalign:",
    ]
    for plan in make_plans([parse(text) for text in texts], out="both"):
        run(plan)
    check_equal(load_checkpoint("both/final"), load_checkpoint("a"), atol=1e-6)


def test_the_plan_says_what_will_be_done(folder: Path) -> None:
    plan = make_plan(parse(MODELS + "align: {alpha: 0.25, data: inputs.npz}"))
    assert plan.alignment.describe(plan.sources).startswith(
        "b to a by weights (0.25) and activations on inputs.npz; 14 units of mlp_fc may move; "
    )
    assert plan.memory == plan.alignment.memory
    assert json.loads(plan.to_json())["alignment"]["models"] == ["b"]
    with pytest.raises(PlanError, match=r"`align` needs .* of memory here, more than the limit"):
        make_plan(parse(MODELS + "align:"), memory_limit=1000)
    plain = make_plan(parse(MODELS))
    assert "alignment" not in json.loads(plain.to_json())
    assert "align" not in plain.resolved.to_dict()
    notes = make_plan(parse(MODELS + "align: {method: weight, alpha: 1, data: inputs.npz}")).notes
    assert [note.partition(": ")[2] for note in notes if "align" in note] == [
        "`align.data` has no effect on method 'weight'",
        "`align.alpha` has no effect on method 'weight'",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MODELS + "align: {too: a}", "unknown key 'too'; did you mean 'to'"),
        (MODELS + "align: {to: bb}", "'bb' is none of the models; did you mean 'b'"),
        (MODELS + "align: {method: weigth}", "found 'weigth'; did you mean 'weight'"),
        (MODELS + "align: {method: dual}", "method 'dual' compares activations: give `data`"),
        (MODELS + "align: {alpha: 2}", "a number from 0 to 1; found 2"),
        (MODELS + "align: {restarts: 0}", "expected a number above 0"),
        (MODELS + "align: {seed: -1}", "expected a number from 0"),
        (MODELS + "align: {heads: apart}", "found 'apart'"),
        (MODELS + "align: yes", "expected a mapping"),
        (MODELS + "align: {config: {x: .nan}}", "values as in a config.json"),
        (
            "merge_method: linear\nmodels: [{model: a, align: {}}]",
            "`align` stands at the top of a recipe",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\nalign:",
            "`align` needs `models`",
        ),
    ],
)
def test_a_recipe_that_asks_for_what_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(parse(text))


def test_a_section_is_written_as_it_is_read(folder: Path) -> None:
    for align in ({}, {"to": "b", "alpha": 0.5, "data": "x.npz", "config": {"norm": None}}):
        recipe = parse(MODELS + f"align: {json.dumps(align)}")
        assert parse(dump(recipe)).align == recipe.align
