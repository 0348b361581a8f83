"""AutoMerge against the best single technique and against a search over the whole model, at equal budgets."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import Table
from scipy import stats

import jaxmerge as jm
from jaxmerge.search.blockwise.searching import DEFAULT_METHODS
from search_sections import Options
from search_sections.sources import VALIDATION, Problem, driving, images

POPULATION, GENERATIONS = 10, 20
PRELIMINARY = 2
"""Searches of each single technique; the best of them gets as many as the others."""

BALANCE = 0.5
BLOCKS = 4
STRATEGY = "catcma"
WHOLE = {"**": "model"}


def run(options: Options) -> Iterator[Table]:
    seeds = range(options.seed, options.seed + options.seeds)
    for make in (images, driving):
        problem = make(options.seed)
        validation, test = (_data(problem, split) for split in ("validation", "test"))
        labels = jm.search.segment(
            problem.experts, problem.base, blocks=BLOCKS,
            apply_fn=problem.apply_fn, inputs=validation[0][0][:1],
        )  # fmt: skip
        evaluate = _evaluate(problem)
        search = functools.partial(_search, problem, evaluate, validation)
        few = seeds[:PRELIMINARY]
        singles = {name: [search(WHOLE, (name,), seed) for seed in few] for name in DEFAULT_METHODS}
        # Chosen on validation, before the test set is read.
        best = max(singles, key=lambda name: np.mean([one.score for one in singles[name]]))
        singles[best] += [search(WHOLE, (best,), seed) for seed in seeds[PRELIMINARY:]]
        found = {
            "AutoMerge, per block": [search(labels, DEFAULT_METHODS, seed) for seed in seeds],
            "whole model": [search(WHOLE, DEFAULT_METHODS, seed) for seed in seeds],
            **{f"{name} alone": runs for name, runs in singles.items()},
        }
        best = f"{best} alone"
        yield from _tables(problem, evaluate, test, found, best, labels, options)


def _data(problem: Problem, split: str) -> tuple[tuple[jax.Array, jax.Array], ...]:
    parts = [getattr(task, split) for task in problem.tasks]
    return tuple((jnp.asarray(part.inputs), jnp.asarray(part.targets)) for part in parts)


def _evaluate(problem: Problem) -> Any:
    def evaluate(params: Any, key: jax.Array, data: Any) -> jax.Array:
        scores = [
            jnp.mean(problem.score(problem.apply_fn(params, inputs), targets))
            for inputs, targets in data
        ]
        return jnp.stack(scores)

    return evaluate


def _search(
    problem: Problem, evaluate: Any, data: Any, blocks: Any, methods: Any, seed: int
) -> jm.search.AutoMerge:
    return jm.search.automerge(
        problem.experts, problem.base, evaluate, key=jax.random.key(seed), blocks=blocks,
        methods=methods, data=data, balance=BALANCE, strategy=STRATEGY,
        population=POPULATION, generations=GENERATIONS, chunk=1,
    )  # fmt: skip


def _tables(
    problem: Problem,
    evaluate: Any,
    test: Any,
    found: Mapping[str, list[jm.search.AutoMerge]],
    best: str,
    labels: Any,
    options: Options,
) -> Iterator[Table]:
    scored = jax.jit(evaluate)
    key = jax.random.key(0)
    own = np.array([scored(one, key, test)[i] for i, one in enumerate(problem.experts)])
    others = {
        "base": problem.base,
        "mean of the experts": jm.merge("linear", list(problem.experts)),
    }
    rows = {name: [np.asarray(scored(params, key, test))] for name, params in others.items()}
    rows.update(
        {
            f"expert: {task.name}": [np.asarray(scored(params, key, test))]
            for task, params in zip(problem.tasks, problem.experts, strict=True)
        }
    )
    rows.update(
        {
            name: [np.asarray(scored(one.params, key, test)) for one in runs]
            for name, runs in found.items()
        }
    )
    names = [task.name for task in problem.tasks]
    table = Table(
        f"AutoMerge on {problem.name}",
        {
            "merge": "",
            **dict.fromkeys(names, ".3f"),
            "preserved": ".3f",
            "discrepancy": ".3f",
            "test score": ".3f",
            "validation": ".3f",
        },
        [
            f"{problem.training}. Scores on test sets that no search saw, means over {options.seeds} seeds",
            "of the search: accuracy, or for steering 1 / (1 + normalised mean squared error). preserved: the mean",
            "over tasks of the score over the own expert's; discrepancy: its largest less its least; score:",
            f"preserved - {BALANCE:g} discrepancy, which searches maximise on validation data. Every search:",
            f"{STRATEGY}, {POPULATION} x {GENERATIONS} merges evaluated on {VALIDATION} examples of each task.",
            f"Single techniques: {PRELIMINARY} searches each, {options.seeds} of the one that is best in these.",
            f"Blocks found by `segment`: {', '.join(dict.fromkeys(map(str, labels.values())))}.",
        ],
    )
    table.start()
    score: dict[str, np.ndarray] = {}
    for name, runs in rows.items():
        kept = np.stack(runs) / own
        uneven = kept.max(1) - kept.min(1)
        score[name] = kept.mean(1) - BALANCE * uneven
        cells = {task: float(np.stack(runs)[:, i].mean()) for i, task in enumerate(names)}
        table.add(
            merge=name, **cells, preserved=float(kept.mean()), discrepancy=float(uneven.mean()),
            **{"test score": float(score[name].mean())},
            validation=float(np.mean([one.score for one in found[name]])) if name in found else None,
        )  # fmt: skip
    yield table
    table = Table(
        f"Paired differences of the test score on {problem.name}",
        {
            "AutoMerge against": "",
            "difference": "+.4f",
            "low": "+.4f",
            "high": "+.4f",
            "better": "",
        },
        [
            f"Over {options.seeds} seeds of the search, with 95% t-intervals; the single technique is the best on",
            f"validation data after {PRELIMINARY} searches each.",
        ],
    )
    table.start()
    for name in (best, "whole model"):
        difference = score["AutoMerge, per block"] - score[name]
        mean = float(difference.mean())
        spread = stats.sem(difference) if len(difference) > 1 else float("nan")
        half = stats.t.ppf(0.975, len(difference) - 1) * spread
        clear = "yes" if mean - half > 0 else "no" if mean + half < 0 else "undecided"
        table.add(
            **{"AutoMerge against": name}, difference=mean, low=mean - half, high=mean + half, better=clear
        )  # fmt: skip
    yield table
    table = Table(
        f"What was chosen per block on {problem.name}",
        {"block": "", **dict.fromkeys(DEFAULT_METHODS, "d")},
        ["How many of the searches chose each technique."],
    )
    table.start()
    for block in dict.fromkeys(map(str, labels.values())):
        chosen = [str(one.chosen[block][0].name) for one in found["AutoMerge, per block"]]
        table.add(block=block, **{name: chosen.count(name) for name in DEFAULT_METHODS})
    yield table
