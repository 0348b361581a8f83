"""How the command starts, helps and reports progress."""

import subprocess
import sys
from typing import Any

import pytest

from jaxmerge import __version__
from jaxmerge.cli.progress import progress


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxmerge", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"jaxmerge {__version__}\n"
    assert done.stderr == ""


def test_a_reader_that_has_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "jaxmerge", "methods"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""


@pytest.mark.parametrize("command", [(), ("merge",), ("plan",), ("sweep",), ("doctor",)])
def test_help_names_the_exit_codes(call: Any, command: tuple[str, ...]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    for code in ("0    done", "1    failed", "2    bad input", "130  interrupted"):
        assert code in result.stdout


def test_progress_without_a_terminal_is_one_line_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0

    def clock() -> float:
        return now

    with progress("merging", lambda amount: f"{amount:.0f} B", clock=clock) as report:
        for second in range(0, 150, 10):
            now = float(second)
            report(second, 150)
    assert capsys.readouterr().err.splitlines() == [
        "merging: 60 B of 150 B (40 %), 60 s",
        "merging: 120 B of 150 B (80 %), 120 s",
    ]


def test_progress_of_nothing_is_no_division_by_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("merging", str, every=0.0) as report:
        report(0, 0)
    assert capsys.readouterr().err.startswith("merging: 0 of 0 (0 %)")
