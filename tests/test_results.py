"""The page of results is what the command writes from the runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def write(runs: Path, out: Path) -> str:
    command = [
        sys.executable,
        str(BENCHMARKS / "results.py"),
        "--runs",
        str(runs),
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True)
    return out.read_text()


def test_the_page_is_what_the_command_writes_from_the_runs(tmp_path: Path) -> None:
    if not list((BENCHMARKS / "results").glob("*.json")):
        pytest.skip("no runs yet")
    written = write(BENCHMARKS / "results", tmp_path / "RESULTS.md")
    assert (BENCHMARKS / "RESULTS.md").read_text() == written, "run python benchmarks/results.py"


def test_a_missed_limit_and_the_machine_are_named(tmp_path: Path) -> None:
    machine = {
        "processor": "some processor",
        "cores": 2,
        "load": 0.5,
        "system": "Linux",
        "python": "3.11",
        "devices": ["1 x cpu"],
        "versions": {"jax": "0.10"},
    }
    table = {
        "title": "Speed",
        "columns": {"method": "", "ms": ".1f", "holds": ""},
        "notes": ["Lower is better."],
        "rows": [
            ["ties", {"median": 1.25, "min": 1.0, "max": 2.0}, "yes"],
            ["della", 9.0, "no: 3.0x"],
        ],
    }
    report = {
        "benchmark": "methods",
        "summary": "The speed of methods.",
        "machine": machine,
        "seed": 0,
        "command": "python benchmarks/methods.py",
        "tables": [table],
    }
    (tmp_path / "run.json").write_text(json.dumps(report))
    page = write(tmp_path, tmp_path / "RESULTS.md")
    assert "- methods, 1 x cpu: Speed: della no: 3.0x" in page
    assert "some processor, 2 cores, load 0.5" in page
    assert "| ties | 1.2 | yes |" in page
