"""Candidates per second: a search in one program, a Python loop, and cycles that write and load every candidate."""

import functools
import itertools
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clock import in_turn
from report import Table

import jaxmerge as jm
from jaxmerge.converters import load_model
from jaxmerge.evaluation import cross_entropy, score_next_tokens
from jaxmerge.search import Space, evolve, space_of, strategy
from search_sections import Options, peer, verdict

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")
SIZES = (128, 256, 224, 32)
EXAMPLES, POPULATION, GENERATIONS = 32, 64, 32
LOOPED, CYCLES = 256, 10
RUNS = 3
ABOVE_LOOP, ABOVE_LOOP_ACCELERATED, ABOVE_CYCLE = 2.5, 20, 200
CURVE = (1, 4, 16, 64, 256, 1024, 4096)
# A decoder of about 100,000 parameters, and the length of its examples.
DECODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LENGTH = 8


def run(options: Options) -> Iterator[Table]:
    yield _loop(options)
    yield _curve(options)
    yield _cycles(options)


def _loop(options: Options) -> Table:
    accelerated = jax.default_backend() != "cpu"
    population = 1024 if accelerated else POPULATION
    limit = ABOVE_LOOP_ACCELERATED if accelerated else ABOVE_LOOP
    base, tuned, examples = _networks(options.seed)
    table = Table(
        "A search beside a loop of the same jitted functions",
        {
            "method": "",
            "search /s": ".0f",
            "spread /s": ".0f",
            "loop /s": ".0f",
            "times": ".2f",
            "holds": "",
        },
        [
            f"Candidates per second; a network of {_count(base)} parameters, {EXAMPLES} examples, a population of "
            f"{population}, SNES.",
            "search: jm.search.evolve, called a second time, all of the call. spread: the same, over a mesh of a",
            "device for each core. loop: ask and tell jitted; then for each candidate a jitted merge, a jitted",
            f"evaluation and a number read. times: the faster search beside the loop. Limit: {limit} times.",
        ],
    )
    table.start()
    for name in METHODS:
        method = jm.methods.get(name)()
        state = method.init(tuned, None if method.base == "unused" else base)
        made = space_of(method, models=2)
        objective = functools.partial(_objective, method)
        arguments: dict[str, Any] = {
            "strategy": "snes",
            "population": population,
            "generations": GENERATIONS,
            "args": (state, examples),
            "key": jax.random.key(options.seed),
        }
        mesh = jax.make_mesh(
            (jax.device_count(),), ("population",), axis_types=(jax.sharding.AxisType.Auto,)
        )
        routes = {
            "search": functools.partial(_searched, objective, made, arguments),
            "spread": functools.partial(_searched, objective, made, arguments | {"mesh": mesh}),
            "loop": _looped(method, made, state, examples, population, options.seed),
        }
        times = in_turn(routes, RUNS)
        alone, spread = (
            population * GENERATIONS / times[route].median for route in ("search", "spread")
        )
        theirs = LOOPED / times["loop"].median
        ours = max(alone, spread)
        table.add(
            **{"search /s": alone, "spread /s": spread, "loop /s": theirs},
            method=name,
            times=ours / theirs,
            holds=verdict(ours >= limit * theirs, f"below {limit}"),
        )
    return table


