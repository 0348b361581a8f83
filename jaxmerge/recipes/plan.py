"""The plan of a merge: what is read, what is done to it, and what is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxmerge._version import __version__
from jaxmerge.converters import TensorInfo
from jaxmerge.methods import MergeMethod
from jaxmerge.recipes.adapters import AdapterTerm
from jaxmerge.recipes.inputs import RowMap
from jaxmerge.recipes.resolve import Resolved
from jaxmerge.recipes.tokenizers import TokenizerFiles

if TYPE_CHECKING:
    from jaxmerge.align.orders import Order
    from jaxmerge.recipes.aligning import Aligned
    from jaxmerge.recipes.alignment import PlannedAlignment


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
        config: what its `config.json` holds; None without one.
    """

    name: str
    path: Path
    key: str | None
    format: str
    nbytes: int
    tensors: Mapping[str, TensorInfo]
    ties: tuple[tuple[str, ...], ...]
    files: tuple[tuple[str, int, int], ...]
    config: Mapping[str, Any] | None


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
        models: index into `sources` of each model to merge, in order; of recipes with slices or
            modules, of every model.
        base: index into `sources` of the base of all, or None.
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
        config: what the output's `config.json` holds; None where the donor's is copied as it is.
        row_maps: how rows of embeddings are mapped, see `PlannedInput.rows`.
        tokenizer_files: what becomes of the tokenizer's files; None where the donor's are kept.
        alignment: which models are brought into whose order before they are merged, or None.
        aligned: what matching them has found; None before that, see `jaxmerge.recipes.aligning`.
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
    config: Mapping[str, Any] | None = None
    row_maps: tuple[RowMap, ...] = ()
    tokenizer_files: TokenizerFiles | None = None
    alignment: PlannedAlignment | None = None
    aligned: Aligned | None = None

    @property
    def orders(self) -> Mapping[int, Mapping[str, Order]]:
        """The order in which tensors are read, by their source's index and their names; others are read as they are."""
        return {} if self.aligned is None else self.aligned.orders

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
        if self.alignment is not None:
            plan["alignment"] = self.alignment.to_dict(self.sources)
        return json.dumps(plan, indent=2, allow_nan=False)
