"""Runs a plan: merges tensor after tensor into files that stand beside their final names until all are whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxmerge.converters import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    TensorInfo,
    open_checkpoint,
    save_checkpoint,
)
from jaxmerge.converters.byte_io import as_bytes
from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.methods import merge
from jaxmerge.recipes import model_card, provenance, side_files
from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.inputs import read_whole
from jaxmerge.recipes.output import is_file
from jaxmerge.recipes.plan import Plan, PlannedInput, PlannedTensor, measures_whole_model
from jaxmerge.recipes.processes import ALONE, Processes
from jaxmerge.recipes.source_files import SourceHashes, check_unchanged
from jaxmerge.recipes.workplace import Workplace, journals, workplace
from jaxmerge.tree import Layout, TensorLayout

Progress = Callable[[str, int, int], None]
Format = Literal["safetensors", "torch"]

# The most bytes of tensors in one file of a folder, unless told otherwise: as mergekit has it.
SHARD_SIZE = 5_000_000_000
# Seconds between two looks at whether the sources are still what was planned.
_LOOK = 5.0
# Elements that are read back at once.
_BLOCK = 1 << 22


def run(
    plan: Plan,
    *,
    format: Format | None = None,
    shard_size: int | None = SHARD_SIZE,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Carries a plan out, or on: what an interrupted run of the same plan has finished is kept.

    Every source tensor is checked for NaN and infinity as it is read. Until the last tensor is
    written nothing stands under a final name. The result does not depend on how often the run was
    interrupted, nor on the number of processes.

    Args:
      plan: made by `make_plan` with an output.
      format: of the output; None: from the output's suffix, a folder being safetensors.
      shard_size: for a folder of safetensors, the most bytes of tensors in one file; a larger tensor
        gets a file of its own. None: one file.
      progress: called after each tensor with its name, the bytes written so far, and all bytes.
      processes: those that run the same plan together; each merges its share of the files.

    Returns:
      The output's path.

    Raises:
      PlanError: the plan has no output, a source has changed since, or another run is writing there.
      CheckpointError: a source is not finite or cannot be read, or the output cannot be written.
    """
    if plan.output is None:
        raise PlanError(["the plan has no output: give make_plan(..., out=...)"])
    if plan.done:
        return plan.output
    chosen = format or ("torch" if _has_torch_suffix(plan.output) else "safetensors")
    limit = shard_size if chosen == "safetensors" and not is_file(plan.output) else None
    head = {"fingerprint": plan.fingerprint, "format": chosen, "shard_size": limit}
    check_unchanged(plan)
    with processes.together():
        if processes.index:
            _agree(processes, head)
        with workplace(plan.output, head, plan.overwrite, processes.index) as place:
            if not processes.index:
                _agree(processes, head)
            if chosen == "torch":
                _write_torch(plan, place, progress, processes)
            else:
                _write_safetensors(plan, place, limit, progress, processes)
        processes.meet("the output is whole")
    return plan.output


def _agree(processes: Processes, head: Mapping[str, Any]) -> None:
    """Waits until the first process has made the place; all must be about to do the same."""
    first, *others = processes.meet(json.dumps(head))
    for number, other in enumerate(others, start=1):
        if other != first:
            raise PlanError(
                [
                    f"process {number} has another plan than process 0: recipe, options, versions, and "
                    "the sources' paths, sizes and times of change must be the same"
                ]
            )


def _write_safetensors(
    plan: Plan,
    place: Workplace,
    shard_size: int | None,
    progress: Progress | None,
    processes: Processes,
) -> None:
    """Writes this process's share of the files; the first process then completes the output."""
    donated, rank = _donated(plan)
    journal = place.journal
    _take_all(place)
    if _is_whole(plan, place):
        return
    with (
        _hashing(plan, place, processes) as hashes,
        CheckpointWriter(
            place.target,
            [TensorInfo.of(t.name, t.shape, t.dtype) for t in plan.tensors],
            metadata=donated | provenance.metadata(plan, {}),
            shard_size=shard_size,
            ties=plan.ties,
            finished=journal.tensors,
            share=(processes.index, processes.count),
        ) as writer,
    ):
        names = _pending(plan, writer, rank)
        written = [name for tied in names.values() for name in tied]
        steps = _Steps(plan, written, progress, processes)
        for piece in pieces(plan, [steps.tensors[name] for name in names]):
            for name in names[piece.name]:
                digest = writer.write_flat(name, piece.start, piece.values)
                if digest is not None:
                    journal.finish_tensor(name, digest)
            hashes.advance(steps.count(piece, len(names[piece.name])))
        hashes.finish()
        if processes.index:
            writer.close()
            processes.meet("all is merged")
            return
        processes.meet("all is merged")
        _take_all(place)
        journal.tensors.update(writer.finished)
        check_unchanged(plan)
        _write_beside(plan, place)
        writer.close(donated | provenance.metadata(plan, _by_file(place)))


def _write_torch(
    plan: Plan, place: Workplace, progress: Progress | None, processes: Processes
) -> None:
    """Writes one PyTorch file, which is a whole: from memory, by one process, and not to be gone on with."""
    if processes.index:
        return
    tensors = [tensor for tensor in plan.tensors if tensor.tied_to is None]
    steps = _Steps(plan, [tensor.name for tensor in tensors], progress, processes)
    values: dict[str, np.ndarray] = {}
    with _hashing(plan, place, ALONE) as hashes:
        for piece in pieces(plan, tensors):
            tensor = steps.tensors[piece.name]
            if piece.name not in values:
                values[piece.name] = np.empty(math.prod(tensor.shape), piece.values.dtype)
            values[piece.name][piece.start : piece.start + piece.values.size] = piece.values
            hashes.advance(steps.count(piece, 1))
        hashes.finish()
    check_unchanged(plan)
    _write_beside(plan, place)
    donor = plan.sources[0]
    save_checkpoint(
        place.target,
        {tensor.name: values[tensor.identity].reshape(tensor.shape) for tensor in plan.tensors},
        format="torch",
        ties=plan.ties,
        template=(donor.path, donor.key)
        if donor.format == "torch" and donor.path.is_file()
        else None,
    )


