"""The plan of a merge, made from headers: what is read and written, and what would go wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmerge._version import __version__
from jaxmerge.converters import CheckpointError, TensorInfo, open_checkpoint, refuse_quantised
from jaxmerge.converters.folder import TORCH_SUFFIXES
from jaxmerge.methods import MergeMethod
from jaxmerge.recipes.adapters import AdapterTerm
from jaxmerge.recipes.errors import PlanError, place
from jaxmerge.recipes.inputs import RowMap
from jaxmerge.recipes.output import bytes_text, is_finished, is_unfinished, output_problems
from jaxmerge.recipes.reference import ModelReference
from jaxmerge.recipes.resolve import Resolved, resolve
from jaxmerge.recipes.schema import Recipe
from jaxmerge.recipes.streaming.memory import memory_needed
from jaxmerge.tree import depths, nearest

_LISTED = 5
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class PlannedSource:
    """A checkpoint that the merge reads.

    Attributes:
        name: as the recipe names it.
        path: the file or folder found.
        key: where in the file its tensors are.
        format: "safetensors" or "torch".
        nbytes: what is read of it; tied tensors count once.
        tensors: its tensors by name, in the file's order.
        ties: groups of names that are one tensor.
        files: path, size in bytes and time of change (ns) of each file.
    """

    name: str
    path: Path
    key: str | None
    format: str
    nbytes: int
    tensors: Mapping[str, TensorInfo]
    ties: tuple[tuple[str, ...], ...]
    files: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class PlannedInput:
    """A tensor as one source gives it.

    Attributes:
        source: index into the plan's sources.
        name: its name there; layer numbers may differ from the output's.
        shape: its shape as the merge sees it, after rows are mapped.
        dtype: as it is read: that of the file, or float32 where rows are averaged or adapters added.
        rows: index into the plan's row maps that put the tensor together, or None.
        adapters: terms that are added to it.
    """

    source: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: int | None = None
    adapters: tuple[AdapterTerm, ...] = ()


@dataclass(frozen=True)
class PlannedMerge:
    """A method with everything static.

    Attributes:
        method: the merge method with its options.
        options: all its static options.
    """

    method: MergeMethod
    options: Mapping[str, Any]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output.

    Attributes:
        name: its name in the output; for random draws its identity, unless it is tied.
        shape: its shape.
        dtype: its dtype in the output.
        nbytes: its size in the output.
        tied_to: the name whose tensor this is too, inputs and all; None for a tensor of its own.
        action: "merge", or "carry" over the one input (integers, booleans, empty tensors).
        merge: index into the plan's merges; of no meaning for a tensor that is carried over.
        models: what is merged, in the order of the hyperparameters' lists.
        base: what the method gets as its base, or None.
        hyperparameters: of this tensor: numbers, or tuples of one per model.
        depth: how deep it lies in the output, from 0 to 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    tied_to: str | None
    action: Literal["merge", "carry"]
    merge: int
    models: tuple[PlannedInput, ...]
    base: PlannedInput | None
    hyperparameters: Mapping[str, float | tuple[float, ...]]
    depth: float

    @property
    def inputs(self) -> tuple[PlannedInput, ...]:
        """The base, if there is one, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def identity(self) -> str:
        """The name that random draws follow."""
        return self.tied_to or self.name


