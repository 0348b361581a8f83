"""The embedded default job: train, write, merge, search, and report, on real handwritten digits."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmerge.converters import save_checkpoint
from jaxmerge.data import Split, split_digits
from jaxmerge.quickstart.evaluation import Score, evaluate, score_all, score_ensemble
from jaxmerge.quickstart.folder import QuickstartError, claim, write_results
from jaxmerge.quickstart.network import from_checkpoint, to_checkpoint
from jaxmerge.quickstart.plot import plot_results
from jaxmerge.quickstart.population import METHODS, Population, search_population
from jaxmerge.quickstart.recipes import (
    default_recipe,
    exact_recipe,
    fitting_methods,
    run_recipe,
    write_recipe,
)
from jaxmerge.quickstart.result import Kind, QuickstartResult, Row
from jaxmerge.quickstart.training import GROUPS, Sources, group_name, train_sources

_PACKAGES = ("jaxmerge", "jax", "jaxlib", "flax", "optax", "numpy", "matplotlib")

Report = Callable[[str], None]

_NAMES = tuple(group_name(group) for group in GROUPS)
_EXPERTS = tuple(f"expert-{name}" for name in _NAMES)


def run_quickstart(
    out: str | Path,
    *,
    seed: int = 0,
    report: Report = lambda line: None,
    candidates: int = 1024,
    base_steps: int = 50,
    expert_steps: int = 100,
) -> QuickstartResult:
    """Trains experts on handwritten digits, merges them, and compares the merges.

    The candidate is chosen on the validation digits; the test digits are read once, at the end.

    Args:
      out: a folder: new, empty, or that of an earlier quickstart, whose files are
        replaced. It gets `sources/` (PyTorch-named safetensors), `recipes/`, `merged/` (one per
        method), `best/` (the winning checkpoint), `results.json`, `plot.png` and `plot.svg`.
      seed: of training, sampling and random methods; equal seeds give equal numbers on one machine.
      report: called with a line of text as each phase begins.
      candidates: how many merges are tried, at least one per method of the population.
      base_steps, expert_steps: batches that base and experts train on.

    Returns:
      The table's rows and what else `results.json` holds.

    Raises:
      QuickstartError: the folder is not empty and not a quickstart's, or the winning recipe does
        not give the score that the search saw.
      ValueError: too few candidates.
    """
    out = Path(out).expanduser()
    if candidates < len(METHODS):
        raise ValueError(f"candidates must be {len(METHODS)} or more, found {candidates}")
    claim(out)
    split, clock = split_digits(), _Clock()
    report(
        f"Train a base on all ten digits for {base_steps} batches, then from it three experts, "
        f"each on its own digits alone: {', '.join(_NAMES)}"
    )
    with clock.phase("train"):
        sources = train_sources(
            split.train, seed=seed, base_steps=base_steps, expert_steps=expert_steps
        )
        _write_sources(out / "sources", sources)
    merged = {}
    defaults = fitting_methods(len(GROUPS))
    report(f"Merge the experts from recipes, each method at its defaults: {', '.join(defaults)}")
    with clock.phase("merge"):
        for name, count in defaults.items():
            recipe = default_recipe(name, _base(), _models()[:count])
            merged[name] = _run(out, name, recipe, f"{name} at its defaults.", seed)
    report(
        f"Try {candidates:,} merges in one compiled program, each scored on "
        f"{len(split.validation.labels)} validation digits"
    )
    with clock.phase("search"):
        population = search_population(sources, split.validation, candidates=candidates, seed=seed)
    best, score = population.best, float(population.accuracy[population.best])
    report(
        f"Write the best candidate, {population.methods[best]} with {100 * score:.1f} % on the "
        "validation digits, as a recipe; run that"
    )
    with clock.phase("winner"):
        winner = _run_winner(out, population, seed, score)
    report(f"Read the {len(split.test.labels)} test digits, once")
    with clock.phase("test"):
        rows = _rows(sources, merged, defaults, winner, population, split)
    with clock.phase("plot"):
        plot_results(out, rows, _NAMES, population)
    result = QuickstartResult(
        out,
        rows,
        _NAMES,
        candidates,
        population.methods[best],
        population.hyperparams[best],
        score,
        clock.seconds,
    )
    write_results(out, _record(result, population, split, seed, base_steps, expert_steps))
    return result


class _Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def _base() -> str:
    return "../sources/base.safetensors"


def _models() -> list[str]:
    return [f"../sources/{name}.safetensors" for name in _EXPERTS]


def _write_sources(folder: Path, sources: Sources) -> None:
    folder.mkdir(exist_ok=True)
    for name, variables in zip(("base", *_EXPERTS), (sources.base, *sources.experts), strict=True):
        tensors = {key: np.asarray(tensor) for key, tensor in to_checkpoint(variables).items()}
        save_checkpoint(folder / f"{name}.safetensors", tensors, metadata={"format": "pt"})


def _run(out: Path, name: str, recipe: Any, comment: str, seed: int) -> dict[str, np.ndarray]:
    path = out / "recipes" / f"{name}.yaml"
    write_recipe(path, recipe, comment)
    target = out / "best" if name == "best" else out / "merged" / name
    return run_recipe(path, target, seed=seed, sources=out / "sources")


def _run_winner(
    out: Path, population: Population, seed: int, expected: float
) -> dict[str, np.ndarray]:
    best = population.best
    method = population.methods[best]
    recipe = exact_recipe(method, _base(), _models(), population.hyperparams[best])
    comment = (
        f"The best of {len(population.methods)} candidates by validation accuracy, "
        f"{expected:.4f}.\nMade with seed {seed}: jaxmerge merge --seed {seed} best.yaml OUT"
    )
    merged = _run(out, "best", recipe, comment, seed)
    found = float(evaluate(merged))
    # One image may lie on the border between two digits, to the last bit.
    if abs(found - expected) > 1.01 / len(split_digits().validation.labels):
        raise QuickstartError(
            f"{out / 'recipes' / 'best.yaml'}: validation accuracy {found:.4f}, but the search "
            f"saw {expected:.4f}; please report this"
        )
    return merged


def _rows(
    sources: Sources,
    merged: dict[str, dict[str, np.ndarray]],
    counts: dict[str, int],
    winner: dict[str, np.ndarray],
    population: Population,
    split: Split,
) -> tuple[Row, ...]:
    """Scores everything on the test digits."""
    named: list[tuple[str, Kind, Any]] = [("base", "source", sources.base)]
    for group, expert in zip(_NAMES, sources.experts, strict=True):
        named.append((f"expert {group}", "source", expert))
    for method, tensors in merged.items():
        taken = "first expert" if counts[method] == 1 else f"first {counts[method]} experts"
        some = "" if counts[method] == len(GROUPS) else f" ({taken})"
        named.append((method + some, "method", from_checkpoint(tensors)))
    name = f"best of {len(population.methods):,}: {population.methods[population.best]}"
    named.append((name, "best", from_checkpoint(winner)))
    named.append(("reference: trained on all", "reference", sources.joint))
    scores = score_all([model for _, _, model in named], split.test)
    rows = [_row(n, kind, score) for (n, kind, _), score in zip(named, scores, strict=True)]
    together = score_ensemble(sources.experts, split.test)
    ensemble = _row(f"ensemble of the {len(GROUPS)} experts", "ensemble", together)
    rows.insert(1 + len(GROUPS), ensemble)
    return tuple(rows)


def _row(name: str, kind: Kind, score: Score) -> Row:
    return Row(name, kind, score.joint, score.groups)


def _record(
    result: QuickstartResult,
    population: Population,
    split: Split,
    seed: int,
    base_steps: int,
    expert_steps: int,
) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "finished": True,
        "seed": seed,
        "groups": list(result.group_names),
        "images": {name: len(part.labels) for name, part in split._asdict().items()},
        "steps": {"base": base_steps, "expert": expert_steps},
        "test": [row._asdict() for row in result.rows],
        "best": {
            "candidate": population.best,
            "method": result.best_method,
            "hyperparameters": result.best_hyperparams,
            "validation": result.best_validation,
            "recipe": "recipes/best.yaml",
            "checkpoint": "best",
        },
        "population": {
            "candidates": result.candidates,
            "method": list(population.methods),
            "validation": [float(share) for share in population.accuracy],
        },
        "seconds": result.seconds,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
        "device": {"platform": device.platform, "kind": device.device_kind},
    }
