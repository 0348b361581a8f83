"""Kills merges with SIGKILL at random moments, runs them again, and compares every byte with an undisturbed run.

Each case is one method and one kind of output. A process is killed again and again, each time at another moment, until
a run comes to its end; then the output is compared and the case begins anew, until it has had its share of the kills.
After each kill what stands under the output's name is looked at: it must be what stood there before, or the whole
result, or nothing that loads.

With --search it is searches that are killed, between generations and while their state is written; the result is
compared bit for bit with that of an undisturbed search.

    python benchmarks/faults.py [--kills 60] [--seed 0] [--megabytes 8] [--search] [--json OUT]
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from machine import describe, headline
from report import VERDICT, Report, Table

from jaxmerge.converters import CheckpointError, open_checkpoint, save_checkpoint
from jaxmerge.recipes.output import journal_of, replacement_of

LAYERS = 12
MODELS = ("base", "a", "b")
STAGES = ("starting", "merging", "finishing", "done")


@dataclass(frozen=True)
class Case:
    """A merge that is killed.

    Attributes:
      method: of the recipe.
      parameters: of the recipe, as YAML.
      out: the output's name.
      shards: how many files the weights are to take.
      format: of the output.
      replaces: whether something stands there that is to be replaced.
      dialect: of the recipe.
    """

    method: str
    parameters: str
    out: str = "out"
    shards: int = 1
    format: str = "safetensors"
    replaces: bool = False
    dialect: str = "mergekit"

    @property
    def name(self) -> str:
        kind = f"{self.shards} shards" if self.shards > 1 else self.format
        return f"{self.method}, {kind}, {'file' if '.' in self.out else 'folder'}" + (
            ", replacing" if self.replaces else ""
        )

    @property
    def recipe(self) -> str:
        base = "" if self.method == "linear" else "base_model: base\n"
        models = "[{model: a}]" if self.method == "slerp" else "[{model: a}, {model: b}]"
        return (
            f"dialect: {self.dialect}\nmerge_method: {self.method}\n{base}models: {models}\n"
            f"parameters: {{{self.parameters}}}\n"
        )


CASES = (
    Case("linear", "weight: 0.5", shards=30),
    Case("linear", "weight: 0.5", out="out.safetensors"),
    Case("ties", "weight: 1, density: 0.4", shards=8),
    Case("ties", "weight: 1, density: 0.4", shards=4, dialect="jaxmerge"),
    Case("dare_ties", "weight: 0.6, density: 0.5", out="out.safetensors", replaces=True),
    Case("dare_linear", "weight: 0.6, density: 0.5", shards=12, replaces=True),
    Case("slerp", "t: 0.3"),
    Case("linear", "weight: 0.5", format="torch"),
)


def make_models(folder: Path, nbytes: int, seed: int) -> None:
    """Writes three small decoders in bfloat16's stead: float32, a folder each, with files beside the weights."""
    rng = np.random.default_rng(seed)
    width = max(8, int((nbytes / 4 / (12 * LAYERS + 20)) ** 0.5))
    for name in MODELS:
        tensors = {"model.embed_tokens.weight": (10 * width, width)}
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}"
            tensors |= {f"{prefix}.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
            tensors |= {f"{prefix}.mlp.{n}_proj.weight": (4 * width, width) for n in ("gate", "up")}
            tensors[f"{prefix}.input_layernorm.weight"] = (width,)
        drawn = {key: rng.normal(size=shape).astype(np.float32) for key, shape in tensors.items()}
        drawn["lm_head.weight"] = drawn["model.embed_tokens.weight"]
        save_checkpoint(folder / name, drawn, metadata={"format": "pt"}, shard_size=nbytes // 3)
        (folder / name / "config.json").write_text('{"dtype": "float32"}')
        (folder / name / "nested").mkdir()
        (folder / name / "nested" / "tokenizer.json").write_text("{}" * 1000)


def merge(folder: str, case: Case, out: str, shard_size: int) -> None:
    """What `jaxmerge merge` does, in a process of its own."""
    from jaxmerge.recipes import make_plan, parse, run

    os.chdir(folder)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        plan = make_plan(parse(case.recipe), out=out, overwrite=case.replaces)
        run(plan, format=case.format, shard_size=shard_size)  # type: ignore[arg-type]


class Job:
    """A case in its folder."""

    def __init__(self, folder: Path, case: Case, nbytes: int, spawn: Callable[..., BaseProcess]):
        self.folder, self.case = folder, case
        self._size = nbytes // case.shards if case.shards > 1 else 1 << 60
        self._spawn = spawn

    def start(self, out: Path) -> BaseProcess:
        process = self._spawn(target=merge, args=(self.folder, self.case, str(out), self._size))
        process.start()
        return process

    def before(self, out: Path) -> None:
        """Puts there what the case replaces."""
        out.parent.mkdir()
        if self.case.replaces:
            save_checkpoint(out, {"old": np.arange(1000.0)})


def tensors_done(out: Path) -> int:
    """How many tensors the journals of an unfinished output promise."""
    for place in (replacement_of(out), out):
        with contextlib.suppress(OSError):
            return journal_of(place).read_bytes().count(b'{"tensor"')
    return 0


def files_there(out: Path) -> int:
    """How many files have come to their final names."""
    place = replacement_of(out) if replacement_of(out).exists() else out
    if not place.is_dir():
        return 0
    return sum(not name.endswith((".partial", ".jsonl")) for name in os.listdir(place))


def moment(rng: random.Random, seconds: float, tensors: int, files: int) -> Callable[[Path], bool]:
    """Draws when to kill: after a time, at a tensor, or at a file that gets its final name."""
    kind = rng.choice(("time", "tensor", "tensor", "file"))
    if kind == "time":
        until = time.monotonic() + rng.uniform(0, 1.1 * seconds)
        return lambda _: time.monotonic() > until
    if kind == "tensor":
        count = rng.randint(1, tensors)
        return lambda out: tensors_done(out) >= count
    count = rng.randint(1, files)
    return lambda out: files_there(out) >= count


def killed(job: Job, out: Path, now: Callable[[Path], bool]) -> bool:
    """Runs the case until the moment comes; whether it was killed before its end."""
    process = job.start(out)
    while process.is_alive() and not now(out):
        time.sleep(0.0005)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{job.case.name}: the merge failed with exit code {process.exitcode}")
    return process.exitcode != 0


def contents(out: Path) -> dict[str, bytes]:
    """Every file of an output, and what lies beside it."""
    return {
        str(file.relative_to(out.parent)): file.read_bytes()
        for file in sorted(out.parent.rglob("*"))
        if file.is_file()
    }


def stage(out: Path, tensors: int) -> str:
    """How far the merge had come when it was killed."""
    place = replacement_of(out) if replacement_of(out).exists() else out
    if not journal_of(place).exists():
        return "done" if out.exists() and not any(out.parent.glob("*.partial")) else "starting"
    done = tensors_done(out)
    return "starting" if done == 0 else "merging" if done < tensors else "finishing"


def is_harmless(out: Path, old: dict[str, bytes], whole: dict[str, bytes]) -> bool:
    """Whether what stands under the output's name is the old one, the new one, or nothing that loads."""
    found = {
        name: data
        for name, data in contents(out).items()
        if name.split("/")[0] == out.name and not name.endswith(".jsonl")
    }
    if found in ({}, old) or found == whole:
        return True
    try:
        with open_checkpoint(out):
            return False
    except CheckpointError:
        return True


def attack(
    job: Job, folder: Path, kills: int, rng: random.Random
) -> Iterator[tuple[str, str, float]]:
    """Kills a case so often; yields stage, verdict and seconds of the run that was killed or that ended."""
    reference = folder / "undisturbed" / job.case.out
    job.before(reference)
    began = time.monotonic()
    killed(job, reference, lambda _: False)
    seconds = time.monotonic() - began
    whole = contents(reference)
    with open_checkpoint(reference) as checkpoint:
        tensors = len(checkpoint.tensors)
    files = max(1, len(whole))
    number = 0
    while kills > 0:
        number += 1
        out = folder / str(number) / job.case.out
        job.before(out)
        old = contents(out)
        ended = False
        while not ended:
            now = moment(rng, seconds, tensors, files) if kills > 0 else (lambda _: False)
            began = time.monotonic()
            ended = not killed(job, out, now)
            if not ended:
                kills -= 1
                harmless = is_harmless(out, old, whole)
                verdict = "" if harmless else "something half-written stands there"
                reached = stage(out, tensors)
                # A merge that is done is not made again.
                ended = reached == "done"
                yield reached, verdict, time.monotonic() - began
        found = contents(out)
        wrong = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
        yield "end", f"differs: {', '.join(wrong[:3])}" if wrong else "", time.monotonic() - began
        shutil.rmtree(out.parent)


SEARCHES = ("SNES", "catcma", "differential_evolution")
GENERATIONS, EVERY = 60, 3


def search(folder: str, strategy: str, out: str) -> None:
    """A search of a space of all kinds of variables, in a process of its own; its result goes to a file."""
    import jax
    import jax.numpy as jnp

    from jaxmerge.search import binary, categorical, continuous, evolve, space, when

    made = space(
        {
            "x": continuous(-1.0, 3.0, shape=(6,)),
            "on": binary(shape=(6,)),
            "kind": categorical(["a", "b", "c"]),
            "y": continuous(0.0, 1.0, shape=(6,), when=when("on")),
        }
    )

    def objective(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        loss = jnp.sum((point["x"] - 1.5) ** 2) + jnp.sum((point["y"] - point["on"]) ** 2)
        return loss + point["kind"] + 0.1 * jax.random.normal(key)

    result = evolve(
        objective,
        made,
        strategy=strategy,
        population=12,
        generations=GENERATIONS,
        every=EVERY,
        reevaluate=2,
        key=jax.random.key(0),
        checkpoint=folder,
    )
    arrays = {"genome": result.genome, **result.history}
    with open(out + ".partial", "wb") as file:
        np.savez(file, **arrays)
    os.replace(out + ".partial", out)


def generations_done(folder: Path) -> int:
    """The generation of the latest checkpoint."""
    names = (path.name for path in folder.glob("generation_*"))
    digits = (name.removeprefix("generation_") for name in names)
    return max((int(one) for one in digits if one.isdecimal()), default=0)


def attack_searches(
    folder: Path, kills: int, rng: random.Random, spawn: Callable[..., BaseProcess]
) -> Table:
    """Kills searches until each has had its share; compares what they end with."""
    table = Table(
        "SIGKILL at random moments of a search",
        {
            "strategy": "",
            "kills": "d",
            "while writing": "d",
            "results": "d",
            "seconds": ".1f",
            VERDICT: "",
        },
        [
            f"{GENERATIONS} generations, a checkpoint every {EVERY}. while writing: kills that left a checkpoint half",
            "written. The limit: every result is that of an undisturbed search, bit for bit.",
        ],
    )
    table.start()
    for number, strategy in enumerate(SEARCHES):
        began = time.monotonic()
        share, results, writing, wrong = (kills + number) // len(SEARCHES), 0, 0, ""

        def started(place: Path, strategy: str = strategy) -> BaseProcess:
            arguments = (str(place), strategy, f"{place}.npz")
            process = spawn(target=search, args=arguments)
            process.start()
            return process

        whole = folder / f"{strategy}-whole"
        started(whole).join()
        expected = Path(f"{whole}.npz").read_bytes()
        left = share
        while left > 0:
            results += 1
            place = folder / f"{strategy}-{results}"
            ended = False
            while not ended:
                # From where it has got to, so that every part of a search has its kills.
                done = generations_done(place)
                until = (
                    rng.randint(min(done, GENERATIONS - EVERY), GENERATIONS)
                    if left > 0
                    else GENERATIONS + 1
                )
                process = started(place)
                while process.is_alive() and generations_done(place) < until:
                    time.sleep(0.0005)
                if left > 0:
                    time.sleep(rng.uniform(0, 0.03))
                    if process.is_alive() and process.pid is not None:
                        os.kill(process.pid, signal.SIGKILL)
                process.join()
                if process.exitcode not in (0, -signal.SIGKILL):
                    raise SystemExit(f"the search failed with exit code {process.exitcode}")
                ended = process.exitcode == 0
                if not ended:
                    left -= 1
                    writing += any("tmp" in path.name for path in place.glob("*"))
            if Path(f"{place}.npz").read_bytes() != expected:
                wrong = "another result than undisturbed"
        table.add(
            strategy=strategy,
            kills=share,
            results=results,
            seconds=time.monotonic() - began,
            **{"while writing": writing, VERDICT: f"no: {wrong}" if wrong else "yes"},
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=8, help="of one model")
    parser.add_argument("--search", action="store_true", help="kill searches rather than merges")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # A process that has imported everything and computed nothing is forked for each run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["jaxmerge.search"] if arguments.search else ["jaxmerge.recipes", "jaxmerge.recipes.run"]
    )
    report = Report("faults", __doc__.splitlines()[0], describe(), arguments.seed)
    print(f"{headline(report.machine)}; seed {arguments.seed}")
    if arguments.search:
        with tempfile.TemporaryDirectory() as name:
            rng = random.Random(arguments.seed)
            report.tables.append(attack_searches(Path(name), arguments.kills, rng, context.Process))
        print("\n".join(report.missed()) or "Every result is right.")
        report.write(arguments.json)
        return
    table = Table(
        f"SIGKILL at random moments; models of {arguments.megabytes:g} MB",
        {
            "case": "",
            "kills": "d",
            **dict.fromkeys(STAGES, "d"),
            "outputs": "d",
            "seconds": ".1f",
            VERDICT: "",
        },
        [
            "Where the kills fell: before the first tensor, between tensors, while files were put in place, after all.",
            "outputs: how many came to be, after one or more kills. The limit: each is that of an undisturbed run.",
        ],
    )
    table.start()
    report.tables.append(table)
    rng = random.Random(arguments.seed)
    cases = [case for case in CASES if case.format != "torch" or _has_torch()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nbytes = int(arguments.megabytes * 1e6)
        make_models(folder, nbytes, arguments.seed)
        for number, case in enumerate(cases):
            share = (arguments.kills + number) // len(cases)
            place = folder / f"case{number}"
            place.mkdir()
            began = time.monotonic()
            found = list(attack(Job(folder, case, nbytes, context.Process), place, share, rng))
            stages = collections.Counter(where for where, _, _ in found)
            wrong = [verdict for _, verdict, _ in found if verdict]
            table.add(
                case=case.name,
                kills=sum(stages[where] for where in STAGES),
                outputs=stages["end"],
                seconds=time.monotonic() - began,
                **{where: stages[where] for where in STAGES},
                **{VERDICT: f"no: {wrong[0]}" if wrong else "yes"},
            )
            shutil.rmtree(place)
    total = sum(row[1] for row in table.rows)
    print(f"\n{total} kills, {sum(row[6] for row in table.rows)} outputs compared")
    print(json.dumps(report.missed()) if report.missed() else "Every output is right.")
    report.write(arguments.json)


def _has_torch() -> bool:
    import importlib.util

    return importlib.util.find_spec("torch") is not None


if __name__ == "__main__":
    main()
