"""The checkpoints that a recipe names, opened for their headers, each once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmerge.converters import CheckpointError, TensorInfo, open_checkpoint, refuse_quantised
from jaxmerge.recipes.configs import read_config
from jaxmerge.recipes.errors import place
from jaxmerge.recipes.plan import Plan, PlannedSource
from jaxmerge.recipes.reference import ModelReference
from jaxmerge.recipes.resolve import Resolved
from jaxmerge.tree import nearest


class Sources:
    """Opens checkpoints, and collects what is wrong with them.

    Args:
        resolved: the recipe.
        merged: plans of merges that the recipe names as models, by their names.

    Attributes:
        opened: those that could be opened.
        paths: every file and folder that the merge reads.
        index: of each reference its place among `opened`.
    """

    def __init__(self, resolved: Resolved, merged: Mapping[str, Plan]) -> None:
        self.resolved = resolved
        self.merged = merged
        self.opened: list[PlannedSource] = []
        self.paths: list[Path] = []
        self.index: dict[ModelReference, int] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._known: dict[tuple[Path, str | None], int] = {}

    def open_all(self, references: Sequence[ModelReference]) -> None:
        """Opens what several references name; a checkpoint named twice is one source."""
        for reference in dict.fromkeys(references):
            try:
                self.index[reference] = self._find(reference)
            except (CheckpointError, OSError) as error:
                self.report(reference, f"{error}{nearest(reference.path, self.merged)}")

    def of(self, reference: ModelReference) -> int:
        """Returns the index of the source that a reference names."""
        return self.index[reference]

    def add(self, source: PlannedSource, *paths: Path) -> int:
        """Adds a source that is open already, an adapter; returns its index.

        Args:
            source: the source.
            paths: files and folders that are read of it.
        """
        self.paths += paths
        self.opened.append(source)
        return len(self.opened) - 1

    def report(self, reference: ModelReference, problem: str) -> None:
        """Notes what is wrong with a model, at its line of the recipe."""
        recipe = self.resolved.recipe
        self.problems.append(place(recipe.filename, self._line(reference), problem))

    def _find(self, reference: ModelReference) -> int:
        if reference.path in self.merged:
            return self.add(_of_plan(reference, self.merged[reference.path]))
        path = reference.locate(self.resolved.recipe.folder)
        self._note_another(reference, path)
        identity = (path.resolve(), reference.key)
        if identity not in self._known:
            self._known[identity] = self.add(self._open(reference.model, path))
        return self._known[identity]

    def _note_another(self, reference: ModelReference, found: Path) -> None:
        folder = self.resolved.recipe.folder
        other = None if folder is None else folder / Path(reference.path).expanduser()
        if other is not None and other.exists() and other.resolve() != found.resolve():
            self.notes.append(
                f"{reference}: {found.absolute()} is used; {other.absolute()}, beside the recipe, "
                "exists too"
            )

    def _open(self, reference: ModelReference, path: Path) -> PlannedSource:
        self.paths.append(path)
        with open_checkpoint(path, key=reference.key) as checkpoint:
            if checkpoint.skipped:
                count, first = len(checkpoint.skipped), next(iter(checkpoint.skipped))
                self.notes.append(f"{reference}: {count} entries are no tensors ({first!r}, ...)")
            self.paths += map(Path, checkpoint.files)
            config = read_config(path)
            refuse_quantised(checkpoint.tensors, config, where=str(reference))
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
                config=config,
            )

    def _line(self, reference: ModelReference) -> int | None:
        recipe = self.resolved.recipe
        for part in self.resolved.parts:
            for model in part.sources:
                if model.reference == reference and model.path != ("base_model",):
                    return recipe.line(*model.path, "model")
        return recipe.line("base_model")


def _of_plan(reference: ModelReference, plan: Plan) -> PlannedSource:
    """What another merge will have written, as a source."""
    assert plan.output is not None
    return PlannedSource(
        name=str(reference),
        path=plan.output,
        key=None,
        format="safetensors",
        nbytes=sum(tensor.nbytes for tensor in plan.tensors if tensor.tied_to is None),
        tensors={t.name: TensorInfo.of(t.name, t.shape, t.dtype) for t in plan.tensors},
        ties=plan.ties,
        files=(),
        config=plan.config if plan.config is not None else plan.sources[0].config,
    )
