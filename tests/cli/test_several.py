"""Several recipes in one file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint

SEVERAL = """\
merge_method: linear
models:
- {model: first, parameters: {weight: 0.5}}
- {model: b, parameters: {weight: 0.5}}
---
name: first
merge_method: task_arithmetic
base_model: base
models:
- {model: a, parameters: {weight: 0.5}}
"""


def test_each_goes_to_a_folder_of_its_name_after_those_that_it_uses(
    folder: Path, call: Any
) -> None:
    Path("several.yaml").write_text(SEVERAL)
    result = call("merge", "several.yaml", "out")
    assert result.exit_code == 0, result.stderr
    first, final = result.stdout.splitlines()
    assert first.startswith("out/first: 3 tensors merged by task_arithmetic, 1 carried over; ")
    assert final.startswith("out/final: 3 tensors merged by linear, 1 carried over; ")
    base, a, b = (load_checkpoint(name)["fc.weight"] for name in ("base", "a", "b"))
    expected = ((base + 0.5 * (a - base)) + b) / 2
    np.testing.assert_allclose(load_checkpoint("out/final")["fc.weight"], expected, rtol=1e-5)
    again = call("merge", "several.yaml", "out")
    assert again.exit_code == 0
    assert again.stdout.count("is the result of this merge already") == 2
    reproduced = call("reproduce", "out/final")
    assert reproduced.exit_code == 0, reproduced.stdout + reproduced.stderr
    assert "note" not in reproduced.stderr


def test_all_are_planned_before_any_is_run(folder: Path, call: Any) -> None:
    Path("several.yaml").write_text(SEVERAL)
    shown = call("plan", "several.yaml")
    assert shown.exit_code == 0
    assert shown.stdout.index("Merge: first") < shown.stdout.index("Merge: final")
    listed = json.loads(call("plan", "several.yaml", "--json").stdout)
    assert [plan["sources"][0]["name"] for plan in listed] == ["base", "first"]
    Path("several.yaml").write_text(SEVERAL.replace("model: b,", "model: c,"))
    result = call("merge", "several.yaml", "out")
    assert result.exit_code == 2
    assert "no file or folder 'c'" in result.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SEVERAL.replace("model: a,", "model: final,"), "use each other in a circle"),
        (SEVERAL + "---\n" + SEVERAL.split("---\n")[1], "2 merges have the name 'first'"),
    ],
)
def test_what_cannot_be_is_told(folder: Path, call: Any, text: str, message: str) -> None:
    Path("several.yaml").write_text(text)
    result = call("merge", "several.yaml", "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "need a folder" in call("merge", "several.yaml", "out.safetensors").stderr
