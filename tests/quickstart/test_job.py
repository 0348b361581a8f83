"""The whole job, reduced: what it writes, that it repeats, that its winner can be made again."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.converters import load_checkpoint, open_checkpoint
from jaxmerge.data import split_digits
from jaxmerge.quickstart import QuickstartResult, evaluate, run_quickstart
from jaxmerge.quickstart.network import LAYOUT, from_checkpoint, to_checkpoint
from jaxmerge.recipes import make_plan, read, run

SMALL: dict[str, Any] = {"candidates": 40, "base_steps": 30, "expert_steps": 20, "seed": 5}


class Ran(NamedTuple):
    out: Path
    result: QuickstartResult
    lines: list[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The job, on a machine with neither PyTorch nor scikit-learn."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in ("torch", "sklearn"):
            patch.setitem(sys.modules, module, None)
        result = run_quickstart(out, report=lines.append, **SMALL)
    return Ran(out, result, lines)


def test_the_folder_holds_everything_and_nothing_half_written(ran: Ran) -> None:
    names = {str(path.relative_to(ran.out)) for path in ran.out.rglob("*") if path.is_file()}
    assert {
        "results.json",
        "plot.png",
        "plot.svg",
        "sources/base.safetensors",
        "sources/expert-0-3.safetensors",
        "sources/expert-4-6.safetensors",
        "sources/expert-7-9.safetensors",
        "recipes/best.yaml",
        "recipes/ties.yaml",
        "merged/ties/model.safetensors",
        "best/model.safetensors",
    } <= names
    assert not [name for name in names if "partial" in name or "unfinished" in name]
    assert (ran.out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_every_source_method_and_the_best(ran: Ran) -> None:
    kinds = [row.kind for row in ran.result.rows]
    methods = jm.methods.names()
    assert kinds[:5] == ["source"] * 4 + ["ensemble"]
    assert kinds[5:] == ["method"] * (len(kinds) - 7) + ["best", "reference"]
    shown = [row.name.split(" ")[0] for row in ran.result.rows if row.kind == "method"]
    assert set(shown) <= set(methods)
    assert {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"} <= set(shown)
    assert ran.result.header[1:] == ("all", "0-3", "4-6", "7-9")
    assert all(len(cells) == 5 for cells in ran.result.cells())


def test_experts_know_their_own_digits_and_the_merge_knows_all(ran: Ran) -> None:
    experts = ran.result.rows[1:4]
    for i, expert in enumerate(experts):
        assert expert.groups[i] == max(expert.groups) > 0.85
    assert ran.result.best.accuracy > max(expert.accuracy for expert in experts)


def test_each_phase_is_reported(ran: Ran) -> None:
    assert len(ran.lines) == 5
    assert f"{ran.result.best_method} with" in ran.lines[3]
    assert f"{100 * ran.result.best.accuracy:.1f} %" in ran.result.summary


def test_results_are_recorded(ran: Ran) -> None:
    results = json.loads((ran.out / "results.json").read_text())
    assert results["finished"] is True
    assert results["seed"] == 5
    assert [row["name"] for row in results["test"]] == [row.name for row in ran.result.rows]
    assert len(results["population"]["validation"]) == 40
    assert results["best"]["validation"] == max(results["population"]["validation"])
    assert results["versions"]["jaxmerge"] == jm.__version__
    assert set(results["seconds"]) == {"train", "merge", "search", "winner", "test", "plot"}


def test_sources_are_ordinary_pytorch_checkpoints(ran: Ran) -> None:
    with open_checkpoint(ran.out / "sources" / "base.safetensors") as checkpoint:
        assert checkpoint.metadata["format"] == "pt"
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            "fc1.weight": (128, 64),
            "fc1.bias": (128,),
            "fc2.weight": (128, 128),
            "fc2.bias": (128,),
            "fc3.weight": (10, 128),
            "fc3.bias": (10,),
        }


def test_the_winning_recipe_makes_the_winning_checkpoint_again(ran: Ran, tmp_path: Path) -> None:
    plan = make_plan(read(ran.out / "recipes" / "best.yaml"), out=tmp_path / "again", seed=5)
    again = load_checkpoint(run(plan))
    best = load_checkpoint(ran.out / "best")
    assert list(again) == list(best)
    for name, tensor in best.items():
        np.testing.assert_array_equal(again[name], tensor)
    one_image = 1.01 / len(split_digits().validation.labels)
    assert float(evaluate(best)) == pytest.approx(ran.result.best_validation, abs=one_image)


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties"])
def test_a_recipe_on_checkpoints_gives_what_the_method_gives_on_flax_parameters(
    ran: Ran, name: str
) -> None:
    sources = ran.out / "sources"
    base, *experts = (
        from_checkpoint(load_checkpoint(sources / f"{source}.safetensors"))
        for source in ("base", "expert-0-3", "expert-4-6", "expert-7-9")
    )
    merged = jm.merge(name, experts, base=base, layout=LAYOUT, key=jax.random.key(5))
    from_recipe = load_checkpoint(ran.out / "merged" / name)
    for tensor, found in to_checkpoint(merged).items():
        np.testing.assert_allclose(found, from_recipe[tensor], rtol=1e-6, atol=1e-7)


def test_equal_seeds_give_equal_numbers_and_other_files_survive(ran: Ran) -> None:
    best = (ran.out / "best" / "model.safetensors").read_bytes()
    mine = ran.out / "mine.yaml"
    mine.write_text("my own\n")
    again = run_quickstart(ran.out, **SMALL)
    assert again.rows == ran.result.rows
    assert again.best_hyperparams == ran.result.best_hyperparams
    assert (ran.out / "best" / "model.safetensors").read_bytes() == best
    assert mine.read_text() == "my own\n"


def test_too_few_candidates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="candidates must be 5 or more, found 2"):
        run_quickstart(tmp_path / "out", candidates=2)
    assert not (tmp_path / "out").exists()