def _is_whole(plan: Plan, place: Workplace) -> bool:
    """Whether an earlier run was stopped after it had put the one file in place."""
    recorded = place.journal.tensors
    if not (is_file(place.output) and place.output.exists() and len(recorded) == len(plan.tensors)):
        return False
    try:
        with open_checkpoint(place.output) as checkpoint:
            return all(
                name in recorded and recorded[name] == _hash(checkpoint, name)
                for name in checkpoint.tensors
            )
    except CheckpointError:
        # Something else stands there, which is to be replaced.
        return False


def _hash(checkpoint: Checkpoint, name: str) -> str:
    digest, size = hashlib.sha256(), math.prod(checkpoint.info(name).shape)
    for start in range(0, size, _BLOCK):
        digest.update(as_bytes(checkpoint.read_flat(name, start, min(start + _BLOCK, size))))
    return digest.hexdigest()


def _hashing(plan: Plan, place: Workplace, processes: Processes) -> SourceHashes:
    mine = plan.sources[processes.index :: processes.count]
    journal = place.journal
    return SourceHashes([source.files for source in mine], journal.sources, journal.finish_source)


def _take_all(place: Workplace) -> None:
    """Takes over what other processes, of this run or of an earlier one, have finished."""
    for path in journals(place):
        if path != place.journal.path:
            place.journal.take(path)


def _by_file(place: Workplace) -> dict[str, str]:
    return {file: digest for (file, _, _), digest in place.journal.sources.items()}


def _donated(plan: Plan) -> tuple[dict[str, str], dict[str, int]]:
    """Returns the donor's metadata, and the place of each of its tensors on the disk."""
    donor = plan.sources[0]
    with open_checkpoint(donor.path, key=donor.key) as checkpoint:
        order = {name: place for place, name in enumerate(checkpoint.disk_order())}
        return {"format": "pt", **checkpoint.metadata}, order


def _pending(plan: Plan, writer: CheckpointWriter, rank: Mapping[str, int]) -> dict[str, list[str]]:
    """Returns what is still to be merged, with the names under which each tensor is still to be written.

    File after file, and within one in the order in which the donor has the tensors on the disk.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    files = {file: place for place, file in enumerate(writer.files)}

    def place(name: str) -> tuple[int, int]:
        first = tensors[name].inputs[0]
        return files[writer.tensors[name].file], rank.get(first.name, 0)

    names: dict[str, list[str]] = {}
    for name in sorted(writer.pending, key=place):
        names.setdefault(tensors[name].identity, []).append(name)
    return names


class _Steps:
    """Counts bytes, says so, and looks now and then whether sources and other processes are well."""

    def __init__(
        self,
        plan: Plan,
        names: Iterable[str],
        progress: Progress | None,
        processes: Processes,
    ) -> None:
        self.tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._plan = plan
        self._progress = progress
        self._processes = processes
        self._total = sum(tensor.nbytes for tensor in plan.tensors)
        self._ahead = sum(self.tensors[name].nbytes for name in names)
        self._began = self._ahead
        self._looked = time.monotonic()

    def count(self, piece: Piece, copies: int) -> float:
        """Counts a piece that was written under so many names; returns the share that is merged."""
        self._ahead -= piece.values.nbytes * copies
        if time.monotonic() - self._looked > _LOOK:
            check_unchanged(self._plan)
            self._processes.check()
            self._looked = time.monotonic()
        if self._progress is not None:
            self._progress(piece.name, self._total - self._ahead, self._total)
        return 1 - self._ahead / max(self._began, 1)


def _write_beside(plan: Plan, place: Workplace) -> None:
    """Writes all of a folder that is not weights."""
    if is_file(place.output):
        return
    side_files.write_side_files(plan, place.target)
    hashes = _by_file(place)
    provenance.write_record(plan, place.target, hashes, place.journal.tensors)
    copied = (plan.sources[0].path / model_card.CARD).exists()
    record = provenance.record(plan, hashes)
    model_card.write_card(place.target, record, place.output.name, copied=copied)


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


class Piece(NamedTuple):
    """Successive elements of one tensor of the output, flat and in its dtype."""

    name: str
    start: int
    values: np.ndarray
    last: bool


def pieces(plan: Plan, tensors: Sequence[PlannedTensor]) -> Iterator[Piece]:
    """Merges tensors in the order given."""
    at_once = any(map(measures_whole_model, plan.merges))
    merged = _merge_in_memory(plan, tensors) if at_once else _merge_by_tensor(plan, tensors)
    for name, array in merged:
        yield Piece(name, 0, array.reshape(-1), True)


def _merge_in_memory(
    plan: Plan, tensors: Sequence[PlannedTensor]
) -> Iterator[tuple[str, np.ndarray]]:
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
    for tensor in tensors:
        yield tensor.name, _stored(merged[tensor.tied_to or tensor.name], tensor)


def _merge_by_tensor(
    plan: Plan, tensors: Sequence[PlannedTensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """One tensor at a time; memory holds one tensor of every source."""
    key = jax.random.key(plan.seed)
    with _open_all(plan) as checkpoints:

        def read(one: PlannedInput) -> np.ndarray:
            return read_whole(checkpoints, plan, one)

        for tensor in tensors:
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


def _has_torch_suffix(output: Path) -> bool:
    return is_file(output) and output.suffix != ".safetensors"