@dataclass(frozen=True)
class Plan:
    """What a merge will do, known before it starts.

    Attributes:
        resolved: the recipe with everything looked up.
        sources: each checkpoint once, the donor first.
        models: index into `sources` of each model to merge, in order.
        base: index into `sources` of the base, or None.
        merges: what tensors are merged with.
        tensors: the output, in the donor's order.
        ties: groups of names that all sources tie, and the output ties again.
        bytes_read: from all sources.
        bytes_written: to the output.
        memory: bytes that merging takes at least, see `memory_needed`.
        seed: of random methods.
        fingerprint: sha256 (hex) of the resolved recipe, seed, sources' headers, sizes and times of
            change, and the library's version: what decides the output's bytes.
        output: where it will be written, or None.
        overwrite: whether an output that exists may be replaced.
        resumes: whether an unfinished run of this very plan is there, which will be gone on with.
        done: whether the output is the whole result of this very plan already.
        notes: remarks for the user.
        row_maps: how rows of embeddings are mapped, see `PlannedInput.rows`.
    """

    resolved: Resolved
    sources: tuple[PlannedSource, ...]
    models: tuple[int, ...]
    base: int | None
    merges: tuple[PlannedMerge, ...]
    tensors: tuple[PlannedTensor, ...]
    ties: tuple[tuple[str, ...], ...]
    bytes_read: int
    bytes_written: int
    memory: int
    seed: int
    fingerprint: str
    output: Path | None
    overwrite: bool
    resumes: bool
    done: bool
    notes: tuple[str, ...]
    row_maps: tuple[RowMap, ...] = ()

    def describe(self) -> list[dict[str, str]]:
        """Returns a row of text per tensor: tensor, shape, from, to, action."""
        return [
            {
                "tensor": tensor.name,
                "shape": "x".join(map(str, tensor.shape)) or "scalar",
                "from": ", ".join(dict.fromkeys(one.dtype for one in tensor.inputs)),
                "to": tensor.dtype,
                "action": f"tied to {tensor.tied_to}" if tensor.tied_to else tensor.action,
            }
            for tensor in self.tensors
        ]

    def to_json(self) -> str:
        """Returns the plan as JSON text: recipe, sources, tensors, bytes, notes, fingerprint."""
        plan = {
            "fingerprint": self.fingerprint,
            "version": __version__,
            "seed": self.seed,
            "recipe": self.resolved.to_dict(),
            "sources": [
                {
                    "name": source.name,
                    "path": str(source.path),
                    "key": source.key,
                    "format": source.format,
                    "tensors": len(source.tensors),
                    "nbytes": source.nbytes,
                }
                for source in self.sources
            ],
            "models": list(self.models),
            "base": self.base,
            "merges": [
                {"method": merge.method.name, "options": dict(merge.options)}
                for merge in self.merges
            ],
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "memory": self.memory,
            "output": None if self.output is None else str(self.output),
            "resumes": self.resumes,
            "done": self.done,
            "notes": list(self.notes),
        }
        return json.dumps(plan, indent=2, allow_nan=False)


def make_plan(
    recipe: Recipe | Resolved,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    memory_limit: int | None = None,
) -> Plan:
    """Makes the plan of a merge; reads headers only.

    All sources must hold the same tensors as the donor (the base, else the first model), in the
    same shapes and kinds of dtype. Merged tensors get the recipe's `out_dtype`, else its `dtype`,
    else the donor's; the others are carried over from the donor as they are.

    Args:
        recipe: the recipe, resolved or not.
        out: where the output will go, a folder or a checkpoint file; None to plan without checks
            of the output.
        overwrite: an output that exists may be replaced.
        seed: of random methods.
        memory_limit: bytes that the merge may hold in memory, all in all; None for no limit.

    Raises:
        RecipeError: the recipe cannot be resolved.
        PlanError: with every problem of sources and output.
    """
    resolved = recipe if isinstance(recipe, Resolved) else resolve(recipe)
    planner = _Planner(resolved)
    references = [*([resolved.base] if resolved.base else []), *resolved.models]
    positions = planner.open_all(references)
    planner.match()
    output = None if out is None else Path(out).expanduser()
    if planner.problems:
        if output is not None:
            planner.problems += output_problems(output, sources=planner.paths, overwrite=overwrite)
        raise PlanError(planner.problems)
    sources = tuple(planner.sources)
    ties = _common_ties(sources, planner.notes)
    models = tuple(positions[1:] if resolved.base else positions)
    base = positions[0] if resolved.base else None
    tensors = _tensors(resolved, sources, models, base, ties)
    merges = (PlannedMerge(resolved.method, resolved.options),)
    memory = memory_needed(tensors, merges)
    if memory_limit is not None and memory > memory_limit:
        raise PlanError(
            [
                f"{resolved.method.name} needs {bytes_text(memory)} of memory here, more than the "
                f"limit of {bytes_text(memory_limit)}"
            ]
        )
    fingerprint = _fingerprint(resolved, sources, seed)
    written = _bytes_written(tensors, output)
    if output is not None:
        problems = output_problems(
            output,
            sources=planner.paths,
            nbytes=written,
            fingerprint=fingerprint,
            overwrite=overwrite,
        )
        if problems:
            raise PlanError(problems)
    if resolved.method.base == "required" and positions[0] in positions[1:]:
        planner.notes.append(f"{sources[0].name} is also a model to merge: its task vector is 0")
    return Plan(
        resolved=resolved,
        sources=sources,
        models=models,
        base=base,
        merges=merges,
        tensors=tensors,
        ties=ties,
        bytes_read=sum(source.nbytes for source in sources),
        bytes_written=written,
        memory=memory,
        seed=seed,
        fingerprint=fingerprint,
        output=output,
        overwrite=overwrite,
        resumes=output is not None and is_unfinished(output, fingerprint),
        done=output is not None and not overwrite and is_finished(output, fingerprint),
        notes=(*resolved.notes, *planner.notes),
    )


