"""Times a decoder's forward pass, compilation and generation, beside transformers in PyTorch.

    python benchmarks/decoder.py [--layers 30] [--batch 8] [--length 128] [--new-tokens 32] [--runs N] [--seed N]
                                 [--json OUT]

The decoder has the shapes of SmolLM2-135M (width 576, 9 heads, 3 of keys and values, MLP 1536, 49,152 tokens, tied) and
random weights in float32, the same in both. The last lines say what misses its limit, and so does the exit status: it
is 1.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import torch
import transformers
from clock import in_turn, once
from machine import describe, headline
from report import Report, Table

from jaxmerge.converters import load_model, stack_model
from jaxmerge.models import Decoder, generate

MOST_TIMES, MOST_SECONDS, MOST_DIFFERENCE = 1.5, 20.0, 1e-5


@dataclass(frozen=True)
class Form:
    """The model in one of its two forms."""

    apply_fn: Callable[[Any, Any], jax.Array]
    params: Any
    model: Decoder


def reference(layers: int, seed: int) -> Any:
    """A model of transformers with random weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def forms(model: Any) -> dict[str, Form]:
    """The same weights with a subtree per layer, and with all layers stacked."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        apply_fn, params, config = load_model(folder)
    together, stacked, described = stack_model(params, config)
    return {
        "a subtree per layer": Form(apply_fn, params, Decoder(config.model)),
        "layers stacked": Form(together, stacked, Decoder(described.model)),
    }


def compiled(found: dict[str, Form], tokens: np.ndarray) -> tuple[dict[str, Any], Table]:
    """Compiles each form's forward pass."""
    table = Table(
        f"compiling a forward pass of {tokens.shape[0]} x {tokens.shape[1]} tokens",
        {"form": "", "trace s": ".2f", "compile s": ".2f", "holds": ""},
        [f"Limit: {MOST_SECONDS:g} s for both together, where there are no more than 30 layers."],
    )
    table.start()
    programs = {}
    for name, form in found.items():
        jax.clear_caches()
        began = time.perf_counter()
        lowered = jax.jit(form.apply_fn).lower(form.params, tokens)
        traced = time.perf_counter()
        programs[name] = lowered.compile()
        done = time.perf_counter()
        holds = done - began <= MOST_SECONDS
        table.add(
            form=name,
            **{"trace s": traced - began, "compile s": done - traced},
            holds="yes" if holds else f"no: {done - began:.1f} s, limit {MOST_SECONDS:g}",
        )
    return programs, table


def forward(
    model: Any, found: dict[str, Form], programs: dict[str, Any], tokens: np.ndarray, runs: int
) -> Table:
    """Times each form beside PyTorch."""
    table = Table(
        f"a forward pass of {tokens.shape[0]} x {tokens.shape[1]} tokens, all logits",
        {"route": "", "ms": ".0f", "over PyTorch": ".2f", "difference": ".1e", "holds": ""},
        [
            f"Limit: {MOST_TIMES:g} times PyTorch's on the CPU.",
            f"Difference: the largest of the logits, relative to the largest logit, at most {MOST_DIFFERENCE:g}.",
        ],
    )
    table.start()
    ids = torch.from_numpy(tokens)

    def peer() -> torch.Tensor:
        with torch.inference_mode():
            return model(ids, use_cache=False).logits

    expected = peer().numpy()
    routes = {"transformers": peer} | {
        name: lambda program=program, form=found[name]: program(form.params, tokens)
        for name, program in programs.items()
    }
    times = in_turn(routes, runs)
    table.add(route="transformers", ms=times["transformers"].milliseconds())
    for name, program in programs.items():
        logits = np.asarray(program(found[name].params, tokens))
        difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
        ratio = times[name].median / times["transformers"].median
        holds = ratio <= MOST_TIMES and difference <= MOST_DIFFERENCE
        table.add(
            route=name,
            ms=times[name].milliseconds(),
            **{"over PyTorch": ratio, "difference": difference},
            holds="yes" if holds else f"no: {ratio:.2f} times, difference {difference:.1e}",
        )
    return table


def generation(
    model: Any, found: dict[str, Form], tokens: np.ndarray, new_tokens: int, runs: int
) -> Table:
    """Times greedy generation beside PyTorch."""
    table = Table(
        f"greedy generation of {new_tokens} tokens after {tokens.shape[0]} x {tokens.shape[1]}",
        {
            "route": "",
            "first call s": ".1f",
            "ms": ".0f",
            "over PyTorch": ".2f",
            "as PyTorch": ".0%",
        },
        ["With a cache of keys and values in all. As PyTorch: the share of equal tokens."],
    )
    table.start()
    ids = torch.from_numpy(tokens)

    def peer() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
            )[:, ids.shape[1] :]

    routes = {"transformers": peer} | {
        name: lambda form=form: generate(form.model, form.params, tokens, new_tokens=new_tokens)
        for name, form in found.items()
    }
    first = {name: once(route) for name, route in routes.items()}
    times = in_turn(routes, runs)
    expected = peer().numpy()
    for name, route in routes.items():
        table.add(
            route=name,
            **{"first call s": first[name]},
            ms=times[name].milliseconds(),
            **{
                "over PyTorch": times[name].median / times["transformers"].median,
                "as PyTorch": float(np.mean(np.asarray(route()) == expected)),
            },
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("decoder", __doc__.splitlines()[0], describe(), arguments.seed)
    print(
        f"{headline(report.machine)}; seed {arguments.seed}; transformers {transformers.__version__}"
    )
    model = reference(arguments.layers, arguments.seed)
    found = forms(model)
    shape = (arguments.batch, arguments.length)
    tokens = np.random.default_rng(arguments.seed).integers(3, 49152, shape)
    programs, table = compiled(found, tokens)
    report.tables.append(table)
    report.tables.append(forward(model, found, programs, tokens, arguments.runs))
    del programs
    prompts, runs = tokens[:, : arguments.length // 4], max(arguments.runs // 2, 1)
    report.tables.append(generation(model, found, prompts, arguments.new_tokens, runs))
    report.write(arguments.json)
    missed = report.missed()
    print(f"\n{len(missed)} rows miss their limit" + "".join(f"\n  {line}" for line in missed))
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
