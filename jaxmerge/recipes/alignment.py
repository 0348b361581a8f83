"""The alignment of a merge's models, planned from headers: who is brought into whose order, and what may move."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmerge.converters import CheckpointError, open_checkpoint
from jaxmerge.recipes.errors import place
from jaxmerge.recipes.output import bytes_text
from jaxmerge.recipes.plan import PlannedSource
from jaxmerge.recipes.reference import ModelReference, nearest_name
from jaxmerge.recipes.resolve import Resolved
from jaxmerge.recipes.sources import Sources
from jaxmerge.recipes.streaming.memory import INTERPRETER

if TYPE_CHECKING:
    from jaxmerge.align.checkpoints import How
    from jaxmerge.align.spec import PermutationSpec
    from jaxmerge.converters.families.matching import Match
    from jaxmerge.recipes.schema import Align


@dataclass(frozen=True)
class PlannedAlignment:
    """Models that are brought into the order of one of them before they are merged.

    Attributes:
        to: index into the plan's sources of the model that stays as it is.
        models: indices of the others.
        how: how units are matched.
        match: what the models were recognised as.
        spec: which of their units may move.
        config: in place of their config.json, or None.
        data: the file of inputs as the recipe names it; None where weights alone are compared.
        files: path, size in bytes and time of change (ns) of that file, if there is one.
        memory: bytes that matching takes at least: two models at a time are held whole.
    """

    to: int
    models: tuple[int, ...]
    how: How
    match: Match
    spec: PermutationSpec
    config: Mapping[str, Any] | None
    data: str | None
    files: tuple[tuple[str, int, int], ...]
    memory: int

    def to_dict(self, sources: Sequence[PlannedSource]) -> dict[str, Any]:
        """Returns what is known before anything is matched, as plain data that JSON can hold."""
        from jaxmerge.align.checkpoints import described

        return {
            "to": sources[self.to].name,
            "models": [sources[index].name for index in self.models],
            **described(self.how),
            "family": self.match.family.name,
            "data": self.data,
        }

    def describe(self, sources: Sequence[PlannedSource]) -> str:
        """Returns a sentence on it.

        Args:
            sources: the plan's.
        """
        what = {"weight": "weights", "activation": f"activations on {self.data}"}
        what["dual"] = f"weights ({self.how.alpha:g}) and activations on {self.data}"
        units = sum(math.prod(self.spec.shape(node.name)) for node in self.spec.free())
        names = ", ".join(sources[index].name for index in self.models)
        return (
            f"{names} to {sources[self.to].name} by {what[self.how.method]}; {units} units of "
            f"{self.match.family.name} may move; {bytes_text(self.memory)} of memory for matching"
        )


def plan_alignment(
    resolved: Resolved, sources: Sources
) -> tuple[PlannedAlignment | None, list[str]]:
    """Plans what a recipe's `align` asks for.

    Args:
        resolved: the recipe.
        sources: its sources, open.

    Returns:
        The alignment, None where there is none or it cannot be; and what is wrong.
    """
    align = resolved.recipe.align
    if align is None:
        return None, []
    planner = _Planner(resolved, sources, align)
    return planner.plan(), planner.problems


class _Planner:
    def __init__(self, resolved: Resolved, sources: Sources, align: Align) -> None:
        self.resolved = resolved
        self.sources = sources
        self.align = align
        self.problems: list[str] = []

    def plan(self) -> PlannedAlignment | None:
        from jaxmerge.align.checkpoints import How, units_of
        from jaxmerge.converters.families.family import variables_of

        align = self.align
        references = self._references()
        to = self.sources.of(self.resolved.aligned_to)
        models = tuple(dict.fromkeys(i for i in map(self.sources.of, references) if i != to))
        if not models:
            self._problem(f"there is no other model to bring into the order of {self._name(to)}")
        match = self._recognised(to, models)
        if match is None or self.problems:
            return None
        method = align.method or ("weight" if align.data is None else "dual")
        alpha = 0.5 if align.alpha is None else align.alpha
        how = How(method, alpha, align.seed, align.restarts, align.heads)
        expected = match.family.inputs(match.config)
        data = align.data if method != "weight" else None
        files = () if data is None else self._read(data, expected)
        variables = variables_of(match.family, match.config)
        apply_fn = match.family.apply_fn(match.config)
        try:
            spec = units_of(apply_fn, variables, expected, align.heads)
        except ValueError as error:
            self._problem(str(error), "heads")
            return None
        if not spec.free():
            self._problem(f"nothing can be permuted in {match.family.name} of these sizes")
        self._check_orders(spec, match)
        if self.problems:
            return None
        memory = self._memory(spec, match, (to, *models), weights=method != "activation")
        return PlannedAlignment(to, models, how, match, spec, align.config, data, files, memory)

    def _references(self) -> list[ModelReference]:
        references = list(
            dict.fromkeys(m.reference for part in self.resolved.parts for m in part.sources)
        )
        for one in references:
            if one.lora is not None:
                self._problem(
                    f"{one}: a model with an adapter cannot be aligned; merge the adapter into it "
                    "first, with a recipe of its own"
                )
        return references

    def _recognised(self, to: int, models: Sequence[int]) -> Match | None:
        """What all models are; each is looked at, so that all that is wrong is said at once."""
        found = [self._match(index) for index in (to, *models)]
        first = found[0]
        for index, one in zip(models, found[1:], strict=True):
            if first is None or one is None:
                continue
            if one.family.name != first.family.name:
                self._problem(
                    f"{self._name(index)}: of the family {one.family.name}, expected "
                    f"{first.family.name} as {self._name(to)}"
                )
            elif one.family.shapes(one.config) != first.family.shapes(first.config):
                self._problem(f"{self._name(index)}: has other sizes than {self._name(to)}")
        return first

    def _match(self, index: int) -> Match | None:
        from jaxmerge.converters.families.matching import recognise

        source = self.sources.opened[index]
        try:
            match = recognise(
                source.tensors,
                json=_config_of(source),
                family=self.align.family,
                config=self.align.config,
                where=source.name,
            )
        except CheckpointError as error:
            self._problem(str(error), *(["family"] if self.align.family else []))
            return None
        self._check_ties(source, match)
        return match

    def _check_ties(self, source: PlannedSource, match: Match) -> None:
        """Tensors that are one in the file must be one for the family, lest they are moved apart."""
        aliases = match.family.aliases(match.config)
        known = {match.prefix + name: match.prefix + target for name, target in aliases.items()}
        for group in source.ties:
            apart = sorted({known.get(name, name) for name in group})
            if len(apart) > 1:
                self._problem(
                    f"{source.name}: {', '.join(map(repr, apart))} are one tensor in the file and "
                    f"several for {match.family.name}"
                )

    def _read(self, data: str, expected: Any) -> tuple[tuple[str, int, int], ...]:
        from jaxmerge.align.checkpoints import read_inputs

        folder = self.resolved.recipe.folder
        path = Path(data).expanduser()
        places = [path] if path.is_absolute() or folder is None else [path, folder / path]
        file = next((one for one in places if one.is_file()), None)
        if file is None:
            near = next(filter(None, map(nearest_name, places)), None)
            hint = f"; did you mean {near!r}?" if near else ""
            self._problem(f"no file {data!r}{hint}", "data")
            return ()
        try:
            read_inputs(file, expected)
        except ValueError as error:
            self._problem(str(error), "data")
        stat = os.stat(file)
        return ((str(file), stat.st_size, stat.st_mtime_ns),)

    def _check_orders(self, spec: PermutationSpec, match: Match) -> None:
        from jaxmerge.align.orders import check_apart

        family, config, prefix = match
        try:
            check_apart(spec, family.layout(config, prefix), family.shapes(config))
        except ValueError as error:
            self._problem(str(error))

    def _memory(
        self, spec: PermutationSpec, match: Match, used: Sequence[int], *, weights: bool
    ) -> int:
        r"""Two models as stored, both models' rows of weights in float32, those in work three times more, similarities:

        .. math:: 2 b + 2 \cdot 4 \sum_i r_i + 3 \cdot 4 \max_i r_i + 3 \cdot 4 \sum_i u_i^2

        of nodes with u units that stand in leaves with r elements together.
        """
        stored = max(self.sources.opened[index].nbytes for index in used)
        shapes = match.family.shapes(match.config)
        rows, pairs = [], 0
        for node in spec.free():
            rows.append(sum(math.prod(shapes[path]) for path, _, _ in spec.uses(node.name)))
            pairs += math.prod(spec.shape(node.name)) ** 2
        compared = 8 * sum(rows) + 12 * max(rows)
        return INTERPRETER + 2 * stored + compared * weights + 12 * pairs

    def _name(self, index: int) -> str:
        return self.sources.opened[index].name

    def _problem(self, text: str, *key: str) -> None:
        recipe = self.resolved.recipe
        problem = place(recipe.filename, recipe.line("align", *key), f"`align`: {text}")
        if problem not in self.problems:
            self.problems.append(problem)


def _config_of(source: PlannedSource) -> Mapping[str, Any]:
    if source.config is not None or source.format != "gguf":
        return source.config or {}
    with open_checkpoint(source.path) as checkpoint:
        return checkpoint.config or {}
