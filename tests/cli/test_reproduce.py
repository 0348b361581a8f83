"""`jaxmerge reproduce`: what it says."""

import json
from pathlib import Path
from typing import Any

from jaxmerge.converters import load_checkpoint, save_checkpoint


def test_it_says_whether_the_output_is_made_again(folder: Path, call: Any) -> None:
    assert call("merge", "ties.yaml", "out").exit_code == 0
    Path("a").rename("moved")
    result = call("reproduce", "out", "--source", "a=moved")
    assert result.exit_code == 0
    assert result.stdout.startswith("out: all 4 tensors are made again bit for bit, in ")
    tensors = load_checkpoint("out")
    tensors["fc.bias"][2] += 1
    save_checkpoint("out", tensors)
    result = call("reproduce", "out", "--source", "a=moved")
    assert result.exit_code == 1
    assert ["fc.bias", "1", "1"] in [line.split() for line in result.stdout.splitlines()]
    assert "out: 1 of 4 tensors differ" in result.stdout
    result = call("reproduce", "out", "--source", "a=moved", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["differences"][0]["name"] == "fc.bias"


def test_bad_input_is_told(folder: Path, call: Any) -> None:
    result = call("reproduce", "a")
    assert result.exit_code == 2
    assert "a: there is no record of a merge" in result.stderr
    assert "expected OLD=NEW" in call("reproduce", "a", "--source", "b").stderr
