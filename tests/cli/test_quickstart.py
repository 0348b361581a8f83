"""`jaxmerge quickstart`: how its result is shown; the job itself is tested beside it."""

from pathlib import Path
from typing import Any

import pytest

from jaxmerge import quickstart
from jaxmerge.quickstart import QuickstartResult, Row


def test_the_table_goes_to_stdout_and_the_phases_to_stderr(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def run_quickstart(out: Path, *, seed: int, report: Any) -> QuickstartResult:
        given.append((out, seed))
        report("Train a base")
        rows = (
            Row("base", "source", 0.5, (0.25, 0.75)),
            Row("expert", "source", 0.6, (0.4, 0.8)),
            Row("ensemble", "ensemble", 0.8, (0.8, 0.8)),
            Row("best", "best", 0.9, (0.9, 0.9)),
        )
        return QuickstartResult(out, rows, ("0-4", "5-9"), 256, "ties", {"density": 0.5}, 0.9, {})

    monkeypatch.setattr(quickstart, "run_quickstart", run_quickstart)
    monkeypatch.chdir(tmp_path)
    result = call("quickstart", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert given == [(Path("jaxmerge-quickstart"), 3)]
    assert result.stderr == "Train a base\n"
    words = [line.split() for line in result.stdout.splitlines()]
    assert ["base", "50.0", "25.0", "75.0"] in words
    assert "the best expert alone 60.0 %" in " ".join(result.stdout.split())
    assert "jaxmerge merge jaxmerge-quickstart/recipes/best.yaml OUT --seed 3" in result.stdout
    call("quickstart", "elsewhere")
    assert given[-1] == (Path("elsewhere"), 0)


def test_a_folder_of_something_else_is_refused(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = call("quickstart", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "not empty" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
