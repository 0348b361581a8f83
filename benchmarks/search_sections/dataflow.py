"""Data flow through real decoders: two by two, an optimiser for all or CatCMA, told or not which scales count.

For each seed a decoder of characters is trained on prose and Python source together, and from it one on each; then the
same budget of evaluations goes to every search:

- in data-flow space (DFS), M = 12 layers of both, r = 3, a bit and a scale for each of the 36 slots. Whatever the
  optimiser, each slot is on with probability 1/6 at the beginning: 6 layers on average, as many as an expert has.
  CMA-ES holds bits as coordinates with a threshold; it is CMA-ES with margin, without the margin. Embeddings, norm and
  head are those of the expert that scores better on the search split. A search "from an expert" begins at its own path,
  from which each slot differs with probability 1/20.
- in parameter space (PS): task arithmetic with a weight per model and layer, by CMA-ES.
- PS for half of the budget, then DFS over both experts and its result for the other half.

The score is the mean log-likelihood of the next character over both domains on a few pieces; what is reported is
measured on pieces of other texts. Every seed has its own weights, split of the texts, batches and search.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from report import Table
from scipy import stats

import jaxmerge as jm
from jaxmerge.models import in_a_row, layer_function, layers_of
from jaxmerge.search import evolve
from jaxmerge.search.dataflow import Flow, Slots, around, flow_space
from jaxmerge.search.dataflow import run as run_flow
from jaxmerge.search.strategies.catcma import CatCMA
from jaxmerge.search.strategies.margin import MarginCMAES
from search_sections import Options
from search_sections.decoders import LENGTH, MODEL, Trained, train_all

STEPS, MORE_STEPS, RATE = 400, 200, 3e-3
SEARCHED, HELD = 8, 512
POPULATION = 50
REPEATS = 3
CHANGED = 0.05
BOUNDS = (0.5, 2.0)
SPREAD = 0.25

DESIGN = (
    "The design was settled after a look at results: the two by two first began at an expert's own path, where seeds",
    "0 and 1 left all four arms; the beginning at random paths was chosen because it tells them apart, and these two",
    "seeds are among those shown. Pieces searched on were then cut from 12 to 8 for time: searches overfit them.",
)
"""What readers of the tables must know of how they came about."""

LAYER = layer_function(MODEL)
TASK_ARITHMETIC = jm.methods.task_arithmetic()


@dataclass(frozen=True)
class PlainCMAES(MarginCMAES):
    """CMA-ES over all coordinates, bits by a threshold: the margin is next to nothing."""

    @property
    def default_params(self) -> Any:
        return super().default_params._replace(margin=1e-6)


class Arm(NamedTuple):
    """One search in data-flow space.

    Attributes:
      strategy: who searches.
      form: of the scales.
      told: whether it is told which scales count.
      warm: whether it starts from an expert's own path rather than from random ones.
    """

    strategy: Callable[[int, Any], Any]
    form: Any
    told: bool
    warm: bool = False


PS, HYBRID, WARM = "PS", "PS, then DFS, CatCMA, told", "DFS from an expert, CatCMA, told"
PAIRS, START = "DFS, CatCMA, told, pairs", "better expert"
EXPERTS = ("expert in prose", "expert in Python")
ARMS = {
    "DFS, CMA-ES": Arm(PlainCMAES, "slots", False),
    "DFS, CMA-ES, told": Arm(PlainCMAES, "slots", True),
    "DFS, CatCMA": Arm(CatCMA, "slots", False),
    "DFS, CatCMA, told": Arm(CatCMA, "slots", True),
    WARM: Arm(CatCMA, "slots", True, warm=True),
    PAIRS: Arm(CatCMA, "pairs", True),
}
MAIN = [name for name in ARMS if name != PAIRS]


def likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean log-likelihood of the next character, [domains]; tokens [domains, pieces, length + 1]."""
    following = tokens[..., 1:, None]
    logits = logits.reshape(*following.shape[:-1], -1)
    chances = jnp.take_along_axis(jax.nn.log_softmax(logits), following, axis=-1)
    return jnp.mean(chances, axis=(1, 2, 3))


