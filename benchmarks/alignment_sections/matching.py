"""How fast two residual networks are matched, beside the same descent as a loop of NumPy and SciPy."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clock import Times, once
from report import Table

import jaxmerge as jm
from alignment_sections import Options, plain, verdict
from jaxmerge.tree import flatten

ALPHA = 0.5
ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
SWEEPS = 100
LOOP_LIMIT, PATH_LIMIT = 5.0, 3.0
OFFICIAL = 14.7
"""Seconds of MuDSC's own code on 2 cores: dual space, a network of this kind, 256 images, statistics included."""


def run(options: Options) -> Iterator[Table]:
    config = jm.models.ResNetConfig.cifar(20, width=options.width)
    widths = "-".join(map(str, config.widths))
    table = Table(
        f"Matching of ResNet20 ({widths}) in dual space",
        {
            "pair": "",
            "first call s": ".1f",
            "match s": ".2f",
            "loop s": ".2f",
            "loop / match": ".1f",
            "sweeps": "d",
            "permutations": "",
            f"{len(ALPHAS)} alphas s": ".2f",
            "path / match": ".1f",
            "statistics s": ".1f",
            "whole s": ".1f",
            "planted found": "",
            "holds": "",
        },
        [
            f"Random weights; alpha {ALPHA}. permuted: b is a with units permuted and noise of 30% of each tensor's",
            "spread; unrelated: b is drawn on its own. match: `match`, compiled, activations' similarities given;",
            "loop: the same descent in NumPy and SciPy in turn with it. statistics: activations' correlations of",
            f"{options.images} images of 32 x 32, forward passes included. whole: statistics and match; MuDSC's own",
            f"code takes {OFFICIAL} s on another machine of 2 cores (256 images): not measured in this run.",
            f"Limits: {LOOP_LIMIT:.0f} times the loop speed, {len(ALPHAS)} alphas at most {PATH_LIMIT:.0f} times one.",
        ],
    )
    table.start()
    model = jm.models.ResNet(config)
    x = jax.random.normal(jax.random.key(options.seed), (options.images, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x[:1])
    a, other = (_draw(shapes, options.seed + i) for i in (1, 2))
    spec = jm.align.symmetry(model.apply, a, x)
    planted = jm.align.random(spec, jax.random.key(options.seed))
    copy = _noisy(jm.align.permute(spec, planted, a), options.seed + 3)
    answer = jm.align.inverse(spec, planted)
    for name, b in {"permuted": copy, "unrelated": other}.items():
        table.add(pair=name, **_row(spec, model, a, b, x, answer, name == "permuted", options))
    yield table


def _row(
    spec: jm.align.PermutationSpec,
    model: Any,
    a: Any,
    b: Any,
    x: jax.Array,
    answer: jm.align.Permutations,
    planted: bool,
    options: Options,
) -> dict[str, Any]:
    def statistics() -> Any:
        return jm.align.activation_similarity(spec, model.apply, a, b, [x])

    data = jax.block_until_ready(statistics())
    gathering = Times(tuple(once(statistics) for _ in range(2)))
    names = [node.name for node in spec.free()]
    rng = np.random.default_rng(options.seed)
    order = [[names[i] for i in rng.permutation(len(names))] for _ in range(SWEEPS)]
    leaves_a, leaves_b = (
        {path: np.asarray(leaf) for path, leaf in flatten(tree)[0].items()} for tree in (a, b)
    )
    plain_data = {name: np.asarray(array) for name, array in data.items()}

    def compiled() -> Any:
        space = jm.align.dual_space(ALPHA)
        return jm.align.match(spec, a, b, space, similarities=data, order=order, sweeps=SWEEPS)

    def path() -> Any:
        shares = jnp.asarray(ALPHAS)
        return jm.align.match_path(spec, a, b, shares, similarities=data, order=order)

    started = time.perf_counter()
    found, info = jax.block_until_ready(compiled())
    first = time.perf_counter() - started
    jax.block_until_ready(path())
    seconds: dict[str, list[float]] = {"match": [], "loop": [], "path": []}
    for _ in range(options.runs):
        seconds["match"].append(once(compiled))
        seconds["path"].append(once(path))
        started = time.perf_counter()
        expected, sweeps = plain.match(spec, leaves_a, leaves_b, plain_data, ALPHA, order)
        seconds["loop"].append(time.perf_counter() - started)
    equal = all(np.array_equal(found[name], expected[name]) for name in names)
    times = {name: Times(tuple(values)) for name, values in seconds.items()}
    match = times["match"].median
    speedup, share = times["loop"].median / match, times["path"].median / match
    units = sum(spec.size(name) for name in names)
    right = sum(int(np.sum(np.asarray(found[name]) == answer[name])) for name in names)
    misses = [
        *([] if equal else [f"other permutations than the loop ({sweeps} sweeps)"]),
        *([] if speedup >= LOOP_LIMIT else [f"{speedup:.1f} times the loop's speed"]),
        *([] if share <= PATH_LIMIT else [f"the path takes {share:.1f} times one alpha"]),
        *([] if not planted or right == units else ["planted permutations missed"]),
    ]
    return {
        "first call s": first,
        "match s": times["match"].in_seconds(),
        "loop s": times["loop"].in_seconds(),
        "loop / match": speedup,
        "sweeps": int(info.sweeps),
        "permutations": "equal" if equal else "DIFFER",
        f"{len(ALPHAS)} alphas s": times["path"].in_seconds(),
        "path / match": share,
        "statistics s": gathering.in_seconds(),
        "whole s": gathering.median + match,
        "planted found": f"{right}/{units}" if planted else None,
        "holds": verdict(not misses, "; ".join(misses)),
    }


def _draw(shapes: Any, seed: int) -> Any:
    """Random weights of He's spread, norms around 1."""
    rng = np.random.default_rng(seed)
    leaves, definition = jax.tree.flatten_with_path(shapes)
    drawn = []
    for path, leaf in leaves:
        name = str(path[-1])
        noise = rng.standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) > 1:
            value = noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif "scale" in name or "var" in name:
            value = 1 + 0.1 * np.abs(noise)
        else:
            value = 0.1 * noise
        drawn.append(jnp.asarray(value, jnp.float32))
    return jax.tree.unflatten(definition, drawn)


def _noisy(params: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.std(leaf) * rng.standard_normal(leaf.shape, np.float32),
        params,
    )
