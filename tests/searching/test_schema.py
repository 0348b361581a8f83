"""SEARCH.yaml: what it may hold, and what its errors say."""

import pytest

from jaxmerge.recipes import RecipeError
from jaxmerge.searching.schema import Metric, parse_search

HEAD = "models: [a, b]\nmethods: [linear, {method: ties, options: {scope: tensor}}]\n"


def test_short_forms_are_read() -> None:
    search = parse_search(
        HEAD
        + "space: {density: [0.1, 1], lambda: {low: 0.5, high: 2, scale: log}}\n"
        + "blocks: {attn: '*.attn.*', rest: ['**']}\n"
        + "objective: {metric: accuracy, data: val.npz}\n"
    )
    assert [str(model) for model in search.models] == ["a", "b"]
    assert [one.method for one in search.methods] == ["linear", "ties"]
    assert search.space["scale"].scale == "log"
    assert search.blocks == {"attn": ("*.attn.*",), "rest": ("**",)}
    assert search.objective == Metric(metric="accuracy", data=("val.npz",))
    # The recipe's own word for one method.
    assert parse_search("models: [{model: a}]\nmerge_method: ties").methods[0].method == "ties"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "budgt: 10", "s.yaml:3: unknown key 'budgt'; did you mean 'budget'"),
        ("models: [a]", "`methods` is missing"),
        (HEAD + "space:\n  density: {low: 0, hihg: 1}", "s.yaml:4: unknown key 'hihg'"),
        (HEAD + "space: {density: [0, 1, 2]}", r"expected \[low, high\], found \[0, 1, 2\]"),
        (HEAD + "strategy: catcam", "s.yaml:3: .*did you mean 'catcma'"),
        (HEAD + "population: 0", "s.yaml:3: `population`: .* greater than 0"),
        (HEAD + "blocks: layers", "expected layer, tensor, or a mapping"),
        (HEAD + "models: []", "given twice|duplicate|at least one model"),
        ("models: []\nmethods: ties", "s.yaml:1: .*at least one model"),
        ("- a", "a search is a mapping"),
        (HEAD + "seed: -1\nbudget: 0", "2 problems|s.yaml:3"),
    ],
)
def test_errors_name_the_line_and_the_nearest_key(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_search(text, filename="s.yaml")
