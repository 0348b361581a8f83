"""Adapters out of fine-tuned models: the best low-rank approximation of what training changed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.converters import dtypes
from jaxmerge.converters.checkpoint import open_checkpoint
from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.lora.adapter import LoraAdapter
from jaxmerge.converters.lora.factors import Kind, LowRank, check_rank, factorise
from jaxmerge.converters.quantised import refuse_quantised
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.tensor_info import TensorInfo

Model = str | os.PathLike[str] | Mapping[str, Any]
Progress = Callable[[int, int], None]

# What PEFT leaves alone unless told otherwise: tables of embeddings and what turns features into answers.
_ENDS = re.compile(
    r"(^|\.)(embed_tokens|embed_positions|wte|wpe|shared|\w*embeddings?(\.\w+)?|tok_embeddings"
    r"|lm_head|classifier|score|qa_outputs|head|fc_out)\.weight$"
)
# Their layers are stored [in, out].
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class Extraction:
    """What was extracted, and how much of the fine-tuning it holds.

    Attributes:
      adapter: the adapter.
      kept: tensor's name -> (rank, share of the squared norm of the task vector that the factors hold).
      left_out: names of tensors that the fine-tuning changed and the adapter does not: embeddings, heads, norms,
        biases, unless asked for.
      energy: share of the squared norm of all floating-point tensors' task vectors that the adapter holds.
    """

    adapter: LoraAdapter
    kept: Mapping[str, tuple[int, float]]
    left_out: tuple[str, ...]
    energy: float


def extract_lora(
    model: Model,
    base: Model,
    *,
    rank: int | None = None,
    energy: float | None = None,
    whole: bool = False,
    key: jax.Array | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Extracts a LoRA adapter from a fine-tuned model, tensor by tensor.

    Every changed matrix (the weight of a linear layer or of a convolution) gets the best factors of its task vector:
    by a full SVD where it is small, by a randomised one where it is large. Of checkpoints only one tensor of each is in
    memory at a time, beside the factors.

    Args:
      model: the fine-tuned model: a checkpoint's path, or a flat dict of tensors.
      base: what it was tuned from, likewise.
      rank: of the factors.
      energy: the least share of each task vector's squared norm to keep, in (0, 1]; with `rank` too, that is the most.
      whole: whether changed embeddings, heads, norms and biases are kept whole, as PEFT's modules_to_save.
      key: draws the subspaces of randomised SVDs; None: `jax.random.key(0)`.
      progress: called with the bytes done, and all bytes.

    Returns:
      The adapter and what it holds.

    Raises:
      CheckpointError: tensors that only one of them has, other shapes, quantised models, or no difference.
      ValueError: neither rank nor energy, or out of bounds.

    Example:
      >>> base = {"fc.weight": np.eye(4, dtype=np.float32), "fc.bias": np.zeros(4, np.float32)}
      >>> tuned = {**base, "fc.weight": base["fc.weight"] + 1}
      >>> found = extract_lora(tuned, base, rank=1)
      >>> found.kept["fc.weight"][0], round(found.energy, 3)
      (1, 1.0)
    """
    check_rank(rank, energy)
    key = jax.random.key(0) if key is None else key
    with ExitStack() as stack:
        tuned, before = (stack.enter_context(_opened(one)) for one in (model, base))
        names = _common(tuned, before)
        transposed = before.config.get("model_type") in _CONV1D
        updates: dict[str, LowRank] = {}
        replaced: dict[str, jax.Array] = {}
        kept: dict[str, tuple[int, float]] = {}
        left_out: list[str] = []
        total = held = 0.0
        done, all_bytes = 0, sum(tuned.tensors[name].nbytes for name in names)
        for i, name in enumerate(names):
            new, old = tuned.read(name), before.read(name)
            delta = new.astype(np.float32) - old.astype(np.float32)
            size = float(np.vdot(delta, delta))
            if not math.isfinite(size):
                raise CheckpointError(
                    f"{tuned.path}: tensor {name!r}: its task vector is not finite"
                )
            if size > 0:
                share = 0.0
                kind = _kind(name, delta.shape, transposed)
                if kind is not None:
                    update = factorise(
                        delta, rank=rank, energy=energy, kind=kind, key=jax.random.fold_in(key, i)
                    )
                    updates[name] = update
                    share = float(np.sum(np.square(_singular_values(update)))) / size
                    kept[name] = (update.rank, min(share, 1.0))
                elif whole:
                    replaced[name], share = jnp.asarray(new), 1.0
                else:
                    left_out.append(name)
                total, held = total + size, held + min(share, 1.0) * size
            done += tuned.tensors[name].nbytes
            if progress is not None:
                progress(done, all_bytes)
        if not updates and not replaced:
            raise CheckpointError(
                f"{tuned.path}: nothing to extract: "
                + (f"only {', '.join(left_out[:5])} differ" if left_out else "equal to the base")
            )
        adapter = LoraAdapter(
            updates, replaced, base_model=before.named, task_type=_task(before.config)
        )
    return Extraction(adapter, kept, tuple(left_out), held / total)


