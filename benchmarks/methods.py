"""The speed of every registered method, beside a peer or a limit in the same run.

bandwidth    every method's candidate, merge and jitted merge beside a weighted sum and a copy
trimming     whole trimmed merges beside the same merges in PyTorch with argsort
candidates   what init costs once, and one more candidate beside what it cannot do without
compile      the first call on a decoder of 24 layers, in fresh processes
population   64 candidates in one program beside 64 calls

    python benchmarks/methods.py [--sections bandwidth ...] [--methods ties ...] [--elements N] [--runs N] [--json OUT]

The last lines say what missed its limit; the exit status does not: times are no test.
"""

import argparse
import json
import time
from pathlib import Path

from machine import describe, headline
from report import Report

import jaxmerge as jm

SECTIONS = ("bandwidth", "trimming", "candidates", "compile", "population")
ELEMENTS = {"cpu": 1 << 24}
"""Elements of a model by backend, such that three of them leave the caches."""
ACCELERATOR_ELEMENTS = 1 << 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--methods", nargs="+", choices=jm.methods.names(), metavar="NAME")
    parser.add_argument("--elements", type=lambda text: int(float(text)), help="of each model")
    parser.add_argument("--runs", type=int, help="of each figure; default: the section's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--first", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    from sections import Options, bandwidth, candidates, compiling, population, trimming

    if arguments.first:
        print(json.dumps(compiling.measure(*json.loads(arguments.first))))
        return
    machine = describe()
    elements = arguments.elements or ELEMENTS.get(machine["backend"], ACCELERATOR_ELEMENTS)
    report = Report("methods", __doc__.splitlines()[0], machine, arguments.seed)
    print(f"{headline(machine)}; seed {arguments.seed}")
    options = Options(
        tuple(arguments.methods or jm.methods.names()), elements, arguments.runs, arguments.seed
    )
    sections = {
        "bandwidth": bandwidth.run,
        "trimming": trimming.run,
        "candidates": candidates.run,
        "compile": compiling.run,
        "population": population.run,
    }
    for name in arguments.sections:
        started = time.perf_counter()
        for table in sections[name](options):
            report.tables.append(table)
            report.write(arguments.json)
        print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    missed = report.missed()
    print(f"\n{len(missed)} rows miss their limit" + "".join(f"\n  {line}" for line in missed))


if __name__ == "__main__":
    main()
