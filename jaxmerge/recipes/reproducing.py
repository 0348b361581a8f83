"""Making a merge again from what its output says about itself, and comparing bit for bit."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from jaxmerge._version import __version__
from jaxmerge.converters import Checkpoint, CheckpointError, open_checkpoint
from jaxmerge.converters.byte_io import as_bytes
from jaxmerge.recipes import side_files
from jaxmerge.recipes.aligning import aligned
from jaxmerge.recipes.errors import PlanError, RecipeError, did_you_mean
from jaxmerge.recipes.output import RECORD, is_file
from jaxmerge.recipes.plan import Plan
from jaxmerge.recipes.planning import make_plan
from jaxmerge.recipes.provenance import METADATA_KEY, UNKNOWN, permutations_digest
from jaxmerge.recipes.schema import parse
from jaxmerge.recipes.source_files import SourceHashes, check_unchanged
from jaxmerge.recipes.streaming.merging import merged
from jaxmerge.recipes.streaming.piece import Piece


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what the recipe gives.

    Attributes:
        name: the tensor.
        entries: how many of its entries differ, in their bits; None where it is missing, additional, or
            of another shape or dtype.
        largest: the largest absolute difference.
    """

    name: str
    entries: int | None
    largest: float


@dataclass(frozen=True)
class Reproduction:
    """How an output compares with the same merge made again.

    Attributes:
        tensors: how many were compared.
        differences: the tensors that differ, in the order of the output.
        files: other files of the folder that differ.
        notes: what is not as it was: versions, sources' hashes.
    """

    tensors: int
    differences: tuple[Difference, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences and not self.files


def reproduce(
    output: str | Path,
    *,
    sources: Mapping[str, str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Reproduction:
    """Runs the merge that made an output again and compares; the output stays as it is.

    Models are matched again where they were aligned. Every tensor is compared as it is merged, so
    that nothing but small files is written, to a temporary folder.

    Args:
        output: a folder or a safetensors file that jaxmerge wrote.
        sources: for sources, and inputs of an alignment, that are elsewhere now: their name in the
            recipe -> where they are.
        progress: called after each piece with a tensor's name, the bytes done, and all bytes.

    Raises:
        PlanError: the output has no record of its merge, or the merge cannot be made again.
        RecipeError: its recipe cannot be read.
    """
    output = Path(output)
    record = read_record(output)
    moved = {**_beside(record, output), **(sources or {})}
    recipe = parse(_elsewhere(record, moved), filename=f"{output}: recipe")
    plan = aligned(make_plan(recipe, seed=record["seed"]))
    notes = [f"made with {name} {was}, compared with {now}" for name, was, now in _versions(record)]
    hashes: dict[str, str] = {}
    hashing = SourceHashes(
        [source.files for source in plan.sources],
        {},
        lambda stamp, digest: hashes.__setitem__(stamp[0], digest),
    )
    with hashing, open_checkpoint(output) as checkpoint:
        differences = _compare(plan, checkpoint, hashing, progress)
        hashing.finish()
    check_unchanged(plan)
    return Reproduction(
        tensors=len(plan.tensors),
        differences=differences,
        files=() if is_file(output) else _other_files(plan, output),
        notes=(*notes, *_changed(record, plan, hashes), *_matched_otherwise(record, plan)),
    )


def read_record(output: Path) -> dict[str, Any]:
    """Returns what an output says about how it was made.

    Raises:
        PlanError: it says nothing.
    """
    try:
        if is_file(output):
            with open_checkpoint(output) as checkpoint:
                text = checkpoint.metadata.get(METADATA_KEY, "")
        else:
            text = (output / RECORD).read_text(encoding="utf-8")
        record = json.loads(text)
        known = isinstance(record["recipe"], str) and isinstance(record["seed"], int)
        for source in record["sources"]:
            known &= isinstance(source["name"], str)
            known &= all({"name", "sha256"} <= file.keys() for file in source["files"])
        alignment = record.get("alignment", {"models": [], "data": None})
        known &= all(isinstance(one["permutations"], str) for one in alignment["models"])
        known &= alignment["data"] is None or {"name", "sha256"} <= alignment["data"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        known = False
    if not known:
        where = "its metadata" if is_file(output) else RECORD
        raise PlanError([f"{output}: there is no record of a merge in {where}"])
    return record


def _beside(record: Mapping[str, Any], output: Path) -> dict[str, str]:
    """Finds merges that the same recipe's file has made, which stand beside the output."""
    made = [source["name"] for source in record["sources"] if not source["files"]]
    return {name: str(output.parent / name) for name in made if (output.parent / name).is_dir()}


def _elsewhere(record: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Returns the recipe with sources' names replaced."""
    names = [source["name"] for source in record["sources"]]
    inputs = record.get("alignment", {}).get("data")
    if inputs is not None:
        names.append(inputs["name"])
    for old in sources:
        if old not in names:
            raise PlanError([f"the merge has no source {old!r}{did_you_mean(old, names)}"])

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        return sources.get(value, value) if isinstance(value, str) else value

    text: str = record["recipe"]
    if not sources:
        return text
    try:
        return yaml.safe_dump(replaced(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise RecipeError(f"the recorded recipe cannot be read: {error}") from None


def _versions(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    now = {"jaxmerge": __version__, "jax": jax.__version__, "numpy": np.__version__}
    was = {"jaxmerge": record.get("jaxmerge"), **record.get("versions", {})}
    return [
        (name, str(was[name]), now[name]) for name in now if was.get(name) not in (None, now[name])
    ]


def _changed(record: Mapping[str, Any], plan: Plan, hashes: Mapping[str, str]) -> list[str]:
    """Says which files of the sources are not those that were merged."""
    notes = []
    for was, source in zip(record["sources"], plan.sources, strict=False):
        if not was["files"]:
            # A merge of the same recipe's file, which was not made yet when this one was planned.
            continue
        recorded = [file["sha256"] for file in was["files"]]
        found = [hashes.get(file, UNKNOWN) for file, _, _ in source.files]
        for file, old, new in zip(was["files"], recorded, found, strict=False):
            if UNKNOWN not in (old, new) and old != new:
                notes.append(f"{source.name}: {file['name']} is not the file that was merged")
        if len(recorded) != len(found):
            notes.append(f"{source.name}: had {len(recorded)} files, has {len(found)}")
    return notes


def _matched_otherwise(record: Mapping[str, Any], plan: Plan) -> list[str]:
    """Says what an alignment was made from that is not there now, and which matchings come out otherwise."""
    if plan.aligned is None or "alignment" not in record:
        return []
    notes, was = [], record["alignment"]
    if was["data"] is not None and was["data"]["sha256"] != plan.aligned.data:
        notes.append(f"{was['data']['name']}: not the inputs that the models were aligned on")
    for one, (index, found) in zip(was["models"], plan.aligned.found.items(), strict=False):
        if one["permutations"] != permutations_digest(found):
            notes.append(f"{plan.sources[index].name}: its units are matched in another way")
    return notes


def _compare(
    plan: Plan,
    checkpoint: Checkpoint,
    hashing: SourceHashes,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[Difference, ...]:
    found: dict[str, Difference] = {}
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    everything = dict.fromkeys([*tensors, *checkpoint.tensors])
    for name in everything:
        there, info = tensors.get(name), checkpoint.tensors.get(name)
        if there is None or info is None or (there.shape, there.dtype) != (info.shape, info.dtype):
            found[name] = Difference(name, None, math.inf)
    names: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        if tensor.name not in found:
            names.setdefault(tensor.identity, []).append(tensor.name)
    done, total = 0, sum(tensors[name].nbytes for name in names)
    for piece in merged(plan, [tensors[name] for name in names]):
        for name in names[piece.name]:
            difference = _difference(name, piece, checkpoint, found.get(name))
            if difference is not None:
                found[name] = difference
        done += piece.values.nbytes
        hashing.advance(done / max(total, 1))
        if progress is not None:
            progress(piece.name, done, total)
    return tuple(found[name] for name in everything if name in found)


def _difference(
    name: str, piece: Piece, checkpoint: Checkpoint, before: Difference | None
) -> Difference | None:
    """Returns what differs in a tensor up to this piece."""
    there = checkpoint.read_flat(name, piece.start, piece.start + piece.values.size)
    here = np.ascontiguousarray(piece.values)
    if as_bytes(here) == as_bytes(there):
        return before
    width = here.dtype.itemsize
    bits = [np.frombuffer(as_bytes(one), np.uint8).reshape(-1, width) for one in (here, there)]
    apart = np.any(bits[0] != bits[1], axis=1)
    wide = [one[apart].astype(np.float64) for one in (here, there)]
    entries, largest = int(apart.sum()), float(np.max(np.abs(wide[0] - wide[1])))
    if before is not None:
        entries, largest = entries + (before.entries or 0), max(largest, before.largest)
    return Difference(name, entries, largest)


def _other_files(plan: Plan, output: Path) -> tuple[str, ...]:
    """Returns the files beside the weights that are not what the merge writes."""
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        side_files.write_side_files(plan, made)
        return tuple(
            str(file)
            for file in side_files.side_files(made)
            if not _same(made / file, output / file)
        )


def _same(left: Path, right: Path) -> bool:
    return right.is_file() and left.read_bytes() == right.read_bytes()
