"""Search: mixed-variable strategies and Pareto fronts beside public packages, AutoMerge, data flow.

throughput   candidates per second: a Python loop, cycles that write and load every candidate, population sizes
strategies   evaluations to the target, beside plain CMA-ES and the package cmaes
pareto       hypervolume of NSGA-II beside pymoo at equal evaluations
automerge    per block against single techniques and the whole model, on images and driving
dataflow     layers of decoders trained on two domains: two by two optimisers, parameter space, and both
smollm2      data flow through SmolLM2-135M-Instruct, and the recipe that it gives

    python benchmarks/search.py [--sections strategies ...] [--dimensions N ...] [--seeds N] [--evaluations N]
        [--seed N] [--mergekit FILE] [--scratch FOLDER] [--json OUT]

The peers are packages that nothing else needs: `pip install cmaes pymoo`, and for `throughput` PyTorch, transformers
and mergekit's executable `mergekit-yaml`, named by --mergekit or by MERGEKIT_YAML. A run of `dataflow` that was cut
short goes on from what stands in --scratch. The last lines say what missed its limit; the exit status does not.
"""

import argparse
import importlib
import os
import tempfile
import time
from pathlib import Path

from machine import describe, headline
from report import Report

SECTIONS = ("throughput", "strategies", "pareto", "automerge", "dataflow", "smollm2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    sizes = [10, 20, 40]
    parser.add_argument("--dimensions", nargs="+", type=int, default=sizes, help="in `strategies`")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each")
    evaluations = 12_000
    parser.add_argument("--evaluations", type=int, default=evaluations, help="at most, of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT_YAML"))
    parser.add_argument("--scratch", type=Path, help="for what sections write on their way")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    if "throughput" in arguments.sections:
        # A device for each core, over which a population may be spread; before JAX is imported.
        devices = f"--xla_force_host_platform_device_count={os.cpu_count()}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
    from search_sections import Options

    report = Report("search", __doc__.splitlines()[0], describe(), arguments.seed)
    print(f"{headline(report.machine)}; seed {arguments.seed}")
    fields = {name: getattr(arguments, name) for name in Options.__dataclass_fields__}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        changed = {"dimensions": tuple(arguments.dimensions), "scratch": scratch}
        options = Options(**{**fields, **changed})
        for name in arguments.sections:
            started = time.perf_counter()
            section = importlib.import_module(f"search_sections.{name}")
            for table in section.run(options):
                report.tables.append(table)
                report.write(arguments.json)
            print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    missed = report.missed()
    print(f"\n{len(missed)} rows miss their limit" + "".join(f"\n  {line}" for line in missed))


if __name__ == "__main__":
    main()
