"""Whole merges by the command line, time and memory, beside mergekit and copies of the same files.

methods      TIES and a linear merge of a base and two fine-tunes, beside mergekit and file copies in turn
sizes        time and memory by the size of the models
models       time and memory by the number of models
experts      what 16,000 small tensors cost beyond their bytes

    python benchmarks/streaming.py [--sections methods ...] [--size 1.1B] [--sizes 0.1B 0.3B ...] [--counts 2 4 8]
        [--runs 3] [--peer-runs 1] [--memory-limit 1GiB] [--mergekit FILE] [--data FOLDER] [--plot FILE] [--json OUT]

Every run is a process of its own, whose largest resident memory is read while it runs. Checkpoints are made in a
temporary folder, or in FOLDER, where they stay. mergekit's executable `mergekit-yaml` is named by --mergekit or by
MERGEKIT_YAML; without it the columns beside it stay empty.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import EXPERTS, SIZES, Layout, write
from machine import describe, headline
from report import Report, Table

SECTIONS = ("methods", "sizes", "models", "experts")
FASTER = {"ties": 12.0, "linear": 5.0}
"""How many times faster than mergekit."""

MOST_MEMORY = 1.2e9
MOST_COPIES = 3.0
MOST_BEYOND = 10.0
FLAT = 1.25
"""The largest peak over the smallest, from 0.3B parameters on."""


@dataclass(frozen=True)
class Options:
    """What all sections are told; checkpoints that are not to be kept go as soon as a size is done."""

    data: Path
    size: str
    sizes: tuple[str, ...]
    counts: tuple[int, ...]
    runs: int
    peer_runs: int
    limit: str
    mergekit: str | None
    seed: int
    keep: bool


@dataclass(frozen=True)
class Run:
    """Seconds, and the bytes of the largest resident memory."""

    seconds: float
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--memory-limit", default="1GiB")
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT_YAML"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    machine = describe()
    report = Report("streaming", __doc__.splitlines()[0], machine, arguments.seed)
    print(f"{headline(machine)}; seed {arguments.seed}")
    if arguments.mergekit is None:
        print("without mergekit: name its mergekit-yaml with --mergekit or MERGEKIT_YAML")
    sections: dict[str, Callable[[Options], Iterator[Table]]] = {
        "methods": methods,
        "sizes": sizes,
        "models": models,
        "experts": experts,
    }
    with tempfile.TemporaryDirectory() as temporary:
        options = Options(
            (arguments.data or Path(temporary)).absolute(),
            arguments.size,
            tuple(arguments.sizes),
            tuple(arguments.counts),
            arguments.runs,
            arguments.peer_runs,
            arguments.memory_limit,
            arguments.mergekit,
            arguments.seed,
            arguments.data is not None,
        )
        for name in arguments.sections:
            started = time.perf_counter()
            for table in sections[name](options):
                report.tables.append(table)
                report.write(arguments.json)
            print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    missed = report.missed()
    print(f"\n{len(missed)} rows miss their limit" + "".join(f"\n  {line}" for line in missed))
    if arguments.plot:
        plot(report, arguments.plot)
        picture = os.path.relpath(arguments.plot, Path(__file__).parent)
        report.tables[0].pictures.append(picture)
        report.write(arguments.json)


def methods(options: Options) -> Iterator[Table]:
    table = Table(
        f"A base and two fine-tunes of {options.size} parameters",
        {
            "merge": "",
            "s": ".1f",
            "MB": ".0f",
            "mergekit s": ".1f",
            "mergekit MB": ".0f",
            "faster": ".1f",
            "copy s": ".1f",
            "copies": ".2f",
            "holds": "",
        },
        [
            f"bfloat16, the layout of Llama; --memory-limit {options.limit}. Seconds of the whole command; MB: the "
            "largest resident memory.",
            "copy: the files that the merge reads, copied and synced one after the other; copies: the time over that.",
            f"Limits: {FASTER['ties']:.0f} (TIES) and {FASTER['linear']:.0f} times (linear) as fast as mergekit, under "
            f"{MOST_MEMORY / 1e9:.1f} GB, linear within {MOST_COPIES:.0f} copies.",
        ],
    )
    table.start()
    sources = checkpoints(options, options.size, SIZES[options.size], 3)
    for method in ("ties", "linear"):
        read = sources if method == "ties" else sources[1:]
        recipe = write_recipe(options, method, sources)
        routes: dict[str, tuple[int, Callable[[], Run]]] = {
            "merge": (options.runs, lambda recipe=recipe: merge(options, recipe)),
            "copy": (options.runs, lambda read=read: copy(options, read)),
        }
        if options.mergekit is not None:
            routes["mergekit"] = (options.peer_runs, lambda recipe=recipe: peer(options, recipe))
        found = in_turn(routes)
        table.add(merge=method, **_row(method, found))
    yield table


def _row(method: str, found: dict[str, list[Run]]) -> dict[str, Any]:
    seconds = {name: cell([run.seconds for run in runs]) for name, runs in found.items()}
    memory = {name: cell([run.memory / 1e6 for run in runs]) for name, runs in found.items()}
    mine = seconds["merge"]["median"]
    copies = mine / seconds["copy"]["median"]
    row: dict[str, Any] = {
        "s": seconds["merge"],
        "MB": memory["merge"],
        "copy s": seconds["copy"],
        "copies": copies,
    }
    problems = []
    if memory["merge"]["max"] * 1e6 > MOST_MEMORY:
        problems.append(f"{memory['merge']['max']:.0f} MB")
    if method == "linear" and copies > MOST_COPIES:
        problems.append(f"{copies:.1f} copies")
    if "mergekit" in found:
        faster = seconds["mergekit"]["median"] / mine
        row |= {
            "mergekit s": seconds["mergekit"],
            "mergekit MB": memory["mergekit"],
            "faster": faster,
        }
        if faster < FASTER[method]:
            problems.append(f"{faster:.1f} times")
    return row | {"holds": f"no: {', '.join(problems)}" if problems else "yes"}


def sizes(options: Options) -> Iterator[Table]:
    table = _by("Time and memory by size", "parameters", options)
    table.notes.append(
        f"Limits: under {MOST_MEMORY / 1e9:.1f} GB, and from 0.3B on at most {FLAT} times the smallest peak."
    )
    table.start()
    least: dict[str, float] = {}
    for size in options.sizes:
        layout = SIZES[size]
        sources = checkpoints(options, size, layout, 3)
        for method in ("ties", "linear"):
            found = in_turn(
                {"merge": (options.runs, lambda m=method, s=sources: _merge(options, m, s))}
            )["merge"]
            memory = cell([run.memory / 1e6 for run in found])
            if layout.parameters > 2e8:
                least.setdefault(method, memory["median"])
            too_much = memory["max"] * 1e6 > MOST_MEMORY
            grows = memory["median"] > FLAT * least.get(method, memory["median"])
            table.add(
                parameters=size,
                method=method,
                GB=_gigabytes(sources if method == "ties" else sources[1:]),
                s=cell([run.seconds for run in found]),
                MB=memory,
                holds=f"no: {memory['max']:.0f} MB" if too_much or grows else "yes",
            )
        if not options.keep:
            _remove(sources)
    yield table


def models(options: Options) -> Iterator[Table]:
    size = "0.3B"
    table = _by(f"Time and memory by the number of models of {size} parameters", "models", options)
    table.start()
    for count in options.counts:
        sources = checkpoints(options, size, SIZES[size], count + 1)
        for method in ("ties", "linear"):
            found = in_turn(
                {"merge": (options.runs, lambda m=method, s=sources: _merge(options, m, s))}
            )["merge"]
            memory = cell([run.memory / 1e6 for run in found])
            table.add(
                models=str(count),
                method=method,
                GB=_gigabytes(sources if method == "ties" else sources[1:]),
                s=cell([run.seconds for run in found]),
                MB=memory,
                holds=f"no: {memory['max']:.0f} MB" if memory["max"] * 1e6 > MOST_MEMORY else "yes",
            )
    yield table


def experts(options: Options) -> Iterator[Table]:
    few = Layout(4, 768, 1024, 256, vocabulary=EXPERTS.parameters // 768 // 2 - 10_000)
    counts = {
        name: len(list(layout.shapes())) for name, layout in (("experts", EXPERTS), ("few", few))
    }
    table = Table(
        f"{counts['experts']:,} small tensors beside {counts['few']} tensors of as many bytes",
        {
            "method": "",
            "GB": ".2f",
            "s": ".1f",
            "few tensors s": ".1f",
            "beyond s": ".1f",
            "MB": ".0f",
            "holds": "",
        },
        [
            "A base and two fine-tunes, a mixture of experts; beyond: what the number of tensors costs. Limit: "
            f"{MOST_BEYOND:.0f} s."
        ],
    )
    table.start()
    many = checkpoints(options, "experts", EXPERTS, 3)
    large = checkpoints(options, "few", few, 3)
    for method in ("ties", "linear"):
        found = in_turn(
            {
                "many": (options.runs, lambda m=method: _merge(options, m, many)),
                "few": (options.runs, lambda m=method: _merge(options, m, large)),
            }
        )
        times = {name: cell([run.seconds for run in runs]) for name, runs in found.items()}
        beyond = times["many"]["median"] - times["few"]["median"]
        table.add(
            method=method,
            GB=_gigabytes(many),
            s=times["many"],
            MB=cell([run.memory / 1e6 for run in found["many"]]),
            holds="yes" if beyond <= MOST_BEYOND else f"no: {beyond:.0f} s",
            **{"few tensors s": times["few"], "beyond s": beyond},
        )
    yield table


def _by(title: str, column: str, options: Options) -> Table:
    return Table(
        title,
        {column: "", "method": "", "GB": ".2f", "s": ".1f", "MB": ".0f", "holds": ""},
        [
            f"GB: what is read; MB: the largest resident memory, with --memory-limit {options.limit}."
        ],
    )


# Checkpoints and recipes --------------------------------------------------------------------------------------------


def checkpoints(options: Options, name: str, layout: Layout, count: int) -> list[Path]:
    """A base and fine-tunes, made where they are not there."""
    folders = [
        write(options.data / f"{name}-{model}", layout, model=model, seed=options.seed)
        for model in range(count)
    ]
    # What was just written is on the disk, and in the system's memory as far as that goes.
    os.sync()
    return folders


def write_recipe(options: Options, method: str, sources: list[Path]) -> Path:
    base, *tuned = sources
    weight = 1 / len(tuned)
    parameters = {"weight": weight, **({"density": 0.5} if method == "ties" else {})}
    recipe = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": [{"model": str(folder), "parameters": parameters} for folder in tuned],
        **({"base_model": str(base)} if method == "ties" else {}),
    }
    path = options.data / f"{method}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(recipe))
    return path


def _gigabytes(folders: list[Path]) -> float:
    return sum((folder / "model.safetensors").stat().st_size for folder in folders) / 1e9


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


# Runs ---------------------------------------------------------------------------------------------------------------


def in_turn(routes: dict[str, tuple[int, Callable[[], Run]]]) -> dict[str, list[Run]]:
    """All routes in turn, each so many times."""
    found: dict[str, list[Run]] = {name: [] for name in routes}
    for turn in range(max(runs for runs, _ in routes.values())):
        for name, (runs, route) in routes.items():
            if turn < runs:
                found[name].append(route())
    return found


def _merge(options: Options, method: str, sources: list[Path]) -> Run:
    return merge(options, write_recipe(options, method, sources))


def merge(options: Options, recipe: Path) -> Run:
    out = options.data / "merged"
    limit = ["--memory-limit", options.limit]
    command = [sys.executable, "-m", "jaxmerge", "merge", str(recipe), str(out), *limit]
    return watched(command, out)


def peer(options: Options, recipe: Path) -> Run:
    out = options.data / "merged-by-mergekit"
    assert options.mergekit is not None
    return watched([options.mergekit, str(recipe), str(out), "--no-copy-tokenizer"], out)


COPY = """
import os, shutil, sys
*sources, folder = sys.argv[1:]
os.makedirs(folder)
for i, source in enumerate(sources):
    target = os.path.join(folder, str(i))
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
"""


def copy(options: Options, sources: list[Path]) -> Run:
    out = options.data / "copied"
    files = [str(folder / "model.safetensors") for folder in sources]
    return watched([sys.executable, "-c", COPY, *files, str(out)], out)


def watched(command: list[str], out: Path) -> Run:
    """Runs a command that makes a folder, and removes it."""
    shutil.rmtree(out, ignore_errors=True)
    # What others left to be written is not this one's.
    os.sync()
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        memory = 0
        while process.poll() is None:
            memory = max(memory, _peak(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{said.read().decode(errors='replace')}")
    shutil.rmtree(out)
    return Run(seconds, memory)


def _peak(process: int) -> int:
    """The largest resident memory of a running process; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def cell(values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


# Picture ------------------------------------------------------------------------------------------------------------


def plot(report: Report, path: Path) -> None:
    """Time and memory by size and by number of models, as far as they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = {next(iter(table.columns)): table for table in report.tables}
    drawn = [name for name in ("parameters", "models") if name in tables]
    if not drawn:
        raise SystemExit("--plot draws the sections sizes and models: run one of them")
    figure, axes = plt.subplots(2, len(drawn), figsize=(4.5 * len(drawn), 6), squeeze=False)
    for column, name in enumerate(drawn):
        table = tables[name]
        places = {key: place for place, key in enumerate(table.columns)}
        for row, (what, label) in enumerate((("s", "seconds"), ("MB", "peak memory, MB"))):
            axis = axes[row][column]
            for method in ("linear", "ties"):
                mine = [line for line in table.rows if line[places["method"]] == method]
                read = [line[places["GB"]] for line in mine]
                axis.plot(
                    read,
                    [line[places[what]]["median"] for line in mine],
                    marker="o",
                    label=method,
                )
                for x, line in zip(read, mine, strict=True):
                    if what == "s" and method == "ties":
                        axis.annotate(
                            line[places[name]],
                            (x, line[places[what]]["median"]),
                            textcoords="offset points",
                            xytext=(0, 6),
                            ha="center",
                        )
            axis.set_xlabel("GB read")
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(f"by {'size' if name == 'parameters' else 'number of models'}")
                axis.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
