"""`jaxmerge plan`."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.converters import save_checkpoint


def test_plan_lists_tensors_sources_and_amounts(folder: Path, call: Any) -> None:
    result = call("plan", "ties.yaml")
    assert result.exit_code == 0
    words = [line.split() for line in result.stdout.splitlines()]
    assert ["fc.weight", "6x4", "float32", "float32", "merge"] in words
    assert ["steps", "1", "int64", "int64", "carry"] in words
    assert ["model", "1", "b", "safetensors", "4", "200", "B"] in words
    assert "Tensors: 3 merged, 1 carried over" in result.stdout
    assert "Reads 584 B, writes 200 B" in result.stdout
    # What Python and JAX take, a cut of the largest tensor, and what the machine has.
    assert re.search(r"^Memory needed: 335\.\d MB \(.* free\)$", result.stdout, re.MULTILINE)
    assert not [line for line in result.stdout.splitlines() if line != line.rstrip()]


def test_a_long_table_is_shortened_in_the_middle(folder: Path, call: Any) -> None:
    many = {f"layer.{i:02}": np.ones(2, np.float32) for i in range(50)}
    for name in ("base", "a", "b"):
        Path(name, "model.safetensors").unlink()
        save_checkpoint(name, many)
    short = call("plan", "ties.yaml").stdout
    assert "... 10 more (--all)" in short
    assert "layer.19" in short
    assert "layer.20" not in short
    assert "layer.30" in short
    everything = call("plan", "ties.yaml", "--all").stdout
    assert all(name in everything for name in many)


def test_json_is_all_of_stdout(folder: Path, call: Any) -> None:
    plan = json.loads(call("plan", "ties.yaml", "out", "--seed", 3, "--json").stdout)
    assert plan["seed"] == 3
    assert plan["output"] == "out"
    assert [tensor["name"] for tensor in plan["tensors"]][-1] == "steps"


def test_what_sets_the_result_apart_from_mergekit_is_said(folder: Path, call: Any) -> None:
    text = Path("ties.yaml").read_text().replace("ties", "dare_ties") + "dtype: bfloat16\n"
    Path("dare.yaml").write_text(text)
    _, differences = call("plan", "dare.yaml").stdout.split("Where mergekit differs:")
    assert "merged in float32 arithmetic and then rounded" in differences
    assert "dare_ties draws other random numbers" in differences


def test_output_is_checked(folder: Path, call: Any) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    result = call("plan", "ties.yaml", "out")
    assert result.exit_code == 2
    assert "out: the output folder is not empty" in result.stderr
    assert call("plan", "ties.yaml", "out", "--overwrite").exit_code == 0
