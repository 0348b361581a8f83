"""Writes RESULTS.md from the runs' JSON: `python benchmarks/results.py`, after `--json benchmarks/results/NAME.json`.

    python benchmarks/results.py [--runs FOLDER] [--out FILE]

A section per benchmark, in it one per run, with the machine named. The same files give the same text.
"""

import argparse
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from machine import headline
from report import Report, Table, read

HERE = Path(__file__).parent

INTRODUCTION = """# Results

Written by `python benchmarks/results.py` from the runs in `benchmarks/results/`; not edited by hand. Figures are
medians of several runs (minima and maxima are in the JSON), on the machine that each section names, with the peer or
limit measured in the same run."""


def render(reports: list[Report]) -> str:
    """The page, from reports in any order."""
    ordered = sorted(reports, key=lambda report: (report.benchmark, report.command))
    parts = [INTRODUCTION, *_missed(ordered)]
    for benchmark, runs in groupby(ordered, key=lambda report: report.benchmark):
        parts.append(f"## {benchmark}")
        for i, report in enumerate(runs):
            if i == 0:
                parts.append(report.summary)
            parts.append(f"### `{report.command}`")
            parts.append(f"{headline(report.machine)}; seed {report.seed}.")
            for table in report.tables:
                parts += [f"**{table.title}.**", *_notes(table), _markdown(table)]
                parts += [f"![{table.title}]({picture})" for picture in table.pictures]
    return "\n\n".join(parts) + "\n"


def _missed(reports: list[Report]) -> Iterator[str]:
    lines = [
        f"- {report.benchmark}, {', '.join(report.machine['devices'])}: {line}"
        for report in reports
        for line in report.missed()
    ]
    yield "## What misses its limit"
    yield "\n".join(lines) or "Nothing."


def _notes(table: Table) -> Iterator[str]:
    if table.notes:
        yield " ".join(table.notes)


def _markdown(table: Table) -> str:
    """A column of numbers stands to the right."""
    rule = ["---:" if form else "---" for form in table.columns.values()]
    rows = [list(table.columns), rule, *(table.texts(row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    arguments = parser.parse_args()
    files = sorted(arguments.runs.glob("*.json"))
    if not files:
        raise SystemExit(f"no run in {arguments.runs}: give a benchmark --json first")
    arguments.out.write_text(render([read(path) for path in files]))


if __name__ == "__main__":
    main()
