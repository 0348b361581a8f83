"""Runs a plan: merges tensor after tensor into files that stand beside their final names until all are whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

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
from jaxmerge.recipes import model_card, provenance, side_files
from jaxmerge.recipes.aligning import aligned
from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.inputs import read_whole
from jaxmerge.recipes.output import is_file, journal_of
from jaxmerge.recipes.plan import Plan, PlannedInput
from jaxmerge.recipes.processes import ALONE, Processes
from jaxmerge.recipes.source_files import SourceHashes, check_unchanged
from jaxmerge.recipes.streaming.merging import merged
from jaxmerge.recipes.streaming.piece import Piece
from jaxmerge.recipes.workplace import Workplace, journals, workplace

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
    memory_limit: int | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Carries a plan out, or on: what an interrupted run of the same plan has finished is kept.

    Models are aligned first, where the recipe says so. Every source tensor is checked for NaN and
    infinity as it is read. Until the last tensor is
    written nothing stands under a final name. The result does not depend on how often the run was
    interrupted, nor on the number of processes.

    Args:
      plan: made by `make_plan` with an output.
      format: of the output; None: from the output's suffix, a folder being safetensors.
      shard_size: for a folder of safetensors, the most bytes of tensors in one file; a larger tensor
        gets a file of its own. None: one file.
      memory_limit: the bytes that this process may hold; default: three quarters of what is free.
      progress: called after each piece with its tensor's name, the bytes written so far, and all bytes.
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
            plan = _aligned(plan, place, processes)
            if chosen == "torch":
                _write_torch(plan, place, memory_limit, progress, processes)
            else:
                _write_safetensors(plan, place, limit, memory_limit, progress, processes)
        processes.meet("the output is whole")
    return place.output


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


def _aligned(plan: Plan, place: Workplace, processes: Processes) -> Plan:
    """Matches the models once, in the first process; the others, and later runs, take what it has recorded."""
    if plan.alignment is None:
        return plan
    journal = place.journal
    if not processes.index:
        plan = aligned(plan, journal.alignments, journal.finish_alignment)
        processes.meet("the models are aligned")
        return plan
    processes.meet("the models are aligned")
    journal.take(journal_of(place.target))
    return aligned(plan, journal.alignments)


def _write_safetensors(
    plan: Plan,
    place: Workplace,
    shard_size: int | None,
    memory_limit: int | None,
    progress: Progress | None,
    processes: Processes,
) -> None:
    """Writes this process's share of the files; the first process then completes the output."""
    donated, rank = _donated(plan)
    made = provenance.settings(plan)
    journal = place.journal
    _take_all(place)
    if _is_whole(plan, place):
        return
    with (
        _hashing(plan, place, processes) as hashes,
        CheckpointWriter(
            place.target,
            [TensorInfo.of(t.name, t.shape, t.dtype) for t in plan.tensors],
            metadata=donated | provenance.metadata(provenance.record(plan, made, {})),
            shard_size=shard_size,
            ties=plan.ties,
            finished=journal.tensors,
            share=(processes.index, processes.count),
        ) as writer,
    ):
        names = _pending(plan, writer, rank)
        written = [name for tied in names.values() for name in tied]
        steps = _Steps(plan, written, progress, processes)
        wanted = [steps.tensors[name] for name in names]
        # With nothing to merge nothing need be measured.
        for piece in merged(plan, wanted, memory_limit=memory_limit) if wanted else ():
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
        record = provenance.record(plan, made, _by_file(place))
        _write_beside(plan, place, record)
        writer.close(donated | provenance.metadata(record))


def _write_torch(
    plan: Plan,
    place: Workplace,
    memory_limit: int | None,
    progress: Progress | None,
    processes: Processes,
) -> None:
    """Writes one PyTorch file, which is a whole: from memory, by one process, and not to be gone on with."""
    if processes.index:
        return
    tensors = [tensor for tensor in plan.tensors if tensor.tied_to is None]
    steps = _Steps(plan, [tensor.name for tensor in tensors], progress, processes)
    values: dict[str, np.ndarray] = {}
    with _hashing(plan, place, ALONE) as hashes:
        for piece in merged(plan, tensors, memory_limit=memory_limit):
            tensor = steps.tensors[piece.name]
            if piece.name not in values:
                values[piece.name] = np.empty(math.prod(tensor.shape), piece.values.dtype)
            values[piece.name][piece.start : piece.start + piece.values.size] = piece.values
            hashes.advance(steps.count(piece, 1))
        hashes.finish()
    check_unchanged(plan)
    _write_beside(plan, place, provenance.record(plan, provenance.settings(plan), _by_file(place)))
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


def _write_beside(plan: Plan, place: Workplace, record: Mapping[str, Any]) -> None:
    """Writes all of a folder that is not weights."""
    if is_file(place.output):
        return
    side_files.write_side_files(plan, place.target)
    provenance.write_record(plan, place.target, record, place.journal.tensors)
    provenance.write_alignment(plan, place.target)
    copied = Path(model_card.CARD) in side_files.side_files(plan.sources[0].path)
    model_card.write_card(place.target, record, place.output.name, copied=copied)


def load_sources(plan: Plan) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray] | None]:
    """Loads the plan's models and base into memory, each checkpoint once, aligned where the recipe says so.

    Returns:
      The models' tensors by name, in order, and the base's (or None).

    Raises:
      CheckpointError: a tensor holds NaN or infinity, or cannot be read.
    """
    plan = aligned(plan)
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


@contextlib.contextmanager
def _open_all(plan: Plan) -> Iterator[list[Checkpoint]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(open_checkpoint(source.path, key=source.key))
            for source in plan.sources
        ]


def _has_torch_suffix(output: Path) -> bool:
    return is_file(output) and output.suffix != ".safetensors"
