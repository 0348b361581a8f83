"""How long a first merge of a deep decoder takes, compilation included, each in a fresh process."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import Table

from sections import Options

RUNS = 1
PATIENCE = 300.0
"""Seconds after which a process is given up."""
DEPTH, DEEPER, WIDTH = 24, 48, 64
LIMITS = {"eager": 8.0, "in jit": 15.0}
CHOOSE_LIMIT = 30.0
DEPTH_LIMIT = 1.5
"""How much longer twice the depth may take; 1 but for noise."""

FIVE = {
    "choose: five trims": ("ties", "dare_ties", "della", "breadcrumbs", "task_arithmetic"),
    "choose: five kinds": ("linear", "ties", "sce", "model_stock", "tsv"),
}
"""What `choose` chooses from: members of one family, which share a kernel, and methods that share nothing."""


def run(options: Options) -> Iterator[Table]:
    runs = options.runs or RUNS
    table = Table(
        f"First call on a decoder of {DEPTH} layers",
        {
            "method": "",
            "eager s": ".2f",
            "in jit s": ".2f",
            "stacked 24 s": ".2f",
            "stacked 48 s": ".2f",
            "48/24": ".2f",
            "limits": "",
            "holds": "",
        },
        [
            f"{9 * DEPTH + 2} tensors in 8 shapes; seconds of the first call in a fresh process, compilation included.",
            "stacked: jm.merge inside a jit, the layers stacked on axis 0, at 24 and 48 layers.",
        ],
    )
    table.start()
    several = {"ties": [{"scope": "model"}, {"scope": "tensor"}]}
    for name in options.methods:
        for given in several.get(name, [{}]):
            label = " ".join([name, *given.values()])
            table.add(method=label, **_row([name], given, LIMITS, runs, options.seed))
    for label, names in FIVE.items():
        if set(names) <= set(options.methods):
            row = _row(list(names), {}, {"in jit": CHOOSE_LIMIT}, runs, options.seed)
            table.add(method=label, **row)
    yield table


def measure(names: list[str], options: dict[str, Any], form: str, seed: int) -> list[float]:
    """Seconds of first calls in this process; several names mean `choose` over them."""
    import jax
    import jax.numpy as jnp
    from workload import decoder, inputs

    import jaxmerge as jm

    method = jm.methods.get(names[0])(**options)
    if len(names) > 1:
        method = jm.methods.choose([jm.methods.get(name)() for name in names])
    seconds = []
    for depth in (DEPTH, DEEPER) if form == "stacked" else (DEPTH,):
        base, *tuned = (decoder(depth, WIDTH, seed + i) for i in range(3))
        layout = None
        if form == "stacked":
            base, *tuned = (_stacked(tree, depth) for tree in (base, *tuned))
            layout = jm.tree.stacked_layout(base, {"layers/": "layers_{layer}/"})
        base, *tuned = (jax.tree.map(jnp.asarray, tree) for tree in (base, *tuned))
        given = jax.block_until_ready(
            inputs(method, base, tuned, seed, stacked="layers/" if form == "stacked" else None)
        )
        arguments = (given.models, given.base, given.key, given.extras)

        def whole(models: Any, base: Any, key: Any, extras: Any, layout: Any = layout) -> Any:
            return jm.merge(method, models, base=base, key=key, extras=extras, layout=layout)

        jax.clear_caches()
        started = time.perf_counter()
        jax.block_until_ready((whole if form == "eager" else jax.jit(whole))(*arguments))
        seconds.append(time.perf_counter() - started)
    return seconds


def _row(
    names: list[str], options: dict[str, Any], limits: dict[str, float], runs: int, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"limits": " / ".join(f"{limit:.0f}" for limit in limits.values())}
    missed = []
    for form in ("eager", "in jit", "stacked"):
        task = json.dumps([names, options, form, seed])
        try:
            found = [_fresh(task) for _ in range(runs)]
        except subprocess.TimeoutExpired:
            missed.append(f"{form}: more than {PATIENCE:.0f} s")
            continue
        except subprocess.CalledProcessError as error:
            said = [line for line in error.stderr.splitlines() if re.match(r"[\w.]*Error", line)]
            missed.append(f"{form}: {said[-1][:80] if said else error.returncode}")
            continue
        columns = ["stacked 24 s", "stacked 48 s"] if form == "stacked" else [f"{form} s"]
        for column, seconds in zip(columns, zip(*found, strict=True), strict=True):
            row[column] = {
                "median": round(statistics.median(seconds), 2),
                "min": round(min(seconds), 2),
                "max": round(max(seconds), 2),
            }
        if form in limits and row[f"{form} s"]["median"] > limits[form]:
            missed.append(form)
    if "stacked 48 s" in row:
        row["48/24"] = row["stacked 48 s"]["median"] / row["stacked 24 s"]["median"]
        if row["48/24"] > DEPTH_LIMIT:
            missed.append("grows with depth")
    row["holds"] = f"no: {', '.join(missed)}" if missed else "yes"
    return row


def _fresh(task: str) -> list[float]:
    """What `measure` finds in a process of its own."""
    command = [sys.executable, str(Path(__file__).parent.parent / "methods.py"), "--first", task]
    # This process may hold most of an accelerator's memory already.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, timeout=PATIENCE
    )
    return json.loads(done.stdout.splitlines()[-1])


def _stacked(tree: Any, depth: int) -> Any:
    import jaxmerge as jm

    layers = jm.tree.stack([tree[f"layers_{i}"] for i in range(depth)])
    return {"embed": tree["embed"], "norm": tree["norm"], "layers": layers}