def _curve(options: Options) -> Table:
    base, tuned, examples = _networks(options.seed)
    method = jm.methods.ties()
    state = method.init(tuned, base)
    made = space_of(method, models=2)
    objective = functools.partial(_objective, method)
    table = Table(
        "Candidates per second over the population's size",
        {"population": "d", "chunk": "d", "/s": ".0f", "us each": ".1f"},
        ["TIES, the network of the table before, random search; until one generation takes 4,096."],
    )
    table.start()
    for population in CURVE:
        arguments: dict[str, Any] = {
            "strategy": "random",
            "population": population,
            "generations": max(2, 2048 // population),
            "args": (state, examples),
            "key": jax.random.key(options.seed),
        }
        result = evolve(objective, made, **arguments)
        routes = {"search": functools.partial(_searched, objective, made, arguments)}
        seconds = in_turn(routes, 3)["search"].median
        rate = result.evaluations / seconds
        table.add(**{"/s": rate, "us each": 1e6 / rate}, population=population, chunk=result.chunk)
    return table


def _cycles(options: Options) -> Table:
    transformers, torch = peer("transformers"), peer("torch")
    table = Table(
        "A search beside cycles that write and load every candidate",
        {
            "route": "",
            "/s": ".1f",
            "ms each": ".3f",
            "times": ".0f",
            "largest error": ".1e",
            "holds": "",
        },
        [
            f"A decoder of transformers (Llama), {EXAMPLES} examples of {LENGTH} tokens, task arithmetic of two",
            "models. torch: merged in PyTorch, written as safetensors, loaded by transformers, evaluated. mergekit:",
            "the same by its run_merge, in one process that has imported everything (given by --mergekit). error:",
            f"of the losses of the same candidates. Limit: the search is {ABOVE_CYCLE} times as fast as each.",
        ],
    )
    table.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(options.seed)
        config = transformers.LlamaConfig(**DECODER)
        for one in ("base", "a", "b"):
            transformers.LlamaForCausalLM(config).save_pretrained(folder / one)
        rng = np.random.default_rng(options.seed)
        tokens = rng.integers(0, DECODER["vocab_size"], (EXAMPLES, LENGTH))
        np.save(folder / "tokens.npy", tokens)
        weights = rng.uniform(0, 1, (CYCLES, 2)).round(6)
        np.save(folder / "weights.npy", weights)
        ours, losses, count = _decoder_search(folder, tokens, weights, options)
        table.add(
            **{"/s": ours, "ms each": 1e3 / ours},
            route=f"search, {count} parameters, {POPULATION} at once",
        )
        cycles = {"torch": functools.partial(_torch_cycle, transformers, torch, folder)}
        if options.mergekit is not None:
            cycles["mergekit"] = functools.partial(_mergekit_cycle, options.mergekit, folder)
        for route, cycle in cycles.items():
            seconds, found = cycle(weights)
            error = float(np.max(np.abs(np.array(found) - losses)))
            table.add(
                **{"/s": 1 / seconds, "ms each": 1e3 * seconds, "largest error": error},
                route=route,
                times=ours * seconds,
                holds=verdict(ours * seconds >= ABOVE_CYCLE, f"below {ABOVE_CYCLE}"),
            )
    return table


def _decoder_search(
    folder: Path, tokens: np.ndarray, weights: np.ndarray, options: Options
) -> tuple[float, np.ndarray, int]:
    """Candidates per second, the losses at given weights, and the model's size."""
    apply_fn, base, config = load_model(folder / "base")
    models = [load_model(folder / one)[1] for one in ("a", "b")]
    method = jm.methods.task_arithmetic()
    state = method.init(models, base, layout=config.layout)
    made = space_of(method, models=2, only=["weight"])

    def loss(point: Any, key: jax.Array, state: Any, tokens: jax.Array) -> jax.Array:
        logits = apply_fn(method.apply(state, point), tokens)
        return cross_entropy(score_next_tokens(logits, tokens))

    arguments: dict[str, Any] = {
        "strategy": "snes",
        "population": POPULATION,
        "generations": GENERATIONS,
        "args": (state, jnp.asarray(tokens)),
        "key": jax.random.key(options.seed),
    }
    evolve(loss, made, **arguments)
    times = in_turn({"search": functools.partial(_searched, loss, made, arguments)}, RUNS)
    key = jax.random.key(0)
    single = jax.jit(loss)
    losses = [float(single({"weight": w}, key, state, jnp.asarray(tokens))) for w in weights]
    return POPULATION * GENERATIONS / times["search"].median, np.array(losses), _count(base)


def _torch_cycle(
    transformers: Any, torch: Any, folder: Path, weights: np.ndarray
) -> tuple[float, list[float]]:
    from safetensors.torch import load_file, save_file

    states = [load_file(folder / one / "model.safetensors") for one in ("base", "a", "b")]
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    out = folder / "by-torch"
    out.mkdir()
    (out / "config.json").write_text((folder / "base" / "config.json").read_text())
    seconds, losses = [], []
    base, *models = states
    for row in [weights[0], *weights]:
        started = time.perf_counter()
        merged = {
            name: x + sum(float(w) * (m[name] - x) for w, m in zip(row, models, strict=True))
            for name, x in base.items()
        }
        save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            losses.append(float(model(tokens, labels=tokens).loss))
        seconds.append(time.perf_counter() - started)
    # The first one warms up.
    return float(np.median(seconds[1:])), losses[1:]


_PEER = """
import json, sys, time
import numpy as np, torch, transformers, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

transformers.utils.logging.disable_progress_bar()
folder = sys.argv[1]
weights = np.load(folder + "/weights.npy")
tokens = torch.from_numpy(np.load(folder + "/tokens.npy"))
found = []
for row in [weights[0], *weights]:
    started = time.perf_counter()
    models = [{"model": folder + "/" + n, "parameters": {"weight": float(w)}} for n, w in zip("ab", row)]
    config = {"merge_method": "task_arithmetic", "base_model": folder + "/base", "models": models,
              "parameters": {"normalize": False}}
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), folder + "/by-mergekit", options)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/by-mergekit")
    with torch.no_grad():
        loss = float(model(tokens, labels=tokens).loss)
    found.append([time.perf_counter() - started, loss])
print(json.dumps(found[1:]))
"""


def _mergekit_cycle(
    executable: str, folder: Path, weights: np.ndarray
) -> tuple[float, list[float]]:
    python = Path(executable).parent / "python"
    done = subprocess.run(
        [python, "-c", _PEER, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"mergekit failed:\n{done.stderr[-2000:]}")
    seconds, losses = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    return float(np.median(seconds)), list(losses)


def _objective(
    method: Any, point: Any, key: jax.Array, state: Any, examples: jax.Array
) -> jax.Array:
    return _evaluate(method.apply(state, point, key if method.random else None), examples)


def _evaluate(params: Any, examples: jax.Array) -> jax.Array:
    """How unsure the network is of its answers."""
    x = examples
    for i in range(len(SIZES) - 1):
        x = (jax.nn.relu(x) if i else x) @ params[f"layer_{i}"]
    return -jnp.mean(jnp.max(jax.nn.log_softmax(x), axis=-1))


def _searched(objective: Any, made: Space, arguments: dict[str, Any]) -> np.ndarray:
    return evolve(objective, made, **arguments).genome


def _looped(
    method: Any, made: Space, state: Any, examples: jax.Array, population: int, seed: int
) -> Callable[[], Any]:
    """One at a time, as it is written without a compiled search."""
    who = strategy("snes", population, made)
    ask, tell, decode = jax.jit(who.ask), jax.jit(who.tell), jax.jit(made.decode)
    merge, evaluate = jax.jit(method.apply), jax.jit(_evaluate)
    params = who.default_params

    def loop() -> jax.Array:
        key = jax.random.key(seed)
        own = who.init(key, made.initial_genome(), params)
        for generation in range(max(1, LOOPED // population)):
            one, two, three = jax.random.split(jax.random.fold_in(key, generation), 3)
            genomes, own = ask(one, own, params)
            random = three if method.random else None
            fitness = [
                float(evaluate(merge(state, decode(genome), random), examples))
                for genome in itertools.islice(genomes, LOOPED)
            ]
            filled = jnp.asarray(fitness + [0.0] * (population - len(fitness)))
            own, _ = tell(two, genomes, filled, own, params)
        return own["own"].mean

    return loop


def _networks(seed: int) -> tuple[Any, list[Any], jax.Array]:
    rng = np.random.default_rng(seed)

    def network() -> dict[str, jax.Array]:
        return {
            f"layer_{i}": jnp.asarray(rng.standard_normal((m, n), np.float32) / math.sqrt(m))
            for i, (m, n) in enumerate(itertools.pairwise(SIZES))
        }

    base = network()
    tuned = [jax.tree.map(lambda x, d: x + 0.1 * d, base, network()) for _ in range(2)]
    return base, tuned, jnp.asarray(rng.standard_normal((EXAMPLES, SIZES[0]), np.float32))


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