@dataclass(frozen=True)
class _Opened:
    path: str
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any]
    tied: frozenset[str]
    named: str | None


@contextmanager
def _opened(model: Model) -> Iterator[_Opened]:
    if isinstance(model, Mapping):
        arrays = {name: np.asarray(array) for name, array in model.items()}
        infos = {n: TensorInfo.of(n, a.shape, a.dtype) for n, a in arrays.items()}
        yield _Opened("the model", infos, arrays.__getitem__, {}, frozenset(), None)
        return
    path = os.fspath(model)
    with open_checkpoint(path) as checkpoint:
        config = _config(path, checkpoint)
        refuse_quantised(checkpoint.tensors, config, where=path)
        tied = frozenset(name for group in checkpoint.ties for name in group[1:])
        name = config.get("_name_or_path") or path
        yield _Opened(path, checkpoint.tensors, checkpoint.read, config, tied, str(name))


def _config(path: str, checkpoint: Checkpoint) -> Mapping[str, Any]:
    if checkpoint.config is not None:
        return checkpoint.config
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _common(tuned: _Opened, before: _Opened) -> list[str]:
    """The floating-point tensors of both, tied ones once."""
    problems = []
    for one, lacking in ((tuned, before), (before, tuned)):
        for name in one.tensors:
            if name not in lacking.tensors and name not in one.tied:
                problems.append(
                    f"{lacking.path}: no tensor {name!r}, which {one.path} has."
                    f"{nearest(name, lacking.tensors)}"
                )
    names = []
    for name, info in tuned.tensors.items():
        other = before.tensors.get(name)
        if other is None or not dtypes.is_floating(info.dtype) or name in tuned.tied:
            continue
        if info.shape != other.shape:
            problems.append(
                f"{tuned.path}: tensor {name!r}: expected shape {list(other.shape)} as in {before.path}, "
                f"found {list(info.shape)}"
            )
        names.append(name)
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError("\n  ".join(problems[:5]) + more)
    return names


def _kind(name: str, shape: tuple[int, ...], transposed: bool) -> Kind | None:
    """What PEFT would adapt there, or None: not the weight of a linear layer or of a plain convolution."""
    if not name.endswith(".weight") or len(shape) not in (2, 4) or _ENDS.search(name):
        return None
    # One input per output: a depthwise convolution, whose window is all that it has.
    if min(shape[:2]) < 2:
        return None
    return "transposed" if transposed and len(shape) == 2 else "linear"


def _singular_values(update: LowRank) -> np.ndarray:
    """Those of factors that `factorise` made: each carries their square roots."""
    return np.sum(np.square(np.asarray(update.left, np.float64)), axis=0)


def _task(config: Mapping[str, Any]) -> str | None:
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)
