"""The output folder: nobody else's is touched."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxmerge.converters import save_checkpoint
from jaxmerge.quickstart import QuickstartError, run_quickstart
from jaxmerge.quickstart.folder import claim, write_file, write_results
from jaxmerge.quickstart.recipes import default_recipe, run_recipe, write_recipe


@pytest.mark.parametrize("results", [None, "{}", "[]", "not json", '{"made_by": "me"}'])
def test_a_foreign_folder_is_refused_untouched(tmp_path: Path, results: str | None) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if results is not None:
        (tmp_path / "results.json").write_text(results)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(QuickstartError, match=r"not empty \(.*no earlier quickstart wrote it"):
        run_quickstart(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert results is None or (tmp_path / "results.json").read_text() == results


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(QuickstartError, match="a file stands where"):
        run_quickstart(tmp_path / "out")


def test_a_folder_that_was_claimed_can_be_claimed_again(tmp_path: Path) -> None:
    claim(tmp_path / "a" / "b")
    results = json.loads((tmp_path / "a" / "b" / "results.json").read_text())
    assert results == {"made_by": "jaxmerge quickstart", "finished": False}
    claim(tmp_path / "a" / "b")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_results(tmp_path, {"seed": 1})
    before = (tmp_path / "results.json").read_text()

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "results.json", fail)
    assert (tmp_path / "results.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_models_of_the_same_name_in_the_working_directory_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("out", "other"):
        (tmp_path / folder / "sources").mkdir(parents=True)
        save_checkpoint(
            tmp_path / folder / "sources" / "a.safetensors", {"w": np.ones(2, np.float32)}
        )
    write_recipe(
        tmp_path / "out" / "recipes" / "linear.yaml",
        default_recipe("linear", "base", ["../sources/a.safetensors"]),
        "one model",
    )
    (tmp_path / "other" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "other" / "here")
    with pytest.raises(QuickstartError, match="run the quickstart from another working directory"):
        run_recipe(
            tmp_path / "out" / "recipes" / "linear.yaml",
            tmp_path / "out" / "merged",
            seed=0,
            sources=tmp_path / "out" / "sources",
        )
    assert not (tmp_path / "out" / "merged").exists()
