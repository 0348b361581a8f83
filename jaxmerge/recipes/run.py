"""Runs a plan: reads the sources tensor by tensor, merges, and writes the output beside its final name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxmerge.converters import (
    Checkpoint,
    CheckpointWriter,
    TensorInfo,
    open_checkpoint,
    save_checkpoint,
)
from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.methods import merge
from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.inputs import read_whole
from jaxmerge.recipes.output import UNFINISHED, is_file, mark_unfinished, unmark
from jaxmerge.recipes.plan import Plan, PlannedInput, PlannedTensor, measures_whole_model
from jaxmerge.recipes.provenance import write_provenance
from jaxmerge.tree import Layout, TensorLayout

Progress = Callable[[str, int, int], None]
Format = Literal["safetensors", "torch"]


def run(plan: Plan, *, format: Format | None = None, progress: Progress | None = None) -> Path:
    """Carries a plan out.

    Every source tensor is checked for NaN and infinity as it is read. Until the last tensor is written nothing stands
    under a final name; an error removes what was begun.

    Args:
      plan: made by `make_plan` with an output.
      format: of the output; None: from the output's suffix, a folder being safetensors.
      progress: called after each tensor with its name, the bytes written so far, and all bytes.

    Returns:
      The output's path.

    Raises:
      PlanError: the plan has no output, or a source has changed since.
      CheckpointError: a source is not finite or cannot be read, or the output cannot be written.
    """
    if plan.output is None:
        raise PlanError(["the plan has no output: give make_plan(..., out=...)"])
    _check_unchanged(plan)
    with _output(plan) as target:
        at_once = any(map(measures_whole_model, plan.merges))
        merged = _merge_in_memory(plan) if at_once else _merge_by_tensor(plan)
        _write(plan, target, _reported(merged, plan, progress), format)
        if not is_file(plan.output):
            _copy_side_files(plan, target)
            write_provenance(plan, target)
    return plan.output


def load_sources(plan: Plan) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray] | None]:
    """Loads the plan's models and base into memory, each checkpoint once.

    Returns:
      The models' tensors by name, in order, and the base's (or None).

    Raises:
      CheckpointError: a tensor holds NaN or infinity, or cannot be read.
    """
    loaded: dict[PlannedInput, np.ndarray] = {}
    with _open_all(plan) as checkpoints:
        for one in (one for tensor in plan.tensors for one in tensor.inputs):
            if one not in loaded:
                loaded[one] = read_whole(checkpoints, plan, one)
    models = [
        {t.name: loaded[t.models[0 if t.action == "carry" else i]] for t in plan.tensors}
        for i in range(len(plan.models))
    ]
    base = {t.name: loaded[t.base or t.models[0]] for t in plan.tensors}
    return models, None if plan.base is None else base


def _merge_in_memory(plan: Plan) -> Iterator[tuple[str, np.ndarray]]:
    """For methods that measure the whole model before they write a tensor."""
    models, base = load_sources(plan)
    untied = [tensor.name for tensor in plan.tensors if tensor.tied_to is None]
    hyperparameters: dict[str, Any] = dict(plan.resolved.hyperparameters)
    method = plan.resolved.method
    with _wide_enough(plan.tensors):
        merged = merge(
            method,
            [{name: model[name] for name in untied} for model in models],
            base=None if base is None else {name: base[name] for name in untied},
            key=jax.random.key(plan.seed),
            dtype=plan.resolved.written_dtype,
            **hyperparameters,
        )
    merged = method.params_of(merged)
    for tensor in plan.tensors:
        yield tensor.name, _stored(merged[tensor.tied_to or tensor.name], tensor)


def _merge_by_tensor(plan: Plan) -> Iterator[tuple[str, np.ndarray]]:
    """One tensor at a time; memory holds one tensor of every source."""
    key = jax.random.key(plan.seed)
    with _open_all(plan) as checkpoints:

        def read(one: PlannedInput) -> np.ndarray:
            return read_whole(checkpoints, plan, one)

        for tensor in plan.tensors:
            if tensor.action == "carry":
                yield tensor.name, read(tensor.models[0])
                continue
            # A tied name has the values of the name that it is tied to, and so its identity.
            name = tensor.identity
            method = plan.merges[tensor.merge].method
            hyperparameters: dict[str, Any] = dict(tensor.hyperparameters)
            with _wide_enough([tensor]):
                merged = merge(
                    method,
                    [{name: read(model)} for model in tensor.models],
                    base=None if tensor.base is None else {name: read(tensor.base)},
                    key=key,
                    layout=Layout({name: TensorLayout((name,), depths=(tensor.depth,))}),
                    dtype=storage_dtype(tensor.dtype),
                    **hyperparameters,
                )
            merged = method.params_of(merged)
            yield tensor.name, _stored(merged[name], tensor)


def _wide_enough(tensors: Iterable[PlannedTensor]) -> contextlib.AbstractContextManager[Any]:
    """Float64 tensors are merged in float64."""
    wide = any(one.dtype == "float64" for tensor in tensors for one in tensor.inputs)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


@contextlib.contextmanager
def _open_all(plan: Plan) -> Iterator[list[Checkpoint]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(open_checkpoint(source.path, key=source.key))
            for source in plan.sources
        ]


def _stored(merged: Any, tensor: PlannedTensor) -> np.ndarray:
    array = np.asarray(merged)
    return array if array.dtype.name == tensor.dtype else array.astype(storage_dtype(tensor.dtype))


def _reported(
    merged: Iterator[tuple[str, np.ndarray]], plan: Plan, progress: Progress | None
) -> Iterator[tuple[str, np.ndarray]]:
    done, total = 0, sum(tensor.nbytes for tensor in plan.tensors)
    for name, array in merged:
        yield name, array
        done += array.nbytes
        if progress is not None:
            progress(name, done, total)


def _write(
    plan: Plan, target: Path, merged: Iterator[tuple[str, np.ndarray]], format: Format | None
) -> None:
    donor = plan.sources[0]
    chosen = format or ("torch" if _has_torch_suffix(target) else "safetensors")
    if chosen == "torch":
        template = (donor.path, donor.key) if _is_single_torch_file(plan) else None
        tensors = dict(merged)
        save_checkpoint(target, tensors, format="torch", ties=plan.ties, template=template)
        return
    infos = [TensorInfo.of(t.name, t.shape, t.dtype) for t in plan.tensors]
    with open_checkpoint(donor.path, key=donor.key) as checkpoint:
        metadata = {"format": "pt", **checkpoint.metadata}
    with CheckpointWriter(target, infos, metadata=metadata, ties=plan.ties) as writer:
        for name, array in merged:
            writer.write(name, array)


def _has_torch_suffix(target: Path) -> bool:
    return is_file(target) and target.suffix != ".safetensors"


def _is_single_torch_file(plan: Plan) -> bool:
    return plan.sources[0].format == "torch" and plan.sources[0].path.is_file()


def _check_unchanged(plan: Plan) -> None:
    problems = []
    for source in plan.sources:
        for file, size, changed in source.files:
            try:
                stat = os.stat(file)
            except OSError as error:
                problems.append(f"{file}: cannot be read any more ({error.strerror})")
                continue
            if (stat.st_size, stat.st_mtime_ns) != (size, changed):
                problems.append(f"{file}: has changed since the plan was made; plan again")
    if problems:
        raise PlanError(problems)


@contextlib.contextmanager
def _output(plan: Plan) -> Iterator[Path]:
    """Gives the place to write to, and makes it the output at the end, or removes what was begun.

    A new folder is written in place under a marker that says unfinished. A folder that is to be replaced stays whole
    until the new one is.
    """
    output = plan.output
    assert output is not None
    if is_file(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        yield output
        return
    replaces = output.is_dir() and any(output.iterdir()) and not plan.resumes
    target = output.with_name(f".{output.name}.partial") if replaces else output
    made = not target.is_dir()
    if not made:
        _clear(target)
    target.mkdir(parents=True, exist_ok=True)
    mark_unfinished(target, plan.fingerprint)
    try:
        yield target
    except BaseException:
        _clear(target)
        if made:
            target.rmdir()
        raise
    unmark(target)
    if replaces:
        old = output.with_name(f".{output.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        target.rename(output)
        shutil.rmtree(old)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _copy_side_files(plan: Plan, target: Path) -> None:
    """Everything of the donor's folder that is not weights: config, tokenizer, model card's assets."""
    folder = plan.sources[0].path
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and not _is_weights(file) and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _is_weights(file: Path) -> bool:
    weights: Mapping[str, None] = dict.fromkeys(
        (
            ".safetensors",
            ".bin",
            ".pt",
            ".pth",
            ".tar",
            ".ckpt",
            ".gguf",
            ".h5",
            ".msgpack",
            ".onnx",
        )
    )
    return file.suffix in weights or file.name.endswith(".index.json") or file.name in GENERATED


# Written anew by every merge, never copied from a source.
GENERATED = ("jaxmerge.json", "recipe.yaml", UNFINISHED)
