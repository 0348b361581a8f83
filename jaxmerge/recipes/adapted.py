"""Models with adapters: which of their tensors an adapter changes, and how."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from jaxmerge.converters import CheckpointError
from jaxmerge.converters.errors import nearest
from jaxmerge.converters.peft_adapter import (
    CONFIG_NAME,
    PeftAdapter,
    find_target,
    fit,
    read_peft_adapter,
)
from jaxmerge.recipes import layers
from jaxmerge.recipes.adapters import AdapterTerm
from jaxmerge.recipes.plan import PlannedInput, PlannedSource
from jaxmerge.recipes.reference import ModelReference
from jaxmerge.recipes.sources import Sources


class AdaptedModels:
    """Adds the adapters of a recipe's models to their tensors.

    Args:
        sources: the recipe's sources, open; the adapters become sources too.
        references: the models.

    Attributes:
        notes: remarks for the user.
    """

    def __init__(self, sources: Sources, references: Iterable[ModelReference]) -> None:
        self.notes: list[str] = []
        self._sources = sources
        self._terms: dict[ModelReference, dict[str, AdapterTerm]] = {}
        self._replaced: dict[ModelReference, dict[str, PlannedInput]] = {}
        for reference in dict.fromkeys(references):
            if reference.lora is None or reference not in sources.index:
                continue
            try:
                self._open(reference, reference.lora)
            except (CheckpointError, OSError) as error:
                sources.report(reference, str(error))

    def input(self, reference: ModelReference, one: PlannedInput) -> PlannedInput:
        """Returns a model's tensor as its adapter leaves it.

        Args:
            reference: the model, with its adapter.
            one: the tensor as the model has it.
        """
        name = one.name
        one = self._replaced.get(reference, {}).get(name, one)
        term = self._terms.get(reference, {}).get(name)
        if term is None:
            return one
        dtype = "float64" if one.dtype == "float64" else "float32"
        return replace(one, dtype=dtype, adapters=(term,))

    def _open(self, reference: ModelReference, lora: ModelReference) -> None:
        folder = lora.locate(self._sources.resolved.recipe.folder)
        adapter = read_peft_adapter(folder)
        index = self._sources.add(_source(lora, adapter), folder)
        model = self._sources.opened[self._sources.of(reference)]
        targets = _Targets(model, str(lora))
        self._replaced[reference] = {
            found: PlannedInput(
                index, name, adapter.tensors[name].shape, adapter.tensors[name].dtype
            )
            for target, name in adapter.replaced.items()
            for found in targets.find(target, shared=".base_layer." in name)
        }
        terms = self._terms[reference] = {}
        for target, update in adapter.updates.items():
            for found in targets.find(target, shared=True):
                own = self._replaced[reference].get(found)
                shape = model.tensors[found].shape if own is None else own.shape
                term = AdapterTerm(index, fit(update, shape, where=str(lora)))
                if found in terms and terms[found] != term:
                    raise CheckpointError(
                        f"{lora}: {target!r} and another of its targets are one tensor of {model.name}"
                    )
                terms[found] = term
        self.notes += dict.fromkeys(targets.notes)


class _Targets:
    """Finds what an adapter changes among the tensors of a model."""

    def __init__(self, model: PlannedSource, adapter: str) -> None:
        self.model = model
        self.adapter = adapter
        self.notes: list[str] = []
        self._ties = {name: group for group in model.ties for name in group}

    def find(self, target: str, *, shared: bool) -> Sequence[str]:
        """Returns the tensor, and those that are tied to it.

        Args:
            target: as the adapter names it.
            shared: an output head that is not stored is the embedding.

        Raises:
            CheckpointError: there is none.
        """
        found = find_target(target, self.model.tensors)
        if found is None and layers.is_head(target):
            tables = [name for name in self.model.tensors if layers.is_token_table(name)]
            if shared and len(tables) == 1:
                found = tables[0]
                self.notes.append(
                    f"{self.adapter}: {self.model.name} has no {target!r}; the embedding {found!r}, "
                    "which is tied to it, is changed in its place"
                )
        if found is None:
            raise CheckpointError(
                f"{self.adapter}: it changes {target!r}, which {self.model.name} does not have."
                f"{nearest(target, self.model.tensors)}"
            )
        return self._ties.get(found, (found,))


def _source(reference: ModelReference, adapter: PeftAdapter) -> PlannedSource:
    files = (adapter.weights, os.path.join(adapter.folder, CONFIG_NAME))
    stats = [(file, os.stat(file)) for file in files]
    return PlannedSource(
        name=str(reference),
        path=Path(adapter.weights),
        key=None,
        format="safetensors" if adapter.weights.endswith(".safetensors") else "torch",
        nbytes=sum(info.nbytes for info in adapter.tensors.values()),
        tensors=adapter.tensors,
        ties=(),
        files=tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats),
        config=None,
    )