class _Planner:
    """Opens and compares the sources, collecting what is wrong."""

    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self.sources: list[PlannedSource] = []
        self.paths: list[Path] = []
        self.problems: list[str] = []
        self.notes: list[str] = []

    def open_all(self, references: Sequence[ModelReference]) -> list[int]:
        """Opens each checkpoint once; returns each reference's index among the sources."""
        known: dict[tuple[Path, str | None], int] = {}
        positions: list[int] = []
        failed: set[str] = set()
        for reference in references:
            try:
                path = reference.locate(self.resolved.recipe.folder)
                self._note_another(reference, path)
                identity = (path.resolve(), reference.key)
                if identity not in known:
                    source = self._open(reference, path)
                    known[identity] = len(self.sources)
                    self.sources.append(source)
                positions.append(known[identity])
            except (CheckpointError, OSError) as error:
                # The same model may be named twice; one line says what is wrong with it.
                if str(reference) not in failed:
                    failed.add(str(reference))
                    recipe = self.resolved.recipe
                    self.problems.append(place(recipe.filename, self._line(reference), str(error)))
        return positions

    def _note_another(self, reference: ModelReference, found: Path) -> None:
        folder = self.resolved.recipe.folder
        other = None if folder is None else folder / Path(reference.path).expanduser()
        if other is not None and other.exists() and other.resolve() != found.resolve():
            self.notes.append(
                f"{reference}: {found.absolute()} is used; {other.absolute()}, beside the recipe, "
                "exists too"
            )

    def match(self) -> None:
        """Compares every source with the donor, tensor by tensor."""
        if not self.sources or self.sources[0].name != str(self.resolved.donor):
            return
        donor, *others = self.sources
        if not donor.tensors:
            self.problems.append(f"{donor.name}: there is no tensor in it")
        for name, info in donor.tensors.items():
            if _kind(info.dtype) == "complex":
                self.problems.append(
                    f"{donor.name}: tensor {name!r} is complex; no method merges it"
                )
        for source in others:
            self._match_names(donor, source)
            self._match_tensors(donor, source)

    def _open(self, reference: ModelReference, path: Path) -> PlannedSource:
        self.paths.append(path)
        with open_checkpoint(path, key=reference.key) as checkpoint:
            if checkpoint.skipped:
                count, first = len(checkpoint.skipped), next(iter(checkpoint.skipped))
                self.notes.append(f"{reference}: {count} entries are no tensors ({first!r}, ...)")
            self.paths += map(Path, checkpoint.files)
            refuse_quantised(checkpoint.tensors, _config(path), where=str(reference))
            tied = {name for group in checkpoint.ties for name in group[1:]}
            stats = [(file, os.stat(file)) for file in checkpoint.files]
            return PlannedSource(
                name=str(reference),
                path=path,
                key=checkpoint.key,
                format=checkpoint.format,
                nbytes=sum(t.nbytes for t in checkpoint.tensors.values() if t.name not in tied),
                tensors=checkpoint.tensors,
                ties=tuple(checkpoint.ties),
                files=tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats),
            )

    def _match_names(self, donor: PlannedSource, source: PlannedSource) -> None:
        missing = [name for name in donor.tensors if name not in source.tensors]
        extra = [name for name in source.tensors if name not in donor.tensors]
        for name in missing[:_LISTED]:
            inside = [other for other in extra if other.endswith("." + name)]
            hint = f"; did you mean {inside[0]!r}?" if inside else nearest(name, extra[:2000])
            shape = _shown(donor.tensors[name])
            self.problems.append(
                f"{source.name}: tensor {name!r} is missing ({donor.name} has {shape}){hint}"
            )
        for name in extra[:_LISTED]:
            self.problems.append(
                f"{source.name}: extra tensor {name!r} ({_shown(source.tensors[name])}), "
                f"which {donor.name} does not have"
            )
        for kind, names in (("missing", missing), ("extra", extra)):
            if len(names) > _LISTED:
                self.problems.append(f"{source.name}: {len(names) - _LISTED} more {kind} tensors")

    def _match_tensors(self, donor: PlannedSource, source: PlannedSource) -> None:
        wrong: list[str] = []
        others: list[str] = []
        for name, expected in donor.tensors.items():
            found = source.tensors.get(name)
            if found is None:
                continue
            if found.shape != expected.shape:
                wrong.append(
                    f"{source.name}: tensor {name!r} has shape {list(found.shape)}, expected "
                    f"{list(expected.shape)} as in {donor.name}"
                )
            elif _kind(found.dtype) != _kind(expected.dtype):
                wrong.append(
                    f"{source.name}: tensor {name!r} is {found.dtype}, expected a kind of "
                    f"{_kind(expected.dtype)} as in {donor.name} ({expected.dtype})"
                )
            elif found.dtype != expected.dtype:
                others.append(name)
        self.problems += wrong[:_LISTED]
        if len(wrong) > _LISTED:
            self.problems.append(f"{source.name}: {len(wrong) - _LISTED} more tensors do not match")
        if others:
            first = others[0]
            self.notes.append(
                f"{source.name}: {len(others)} tensors have another dtype than in {donor.name} "
                f"({first!r}: {source.tensors[first].dtype}, {donor.tensors[first].dtype})"
            )

    def _opened_donor(self) -> bool:
        return self.sources[0].name == str(self.resolved.donor)

    def _line(self, reference: ModelReference) -> int | None:
        recipe = self.resolved.recipe
        for index, source in enumerate(recipe.models):
            if source.model == reference:
                return recipe.line("models", index, "model")
        return recipe.line("base_model")


