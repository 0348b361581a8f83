"""Which tensors of the sources make each tensor of the output, by names, modules and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxmerge.converters import TensorInfo
from jaxmerge.recipes import layers
from jaxmerge.recipes.configs import Stacked
from jaxmerge.recipes.errors import place
from jaxmerge.recipes.layers import Anatomy, Place, anatomy
from jaxmerge.recipes.plan import PlannedSource
from jaxmerge.recipes.resolve import Part, PartModel, Resolved
from jaxmerge.recipes.sources import Sources
from jaxmerge.tree import nearest

_LISTED = 5

Table = Mapping[str, TensorInfo]


class Matched(NamedTuple):
    """A tensor of the output and what it is made of.

    Attributes:
        name: in the output.
        part: index into the recipe's parts; None for what no module of the recipe covers.
        at: where its layer lies among those merged together, from 0 to 1.
        tensors: in each of the part's sources, the base first; None where one has no such tensor.
        names: by which each source's settings are filtered.
    """

    name: str
    part: int | None
    at: float
    tensors: tuple[TensorInfo | None, ...]
    names: tuple[str, ...]


class Matcher:
    """Goes through the parts of a recipe, and collects what does not fit.

    Args:
        resolved: the recipe.
        sources: its sources, open.

    Attributes:
        problems: what is wrong.
        notes: remarks for the user.
        stacked: the stacks of layers that were put together from slices.
    """

    def __init__(self, resolved: Resolved, sources: Sources) -> None:
        self.resolved = resolved
        self.sources = sources
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.stacked: list[Stacked] = []
        self._modules = list(resolved.recipe.modules)
        self._anatomies: dict[int, Anatomy] = {}
        self._members_of: dict[int, Mapping[str, Sequence[str]]] = {}

    def match(self) -> list[Matched]:
        """Returns the output's tensors in its order."""
        found: list[Matched] = []
        parts = list(enumerate(self.resolved.parts))
        for _, part in parts:
            self._check_module(part)
        if self.problems:
            return []
        for module in dict.fromkeys(part.module for _, part in parts):
            of_module = [(index, part) for index, part in parts if part.module == module]
            if of_module[0][1].slice is None:
                found += self._whole(*of_module[0])
            else:
                found += self._stack(of_module)
        if self._modules:
            found += self._uncovered()
        return found

    # Whole models

    def _whole(self, index: int, part: Part) -> Iterator[Matched]:
        owners = [self.sources.of(model.reference) for model in part.sources]
        tables = [
            {name: self.sources.opened[owner].tensors[name] for name in self._members(owner, part)}
            for owner in owners
        ]
        differences = _Differences(self, part)
        for name, tensors in differences.pair(tables, lambda _, name: name):
            holder = next(
                owner for owner, table in zip(owners, tables, strict=True) if name in table
            )
            at = self._anatomy(holder).position(name)
            yield Matched(name, index, at, tensors, (name,) * len(tensors))
        differences.report()

    # Slices

    def _stack(self, parts: Sequence[tuple[int, Part]]) -> Iterator[Matched]:
        """The slices of a module, and what comes before and after them."""
        stacks = [[self._main_stack(part, model) for model in part.sources] for _, part in parts]
        if self.problems:
            return
        yield from self._outside(*parts[0], stacks[0], of_input=True)
        place_in_output = 0
        origins: list[tuple[Mapping[str, object] | None, int]] = []
        output = next((stack for row in stacks for stack in row if stack is not None), "")
        for (index, part), row in zip(parts, stacks, strict=True):
            first, end = part.sources[0].layers or (0, 0)
            differences = _Differences(self, part)
            for offset in range(end - first):
                at = offset / (end - first - 1) if end - first > 1 else 1.0
                yield from self._layer(
                    index, part, row, offset, at, Place(output, place_in_output, ""), differences
                )
                lead = self.sources.opened[self.sources.of(part.sources[0].reference)]
                origins.append((lead.config, first + offset))
                place_in_output += 1
            differences.report()
        self._note_more_at_the_end(parts)
        yield from self._outside(*parts[-1], stacks[-1], of_input=False)
        if output:
            donor = self._anatomy(0)
            self.stacked.append(Stacked(output, donor.counts.get(output, 0), origins))

    def _note_more_at_the_end(self, parts: Sequence[tuple[int, Part]]) -> None:
        first, last = parts[0][1].sources, parts[-1][1].sources
        if len(last) > len(first):
            self.notes.append(
                f"what comes after the last layer is merged of the last slice's {len(last)} models; "
                f"mergekit takes only as many of them as the first slice has ({len(first)})"
            )
        elif {one.reference for one in first} != {one.reference for one in last}:
            self.notes.append(
                "what comes after the last layer is taken from the last slice, as mergekit does for "
                "the architectures that it has a table of; for others it takes the first slice's"
            )

    def _layer(
        self,
        index: int,
        part: Part,
        stacks: Sequence[str | None],
        offset: int,
        at: float,
        output: Place,
        differences: _Differences,
    ) -> Iterator[Matched]:
        """One layer: the same tensors in each source, each under its own number."""
        numbers = [(model.layers or (0, 0))[0] + offset for model in part.sources]
        tables: list[Table] = []
        for model, stack, number in zip(part.sources, stacks, numbers, strict=True):
            owner = self.sources.of(model.reference)
            tensors, found = self.sources.opened[owner].tensors, self._anatomy(owner)
            names = found.by_layer.get((stack or "", number), ())
            tables.append({_rest(found, name): tensors[name] for name in names})

        def named(source: int, rest: str) -> str:
            return Place(stacks[source] or "", 0, rest).named(numbers[source])

        for rest, pair in differences.pair(tables, named):
            names = tuple(named(i, rest) for i in range(len(pair)))
            name = Place(output.stack, output.layer, rest).named(output.layer)
            yield Matched(name, index, at, pair, names)

    def _outside(
        self, index: int, part: Part, stacks: Sequence[str | None], *, of_input: bool
    ) -> Iterator[Matched]:
        """What comes before the first layer, or after the last one."""
        tables: list[Table] = []
        for model, stack in zip(part.sources, stacks, strict=True):
            owner = self.sources.of(model.reference)
            source, found = self.sources.opened[owner], self._anatomy(owner)
            tables.append(
                {
                    name: source.tensors[name]
                    for name in self._members(owner, part)
                    if ((at := found.places[name]) is None or at.stack != stack)
                    and layers.is_of_input(name) == of_input
                }
            )
        differences = _Differences(self, part)
        for name, tensors in differences.pair(tables, lambda _, name: name):
            yield Matched(name, index, 0.0, tensors, (name,) * len(tensors))
        differences.report()

    def _main_stack(self, part: Part, model: PartModel) -> str | None:
        """The stack whose layers a source's range counts; None for a module without layers."""
        owner = self.sources.of(model.reference)
        source, found = self.sources.opened[owner], self._anatomy(owner)
        stacks = found.stack_of(self._members(owner, part))
        first, end = model.layers or (0, 0)
        if len(stacks) > 1:
            possible = ", ".join(map(repr, layers.possible_modules(found)))
            self._problem(
                model,
                f"{source.name} has several stacks of layers ({', '.join(stacks)}): give slices "
                f"for each of them under `modules` ({possible})",
            )
            return None
        count = found.counts[stacks[0]] if stacks else 0
        if end > count:
            layers_of = f"{count} layers" if stacks else "no layers"
            text = f"layer_range [{first}, {end}] goes beyond the {layers_of} of {source.name}"
            self._problem(model, text, "layer_range")
        return stacks[0] if stacks else None

    # Modules

    def _check_module(self, part: Part) -> None:
        if part.module is None:
            return
        recipe = self.resolved.recipe
        for model in part.sources:
            owner = self.sources.of(model.reference)
            if self._members(owner, part):
                continue
            possible = layers.possible_modules(self._anatomy(owner))
            text = (
                f"{self.sources.opened[owner].name} has no module {part.module!r}"
                f"{nearest(part.module, possible)}; it has {', '.join(map(repr, possible))}"
            )
            problem = place(recipe.filename, recipe.line("modules", part.module), text)
            if problem not in self.problems:
                self.problems.append(problem)

    def _uncovered(self) -> Iterator[Matched]:
        """What no module of the recipe names comes from the donor as it is."""
        donor = self.sources.opened[0]
        covered = {name for names in self._modules_of(0).values() for name in names}
        left = [name for name in donor.tensors if name not in covered]
        if left:
            self.notes.append(
                f"{len(left)} tensors belong to no module of the recipe ({left[0]!r}, ...): they are "
                f"taken from {donor.name}; mergekit would leave them out"
            )
        for name in left:
            yield Matched(name, None, 0.0, (donor.tensors[name],), (name,))

    def _members(self, owner: int, part: Part) -> Iterable[str]:
        """The tensors of a source that belong to the part's module."""
        if part.module is None:
            return self.sources.opened[owner].tensors
        return self._modules_of(owner)[part.module]

    def _modules_of(self, owner: int) -> Mapping[str, Sequence[str]]:
        if owner not in self._members_of:
            self._members_of[owner] = layers.members(self._anatomy(owner), self._modules)
        return self._members_of[owner]

    def _anatomy(self, owner: int) -> Anatomy:
        if owner not in self._anatomies:
            source = self.sources.opened[owner]
            self._anatomies[owner] = anatomy(source.tensors, source.config)
        return self._anatomies[owner]

    def _problem(self, model: PartModel, text: str, *path: str) -> None:
        recipe = self.resolved.recipe
        self.problems.append(place(recipe.filename, recipe.line(*model.path, *path), text))


