"""Blocks of a recipe: tensors with a method of their own."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.converters import load_checkpoint, save_checkpoint
from jaxmerge.recipes import PlanError, RecipeError, dump, make_plan, parse, run
from jaxmerge.recipes.reproducing import reproduce

SHAPES = {"body.0.weight": (6, 4), "body.1.weight": (5, 6), "head.weight": (3, 5), "scale": (7,)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        rng = np.random.default_rng(seed)
        drawn = {key: rng.normal(size=shape).astype(np.float32) for key, shape in SHAPES.items()}
        save_checkpoint(tmp_path / name, drawn)
    return tmp_path


def recipe(*blocks: str, rest: str = "linear", dialect: str = "jaxmerge") -> str:
    return (
        f"dialect: {dialect}\nmerge_method: {rest}\nbase_model: base\n"
        "models: [{model: a}, {model: b}]\nparameters: {weight: [0.25, 0.75]}\nblocks:\n"
        + "\n".join(f"- {block}" for block in blocks)
    )


BLOCKS = (
    "{tensors: body.*, merge_method: ties, parameters: {density: [0.5, 0.4]}, options: {scope: model}}",
    "{tensors: [head.weight, scale], merge_method: dare_linear, parameters: {density: 0.5, weight: 1}}",
)


def test_each_block_is_merged_by_its_method_as_in_memory(folder: Path) -> None:
    plan = make_plan(parse(recipe(*BLOCKS)), out="out", seed=3)
    run(plan)
    models = [load_checkpoint("a"), load_checkpoint("b")]
    method = jm.methods.by_block(
        {"body": jm.methods.ties(scope="model"), "rest": jm.methods.dare_linear()},
        {"body.*": "body", "**": "rest"},
    )
    expected = jm.merge(
        method,
        models,
        base=load_checkpoint("base"),
        key=jax.random.key(3),
        body={"density": [0.5, 0.4]},
        rest={"density": 0.5, "weight": 1.0},
    )
    written = load_checkpoint("out")
    for name, array in written.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-7)
    assert reproduce(Path("out")).equal


def test_what_no_block_names_follows_the_recipe(folder: Path) -> None:
    run(make_plan(parse(recipe(BLOCKS[0])), out="out"))
    a, b, written = (load_checkpoint(name) for name in ("a", "b", "out"))
    np.testing.assert_allclose(
        written["head.weight"], 0.25 * a["head.weight"] + 0.75 * b["head.weight"], rtol=1e-6
    )


def test_the_first_block_that_matches_decides(folder: Path) -> None:
    first = "{tensors: scale, merge_method: linear, parameters: {weight: [1, 0]}}"
    run(make_plan(parse(recipe(first, BLOCKS[1])), out="out"))
    np.testing.assert_array_equal(load_checkpoint("out")["scale"], load_checkpoint("a")["scale"])


def test_a_recipe_with_blocks_is_written_and_read_back(folder: Path) -> None:
    once = parse(recipe(*BLOCKS))
    again = parse(dump(once))
    assert (again.blocks, again.merge_method) == (once.blocks, once.merge_method)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (recipe("{tensors: heads.*, merge_method: linear}"), "block 1: no tensor .*'heads.\\*'"),
        (recipe(BLOCKS[1], BLOCKS[1]), "block 2: no tensor that is merged is left"),
        (recipe("{tensors: '**', merge_method: tise}"), ":7: unknown method 'tise'.*'ties'"),
        (
            recipe("{tensors: '**', merge_method: ties, parameters: {densty: 1}}"),
            ":7: ties has no parameter 'densty'.*'density'",
        ),
        (recipe("{tensors: [], merge_method: ties}"), ":7: .*pattern"),
        (recipe("{tensor: '**', merge_method: ties}"), ":7: unknown key 'tensor'.*'tensors'"),
        (recipe(BLOCKS[1], dialect="mergekit"), "`blocks` needs `dialect: jaxmerge`"),
    ],
)
def test_what_is_wrong_with_a_block_is_said_at_its_line(
    folder: Path, text: str, message: str
) -> None:
    with pytest.raises((PlanError, RecipeError), match=message):
        make_plan(parse(text))
