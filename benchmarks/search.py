"""Search: mixed-variable strategies on known functions, and Pareto fronts, beside public packages.

strategies   evaluations to the target, beside plain CMA-ES and the package cmaes
pareto       hypervolume of NSGA-II beside pymoo at equal evaluations
automerge    per block against single techniques and the whole model, on images and driving

    python benchmarks/search.py [--sections strategies ...] [--dimensions N ...] [--seeds N] [--evaluations N]
        [--seed N] [--json OUT]

The peers are packages that nothing else needs: `pip install cmaes pymoo`. The last lines say what missed its limit; the
exit status does not.
"""

import argparse
import time
from pathlib import Path

from machine import describe, headline
from report import Report

SECTIONS = ("strategies", "pareto", "automerge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    sizes = [10, 20, 40]
    parser.add_argument("--dimensions", nargs="+", type=int, default=sizes, help="in `strategies`")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each")
    evaluations = 12_000
    parser.add_argument("--evaluations", type=int, default=evaluations, help="at most, of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from search_sections import Options, automerge, pareto, strategies

    report = Report("search", __doc__.splitlines()[0], describe(), arguments.seed)
    print(f"{headline(report.machine)}; seed {arguments.seed}")
    fields = {name: getattr(arguments, name) for name in Options.__dataclass_fields__}
    options = Options(**{**fields, "dimensions": tuple(arguments.dimensions)})
    sections = {"strategies": strategies.run, "pareto": pareto.run, "automerge": automerge.run}
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