class _Differences:
    """Pairs the tensors of a part's sources, and collects those without a partner."""

    def __init__(self, matcher: Matcher, part: Part) -> None:
        self._matcher = matcher
        self._mode = matcher.resolved.recipe.tensors
        sources = matcher.sources
        self._sources = [sources.opened[sources.of(model.reference)] for model in part.sources]
        self._missing: dict[int, dict[str, TensorInfo]] = {}
        self._extra: dict[int, dict[str, TensorInfo]] = {}
        self._tied: dict[str, tuple[str, str]] = {}

    def pair(
        self, tables: Sequence[Table], named: Callable[[int, str], str]
    ) -> Iterator[tuple[str, tuple[TensorInfo | None, ...]]]:
        """Gives the tensors that belong together.

        Args:
            tables: the tensors of each source by the names that they have in common.
            named: from the source and such a name to the source's own.
        """
        keys = dict.fromkeys(key for table in tables for key in table)
        for key in keys:
            tensors = [table.get(key) for table in tables]
            if None in tensors and self._mode == "same":
                tensors = [self._or_table(i, key, tensors) for i in range(len(tables))]
                if None in tensors:
                    self._note_missing(key, tensors, named)
                    continue
            if None not in tensors or self._mode == "union":
                yield key, tuple(tensors)

    def report(self) -> None:
        """Adds what was found to the problems and notes."""
        problems: list[str] = []
        lead = self._sources[0]
        for i, source in enumerate(self._sources):
            missing, extra = self._missing.get(i, {}), self._extra.get(i, {})
            for name, info in list(missing.items())[:_LISTED]:
                inside = [other for other in extra if other.endswith("." + name)]
                hint = (
                    f"; did you mean {inside[0]!r}?" if inside else nearest(name, [*extra][:2000])
                )
                problems.append(
                    f"{source.name}: tensor {name!r} is missing ({lead.name} has {_shown(info)})"
                    f"{hint}"
                )
            for name, info in list(extra.items())[:_LISTED]:
                problems.append(
                    f"{source.name}: extra tensor {name!r} ({_shown(info)}), which {lead.name} does "
                    "not have"
                )
            for kind, names in (("missing", missing), ("extra", extra)):
                if len(names) > _LISTED:
                    problems.append(f"{source.name}: {len(names) - _LISTED} more {kind} tensors")
        if problems:
            problems[-1] += (
                "; `tensors: intersection` in the recipe merges only what all have, `tensors: union` "
                "also what some have"
            )
        self._matcher.problems += problems
        for owner, (name, table) in self._tied.items():
            self._matcher.notes.append(
                f"{owner}: there is no {name!r}; the embedding {table!r}, which is tied to it, is "
                "merged in its place"
            )

    def _or_table(
        self, source: int, key: str, tensors: Sequence[TensorInfo | None]
    ) -> TensorInfo | None:
        """The tensor itself, or for an output head that is tied and not stored the embedding."""
        if tensors[source] is not None or not layers.is_head(key):
            return tensors[source]
        like = next(info for info in tensors if info is not None)
        owner = self._sources[source]
        if _unties(owner):
            return None
        tables = [
            info
            for name, info in owner.tensors.items()
            if layers.is_token_table(name) and info.shape[1:] == like.shape[1:]
        ]
        if len(tables) != 1:
            return None
        self._tied[owner.name] = key, tables[0].name
        return tables[0]

    def _note_missing(
        self,
        key: str,
        tensors: Sequence[TensorInfo | None],
        named: Callable[[int, str], str],
    ) -> None:
        lead = tensors[0]
        for i, info in enumerate(tensors[1:], start=1):
            if lead is not None and info is None:
                self._missing.setdefault(i, {})[named(i, key)] = lead
            elif lead is None and info is not None:
                self._extra.setdefault(i, {})[named(i, key)] = info


def _unties(source: PlannedSource) -> bool:
    """Whether a config says that output head and embedding are not one tensor."""
    entries = layers.walk(source.config or {})
    return any(key == "tie_word_embeddings" and value is False for _, key, value in entries)


def _rest(found: Anatomy, name: str) -> str:
    at = found.places[name]
    assert at is not None
    return at.rest


def _shown(info: TensorInfo) -> str:
    return f"{info.dtype}{list(info.shape)}"