def of_flow(flow: Any, key: jax.Array, ends: Any, tokens: jax.Array) -> jax.Array:
    """The score of a path; ends: variables outside of the layers."""
    read = tokens[..., :-1].reshape(-1, tokens.shape[-1] - 1)
    hidden, contexts = MODEL.apply(ends, read, method="begin")
    return likelihood(MODEL.apply(ends, flow(hidden, contexts), method="logits"), tokens)


def of_merge(point: Any, key: jax.Array, state: Any, tokens: jax.Array) -> jax.Array:
    """Minus the score of a merged model."""
    read = tokens[..., :-1].reshape(-1, tokens.shape[-1] - 1)
    return -jnp.mean(likelihood(MODEL.apply(merged(point, state), read), tokens))


@jax.jit
def merged(point: Any, state: Any) -> Any:
    """Task arithmetic with point["weight"] [layers and the rest, models]."""
    depth = MODEL.config.depth
    labels = {"params/layers/**": tuple(range(depth)), "**": depth}
    return TASK_ARITHMETIC.apply(
        state, {"weight": jm.tree.per_block(point["weight"], labels)}, None
    )


@jax.jit
def measured(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood and accuracy, [domains] each."""
    right = jnp.argmax(logits.reshape(*tokens[..., 1:].shape, -1), axis=-1) == tokens[..., 1:]
    return likelihood(logits, tokens), jnp.mean(right, axis=(1, 2))


def run(options: Options) -> Iterator[Table]:
    seeds = range(options.seed, options.seed + options.seeds)
    generations = -(-options.evaluations // POPULATION)
    folder = options.scratch / f"dataflow-{options.evaluations}"
    folder.mkdir(parents=True, exist_ok=True)
    found = _searched(folder, seeds, ["sources", *MAIN, PS, HYBRID], generations)
    yield _quality(found, generations)
    yield _differences(found)
    yield _forms(found, _searched(folder, seeds, [PAIRS], generations))


def _searched(
    folder: Path, seeds: range, names: list[str], generations: int
) -> dict[int, dict[str, Any]]:
    """What searches found, by seed and name; those that stand in the folder are not run again."""
    found: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        for name in names:
            if not _file(folder, seed, name).exists():
                _write(folder, seed, name, _search(seed, name, generations))
        found[seed] = {name: json.loads(_file(folder, seed, name).read_text()) for name in names}
        if "sources" in names:
            experts = [found[seed]["sources"][name] for name in EXPERTS]
            found[seed][START] = max(experts, key=lambda one: one["search"])
    return found


@functools.cache
def _trained(seed: int) -> Trained:
    settings = {"steps": STEPS, "more_steps": MORE_STEPS, "rate": RATE}
    return train_all(seed, searched=SEARCHED, held=HELD, **settings)


@functools.cache
def _sources(seed: int) -> dict[str, dict[str, Any]]:
    trained = _trained(seed)
    sources = {
        **dict(zip(EXPERTS, trained.experts, strict=True)),
        "both trained together": trained.base,
        "average of the experts": jax.tree.map(lambda a, b: (a + b) / 2, *trained.experts),
    }
    return {name: _plain(params, trained) for name, params in sources.items()}


def _search(seed: int, name: str, generations: int) -> dict[str, Any]:
    """What one search of a seed finds, measured."""
    trained, sources, key = _trained(seed), _sources(seed), jax.random.key(seed + 1)
    if name == "sources":
        return sources
    if name == PS:
        return _merge(trained, generations, key)[1]
    if name == HYBRID:
        first, _ = _merge(trained, generations // 2, key)
        models, rest = (*trained.experts, first), generations - generations // 2
        return _flow(trained, models, 2, ARMS[WARM], rest, key)
    start = int(np.argmax([sources[name]["search"] for name in EXPERTS]))
    return _flow(trained, trained.experts, start, ARMS[name], generations, key)


def _flow(
    trained: Trained, models: Any, start: int, arm: Arm, generations: int, key: jax.Array
) -> dict[str, Any]:
    row, joined = in_a_row([MODEL] * len(models), list(models), ends=start)
    slots = Slots((MODEL.config.depth,) * len(models), REPEATS)
    chance = np.full(slots.count, MODEL.config.depth / slots.count)
    if arm.warm:
        chance = around(slots, start, CHANGED)
    if arm.strategy is PlainCMAES:
        # A bit is on above 0.5: where the mean must lie for a Gaussian of that spread to be so with the probability.
        chance = 0.5 + SPREAD * stats.norm.ppf(chance)
    space = flow_space(slots, arm.form, bounds=BOUNDS, probability=chance, conditional=arm.told)
    layers = layers_of(row.config, joined)
    ends = {"params": {name: one for name, one in joined["params"].items() if name != "layers"}}
    flow = Flow(LAYER, of_flow, slots, arm.form, BOUNDS, skip=True)
    found = evolve(
        flow,
        space,
        strategy=arm.strategy(POPULATION, space),
        generations=generations,
        key=key,
        args=(layers, ends, trained.data.search),
        chunk=1,
    )
    logits = _logits_of_flow(flow, found.best, layers, ends, trained.data.held)
    told = flow_space(slots, arm.form, bounds=BOUNDS)
    active = np.asarray(told.active(told.encode(found.best)))[slots.count :]
    on = np.asarray(found.best["on"])
    return {
        **_held(logits, trained),
        "search": -found.fitness,
        "evaluations": found.evaluations,
        "along": found.history["best"].tolist(),
        "on": int(on.sum()),
        "slots": slots.count,
        "scales": len(active),
        "active": int(active.sum()),
        "path": [list(slots.origin(int(t) % slots.depth)) for t in np.flatnonzero(on)],
    }


def _logits_of_flow(flow: Flow, point: Any, layers: Any, ends: Any, tokens: jax.Array) -> jax.Array:
    @jax.jit
    def apply(point: Any, layers: Any, ends: Any, read: jax.Array) -> jax.Array:
        hidden, contexts = MODEL.apply(ends, read, method="begin")
        hidden = run_flow(
            LAYER, layers, point["on"], flow.scale(point), hidden, contexts, skip=True
        )
        return MODEL.apply(ends, hidden, method="logits")

    return apply(point, layers, ends, tokens[..., :-1].reshape(-1, LENGTH))


def _merge(trained: Trained, generations: int, key: jax.Array) -> tuple[Any, dict[str, Any]]:
    layout = jm.tree.stacked_layout(trained.base, {"params/layers/": "params/layers_{layer}/"})
    state = TASK_ARITHMETIC.init(list(trained.experts), trained.base, layout=layout)
    shape = (MODEL.config.depth + 1, 2)
    space = jm.search.space({"weight": jm.search.continuous(-0.5, 1.5, shape=shape)})
    found = evolve(
        of_merge,
        space,
        strategy=PlainCMAES(POPULATION, space),
        generations=generations,
        key=key,
        args=(state, trained.data.search),
        chunk=1,
    )
    params = merged(found.best, state)
    return params, {
        **_plain(params, trained),
        "evaluations": found.evaluations,
        "along": found.history["best"].tolist(),
    }


def _plain(params: Any, trained: Trained) -> dict[str, Any]:
    read = trained.data.search[..., :-1].reshape(-1, LENGTH)
    search = likelihood(MODEL.apply(params, read), trained.data.search)
    logits = MODEL.apply(params, trained.data.held[..., :-1].reshape(-1, LENGTH))
    return {**_held(logits, trained), "search": float(jnp.mean(search))}


def _held(logits: jax.Array, trained: Trained) -> dict[str, Any]:
    chance, right = measured(logits, trained.data.held)
    return {"nats": (-chance).tolist(), "accuracy": (100 * right).tolist()}


def _quality(found: dict[int, Any], generations: int) -> Table:
    table = Table(
        f"data flow: {len(found)} seeds, {generations * POPULATION} evaluations each, on texts held out",
        {
            "model": "",
            "accuracy %": "",
            "prose %": ".1f",
            "Python %": ".1f",
            "nats": ".3f",
            "nats in search": ".3f",
            "slots on": ".1f",
            "scales that count": ".0%",
        },
        [
            "Means over seeds; accuracy of the next character over both domains, with Student's 95% interval.",
            f"The search sees {SEARCHED} pieces of {LENGTH} characters of each domain; {HELD} are held out.",
            "Told: the strategy is told which scales count. Scales that count: of the best point's.",
            *DESIGN,
        ],
    )
    table.start()
    first = next(iter(found.values()))
    for name in [*first["sources"], START, *MAIN, PS, HYBRID]:
        rows = [one["sources"].get(name) or one[name] for one in found.values()]
        accuracy = np.array([one["accuracy"] for one in rows])
        cells: dict[str, Any] = {
            "accuracy %": _interval(accuracy.mean(axis=1)),
            "prose %": float(accuracy[:, 0].mean()),
            "Python %": float(accuracy[:, 1].mean()),
            "nats": float(np.mean([one["nats"] for one in rows])),
            "nats in search": -float(np.mean([one["search"] for one in rows])),
        }
        if "on" in rows[0]:
            cells["slots on"] = float(np.mean([one["on"] for one in rows]))
        if rows[0].get("scales"):
            cells["scales that count"] = float(
                np.mean([one["active"] / one["scales"] for one in rows])
            )
        table.add(model=name, **cells)
    return table


def _differences(found: dict[int, Any]) -> Table:
    table = Table(
        "data flow: paired differences on texts held out",
        {
            "of": "",
            "to": "",
            "accuracy, points": "",
            "nats": "",
            "nats in search": "",
            "better in": "",
        },
        [
            "Means over seeds with Student's 95% interval; fewer nats are better. Better in: seeds of higher accuracy.",
            "Not corrected for the number of comparisons: an interval that barely leaves 0 out suggests, no more.",
        ],
    )
    table.start()
    pairs = [
        ("DFS, CMA-ES, told", "DFS, CMA-ES"),
        ("DFS, CatCMA, told", "DFS, CatCMA"),
        ("DFS, CatCMA", "DFS, CMA-ES"),
        ("DFS, CatCMA, told", "DFS, CMA-ES, told"),
        ("DFS, CatCMA, told", "DFS, CMA-ES"),
        (WARM, "DFS, CatCMA, told"),
        (WARM, START),
        (PS, WARM),
        (HYBRID, WARM),
        (HYBRID, PS),
    ]
    for one, other in pairs:
        rows = [(seed[one], seed[other]) for seed in found.values()]
        accuracy = np.array([np.mean(a["accuracy"]) - np.mean(b["accuracy"]) for a, b in rows])
        nats = np.array([np.mean(a["nats"]) - np.mean(b["nats"]) for a, b in rows])
        search = np.array([b["search"] - a["search"] for a, b in rows])
        table.add(
            of=one,
            to=other,
            **{
                "accuracy, points": _interval(accuracy, 2),
                "nats": _interval(nats, 3),
                "nats in search": _interval(search, 3),
                "better in": f"{int((accuracy > 0).sum())} of {len(accuracy)}",
            },
        )
    return table


def _forms(found: dict[int, Any], pairs: dict[int, Any]) -> Table:
    table = Table(
        "data flow: a scale for each slot, or for each pair of layers that follow each other",
        {
            "scales": "",
            "variables": "d",
            "scales that count": ".0%",
            "accuracy %": "",
            "nats": ".3f",
            "nats in search": ".3f",
            "nats less than slots": "",
        },
        ["DFS by CatCMA, told which scales count; on texts held out, as above."],
    )
    table.start()
    slots = [one["DFS, CatCMA, told"] for one in found.values()]
    for name, rows in (("slots", slots), ("pairs", [one[PAIRS] for one in pairs.values()])):
        nats = np.array([np.mean(one["nats"]) for one in rows])
        less = np.array([np.mean(one["nats"]) for one in slots]) - nats
        table.add(
            scales=name,
            variables=rows[0]["slots"] + rows[0]["scales"],
            **{
                "scales that count": np.mean([one["active"] / one["scales"] for one in rows]),
                "accuracy %": _interval(np.array([np.mean(one["accuracy"]) for one in rows])),
                "nats": float(nats.mean()),
                "nats in search": -float(np.mean([one["search"] for one in rows])),
                "nats less than slots": _interval(less, 3) if name == "pairs" else None,
            },
        )
    return table


def _interval(values: np.ndarray, digits: int = 1) -> str:
    """The mean and half the width of Student's 95% interval."""
    if len(values) < 2:
        return f"{np.mean(values):.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def _file(folder: Path, seed: int, name: str) -> Path:
    return folder / f"{seed} {name}.json"


def _write(folder: Path, seed: int, name: str, found: Any) -> None:
    file = _file(folder, seed, name)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(found))
    beside.rename(file)
    print(f"  seed {seed}, {name}", flush=True)