def _tensors(
    resolved: Resolved,
    sources: Sequence[PlannedSource],
    models: Sequence[int],
    base: int | None,
    ties: Sequence[tuple[str, ...]],
) -> tuple[PlannedTensor, ...]:
    tied_to = {name: group[0] for group in ties for name in group[1:]}
    depth = depths(sources[0].tensors)
    hyperparameters = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in resolved.hyperparameters.items()
    }
    tensors = []
    for name, info in sources[0].tensors.items():
        # A tied name has the values of the name that it is tied to.
        stored = [source.tensors[tied_to.get(name, name)] for source in sources]
        given = [PlannedInput(i, one.name, one.shape, one.dtype) for i, one in enumerate(stored)]
        size = math.prod(info.shape)
        merged = _kind(info.dtype) == "float" and size > 0
        dtype = (merged and resolved.written_dtype) or info.dtype
        tensors.append(
            PlannedTensor(
                name=name,
                shape=info.shape,
                dtype=dtype,
                nbytes=info.nbytes if dtype == info.dtype else size * _ITEMSIZE[dtype],
                tied_to=tied_to.get(name),
                action="merge" if merged else "carry",
                merge=0,
                models=tuple(given[i] for i in models) if merged else (given[0],),
                base=given[base] if merged and base is not None else None,
                hyperparameters=hyperparameters if merged else {},
                depth=depth[name],
            )
        )
    return tuple(tensors)


def _common_ties(sources: Sequence[PlannedSource], notes: list[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the groups that every source ties; notes those that only some tie."""
    leaders = [{name: group[0] for group in s.ties for name in group} for s in sources]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in sources[0].tensors:
        groups.setdefault(tuple(leader.get(name, name) for leader in leaders), []).append(name)
    common = tuple(tuple(names) for names in groups.values() if len(names) > 1)
    kept = {name for group in common for name in group}
    for source in sources:
        loose = [name for group in source.ties for name in group if name not in kept]
        if loose:
            notes.append(
                f"{source.name}: {', '.join(map(repr, loose[:_LISTED]))} are tied there but not in "
                "every source; they are written apart"
            )
    return common


def _fingerprint(resolved: Resolved, sources: Sequence[PlannedSource], seed: int) -> str:
    content = {
        "version": __version__,
        "recipe": resolved.to_dict(),
        "seed": seed,
        "sources": [
            {
                "name": source.name,
                "key": source.key,
                "files": [(os.path.abspath(file), *stamp) for file, *stamp in source.files],
                "tensors": [(t.name, t.shape, t.dtype) for t in source.tensors.values()],
                "ties": source.ties,
            }
            for source in sources
        ],
    }
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes_written(tensors: Iterable[PlannedTensor], output: Path | None) -> int:
    # Safetensors gives tied names bytes of their own.
    shared = output is not None and output.suffix in TORCH_SUFFIXES
    return sum(tensor.nbytes for tensor in tensors if not (shared and tensor.tied_to))


def _config(path: Path) -> dict[str, Any] | None:
    """Returns the model's `config.json`, if there is one that can be read."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _kind(dtype: str) -> str:
    if dtype.startswith(("float", "bfloat")):
        return "float"
    return "int" if dtype.startswith(("int", "uint")) else dtype.rstrip("0123456789")


def _shown(info: TensorInfo) -> str:
    return f"{info.dtype}{list(info.shape)}"
