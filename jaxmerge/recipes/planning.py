"""Makes the plan of a merge from headers: what is read and written, and what would go wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxmerge import methods
from jaxmerge._version import __version__
from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.converters.folder import TORCH_SUFFIXES
from jaxmerge.methods import MergeMethod
from jaxmerge.recipes import layers
from jaxmerge.recipes.adapted import AdaptedModels
from jaxmerge.recipes.alignment import PlannedAlignment, plan_alignment
from jaxmerge.recipes.configs import with_layers, with_own_head, with_vocabulary
from jaxmerge.recipes.dialect import mergekit_name
from jaxmerge.recipes.embedding_rows import EmbeddingRows
from jaxmerge.recipes.errors import PlanError, place
from jaxmerge.recipes.matching import Matched, Matcher
from jaxmerge.recipes.output import bytes_text, is_finished, is_unfinished, output_problems
from jaxmerge.recipes.parameters import hyperparameters
from jaxmerge.recipes.plan import (
    Plan,
    PlannedInput,
    PlannedMerge,
    PlannedSource,
    PlannedTensor,
)
from jaxmerge.recipes.resolve import Part, Resolved, resolve
from jaxmerge.recipes.schema import Recipe
from jaxmerge.recipes.sources import Sources
from jaxmerge.recipes.streaming.memory import memory_needed
from jaxmerge.recipes.tokenizers import TokenizerFiles
from jaxmerge.tree import depths, nearest

_LISTED = 5

Hyperparameters = Mapping[str, float | tuple[float, ...]]


def make_plan(
    recipe: Recipe | Resolved,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    memory_limit: int | None = None,
    merged: Mapping[str, Plan] | None = None,
) -> Plan:
    """Makes the plan of a merge; reads headers only.

    Models that are merged together must hold the same tensors, in the same shapes and kinds of
    dtype, unless the recipe says `tensors: union` or `intersection`. Merged tensors get the
    recipe's `out_dtype`, else its `dtype`, else the widest of the sources' (in the jaxmerge
    dialect that of the base, or of the first model); the others are carried over as they are.

    Args:
        recipe: the recipe, resolved or not.
        out: where the output will go, a folder or a checkpoint file; None to plan without checks
            of the output.
        overwrite: an output that exists may be replaced.
        seed: of random methods.
        memory_limit: bytes that the merge may hold in memory, all in all; None for no limit.
        merged: plans of other merges, with an output, that the recipe uses by their names.

    Raises:
        RecipeError: the recipe cannot be resolved.
        PlanError: with every problem of sources and output.
    """
    resolved = recipe if isinstance(recipe, Resolved) else resolve(recipe)
    output = None if out is None else Path(out).expanduser()
    sources = Sources(resolved, merged or {})
    sources.open_all(
        [resolved.donor, *(model.reference for part in resolved.parts for model in part.sources)]
    )
    planner = _Planner(resolved, sources)
    alignment: PlannedAlignment | None = None
    if not sources.problems:
        alignment = planner.plan()
    problems = [*sources.problems, *planner.problems]
    if problems:
        if output is not None:
            problems += output_problems(output, sources=sources.paths, overwrite=overwrite)
        raise PlanError(problems)
    memory = memory_needed(planner.tensors, planner.merges)
    wants = resolved.method.name
    if alignment is not None and alignment.memory > memory:
        memory, wants = alignment.memory, "`align`"
    if memory_limit is not None and memory > memory_limit:
        raise PlanError(
            [
                f"{wants} needs {bytes_text(memory)} of memory here, more than the limit of "
                f"{bytes_text(memory_limit)}"
            ]
        )
    opened = tuple(sources.opened)
    fingerprint = _fingerprint(
        resolved, opened, seed, merged or {}, planner.rows.digest(), alignment
    )
    written = _bytes_written(planner.tensors, output)
    if output is not None:
        problems = output_problems(
            output,
            sources=sources.paths,
            nbytes=written,
            fingerprint=fingerprint,
            overwrite=overwrite,
        )
        if problems:
            raise PlanError(problems)
    used = {(one.source, one.name) for tensor in planner.tensors for one in tensor.inputs}
    return Plan(
        resolved=resolved,
        sources=opened,
        models=tuple(sources.of(reference) for reference in resolved.models),
        base=None if resolved.base is None else sources.of(resolved.base),
        merges=tuple(planner.merges),
        tensors=tuple(planner.tensors),
        ties=planner.ties,
        bytes_read=sum(opened[source].tensors[name].nbytes for source, name in used),
        bytes_written=written,
        memory=memory,
        seed=seed,
        fingerprint=fingerprint,
        output=output,
        overwrite=overwrite,
        resumes=output is not None and is_unfinished(output, fingerprint),
        done=output is not None and not overwrite and is_finished(output, fingerprint),
        notes=(*resolved.notes, *sources.notes, *planner.notes),
        config=planner.config,
        row_maps=tuple(planner.rows.row_maps),
        tokenizer_files=planner.tokenizer_files,
        alignment=alignment,
    )


class _Planner:
    """Decides for every tensor of the output what is done, and collects what is wrong."""

    def __init__(self, resolved: Resolved, sources: Sources) -> None:
        self.resolved = resolved
        self.sources = sources
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.merges: list[PlannedMerge] = []
        self.tensors: list[PlannedTensor] = []
        self.ties: tuple[tuple[str, ...], ...] = ()
        self.config: Mapping[str, Any] | None = None
        self.tokenizer_files: TokenizerFiles | None = None
        references = [model.reference for part in resolved.parts for model in part.sources]
        self.adapted = AdaptedModels(sources, [resolved.donor, *references])
        self.rows = EmbeddingRows(resolved, sources)
        # The tensors' own recipes: that of each block, and last that of the rest.
        self._recipes = (*(block.resolved for block in resolved.blocks), resolved)
        self._indices: dict[tuple[int, int], int] = {}
        self._numbers: dict[Hashable, tuple[Hyperparameters, list[tuple[str, int | None]]]] = {}
        self._filters = [[part.parameters.filters for part in one.parts] for one in self._recipes]
        self._idle = dict.fromkeys(text for one in self._filters for part in one for text in part)
        self._idle_blocks = set(range(len(resolved.blocks)))
        self._names: list[str] = []
        self._others: dict[str, list[str]] = {}
        self._wrong: dict[str, list[str]] = {}
        self._unset: dict[tuple[str, str | None], list[str]] = {}

    def plan(self) -> PlannedAlignment | None:
        """Decides everything about tensors; returns how the models are aligned, if they are."""
        matcher = Matcher(self.resolved, self.sources)
        found = matcher.match()
        self._names = [matched.name for matched in found]
        self.notes += matcher.notes
        self.problems += matcher.problems
        self._check_sources()
        # A merge that all tensors share comes first.
        self._merge_index(len(self.resolved.blocks), self.resolved.method, self.resolved.options)
        depth = depths(matched.name for matched in found)
        for matched in found:
            self._add(matched, depth[matched.name])
        self._report()
        self.rows.check_found()
        self.tokenizer_files = self.rows.files()
        self.problems += self.rows.problems
        self.notes += [*self.adapted.notes, *self.rows.notes]
        alignment, problems = plan_alignment(self.resolved, self.sources)
        self.problems += problems
        if alignment is not None and self.rows.row_maps:
            self.problems.append(
                "`align`: the models' vocabularies differ, so their units cannot be compared; bring "
                "them to one vocabulary first, with a recipe of its own"
            )
        if self.problems:
            return None
        self.tensors, self.ties = _tied(self.tensors, self.sources.opened, self.notes)
        self._note_idle_bases()
        self._note_idle_filters()
        self.config = self._config(matcher)
        return alignment

    def _check_sources(self) -> None:
        used = {self.sources.of(m.reference) for part in self.resolved.parts for m in part.sources}
        for index in sorted(used):
            source = self.sources.opened[index]
            if not source.tensors:
                self.problems.append(f"{source.name}: there is no tensor in it")

    def _add(self, matched: Matched, depth: float) -> None:
        part = None if matched.part is None else self.resolved.parts[matched.part]
        given = self._inputs(matched, part)
        if not self._fits(matched, given):
            return
        first = next(one for one in given if one is not None)
        size = math.prod(first.shape)
        floating = _kind(first.dtype) == "float" and size > 0
        merge = 0
        hyperparams: Hyperparameters = {}
        models: tuple[PlannedInput, ...] = (first,)
        base: PlannedInput | None = None
        dtype = self._stored_dtype(first)
        if floating:
            chosen = self._chosen(matched, part, given)
            if chosen is None:
                return
            merge, models, base, hyperparams = chosen
            dtype = self.resolved.written_dtype or self._own_dtype(models, base)
        self.tensors.append(
            PlannedTensor(
                name=matched.name,
                shape=first.shape,
                dtype=dtype,
                nbytes=size * storage_dtype(dtype).itemsize,
                tied_to=None,
                action="merge" if floating else "carry",
                merge=merge,
                models=models,
                base=base,
                hyperparameters=hyperparams,
                depth=depth,
            )
        )

    def _inputs(self, matched: Matched, part: Part | None) -> list[PlannedInput | None]:
        if part is None:
            models, base = [self.resolved.donor], None
        else:
            models = [model.reference for model in part.sources]
            base = None if part.base is None else part.base.reference
        given = [
            None
            if info is None
            else self.adapted.input(
                model, PlannedInput(self.sources.of(model), info.name, info.shape, info.dtype)
            )
            for model, info in zip(models, matched.tensors, strict=True)
        ]
        return self.rows.mapped(matched.name, models, given, base)

    def _chosen(
        self, matched: Matched, part: Part | None, given: Sequence[PlannedInput | None]
    ) -> tuple[int, tuple[PlannedInput, ...], PlannedInput | None, Hyperparameters] | None:
        """The merge of one tensor: which one, of what, with which numbers."""
        present = [one for one in given if one is not None]
        if part is None:
            return self._alone(present[0])
        assert matched.part is not None
        own = self._recipe_of(matched.name)
        part = self._recipes[own].parts[matched.part]
        method, options = self._recipes[own].merge_for(part, matched.name, matched.at)
        has_base = part.base is not None
        base = given[0] if has_base and method.base != "unused" else None
        places = [i for i in range(len(part.models)) if given[i + has_base] is not None]
        lacks_base = has_base and method.base != "unused" and base is None
        counted = len(places) + (method.base == "source" and base is not None)
        if lacks_base or counted < method.models[0]:
            if len(present) == 1:
                return self._alone(present[0])
            lacking = part.sources[next(i for i, one in enumerate(given) if one is None)].reference
            self._wrong.setdefault(str(lacking), []).append(
                f"{lacking}: tensor {matched.name!r} is missing, and {method.name} cannot merge the "
                f"others' without it"
            )
            return None
        names = [matched.names[i + has_base] for i in places]
        numbers = self._hyperparameters(own, method, part, matched, names, places)
        if numbers is None:
            return None
        models = tuple(one for one in given[has_base:] if one is not None)
        return self._merge_index(own, method, options), models, base, numbers

    def _recipe_of(self, name: str) -> int:
        """Which of the recipes is a tensor's."""
        for i, block in enumerate(self.resolved.blocks):
            if block.holds(name):
                self._idle_blocks.discard(i)
                return i
        return len(self.resolved.blocks)

    def _alone(
        self, one: PlannedInput
    ) -> tuple[int, tuple[PlannedInput, ...], PlannedInput | None, Hyperparameters]:
        """What one source alone has is taken as it is."""
        method = methods.get("passthrough")()
        rest = len(self.resolved.blocks)
        index = self._merge_index(rest, method, methods.options(methods.get("passthrough")))
        return index, (one,), None, {name: s.default for name, s in method.hyperparams.items()}

    def _merge_index(self, own: int, method: MergeMethod, options: Mapping[str, Any]) -> int:
        """A merge of each recipe for itself: what is measured over a whole model is measured over a block."""
        key = (own, id(method))
        if key not in self._indices:
            self._indices[key] = len(self.merges)
            self.merges.append(PlannedMerge(method, options))
        return self._indices[key]

    def _hyperparameters(
        self,
        own: int,
        method: MergeMethod,
        part: Part,
        matched: Matched,
        names: Sequence[str],
        places: Sequence[int],
    ) -> Hyperparameters | None:
        """The numbers of one tensor; tensors that nothing tells apart share them."""
        assert matched.part is not None
        filters = self._filters[own][matched.part]
        told = tuple(text in name for name in (matched.name, *names) for text in filters)
        for text in filters:
            if text in self._idle and any(text in name for name in (matched.name, *names)):
                del self._idle[text]
        at = matched.at if part.parameters.varies else 0.0
        key = (own, id(method), matched.part, at, told, tuple(places))
        if key not in self._numbers:
            self._numbers[key] = hyperparameters(
                method, part.parameters, matched.name, names, chosen=places, at=at
            )
        found, missing = self._numbers[key]
        for name, model in missing:
            owner = None if model is None else str(part.models[model].reference)
            self._unset.setdefault((name, owner), []).append(matched.name)
        return None if missing or not self._whole(method, found, matched) else found

    def _whole(self, method: MergeMethod, found: Hyperparameters, matched: Matched) -> bool:
        for name, spec in method.hyperparams.items():
            value = found.get(name, 0.0)
            if (
                spec.kind == "index"
                and not float(value if isinstance(value, float) else 0).is_integer()
            ):
                self._wrong.setdefault(name, []).append(
                    f"{mergekit_name(name)!r} is a whole number; its gradient gives {value:g} for "
                    f"{matched.name!r}"
                )
                return False
        return True

    def _own_dtype(self, models: Sequence[PlannedInput], base: PlannedInput | None) -> str:
        if self.resolved.recipe.dialect == "jaxmerge":
            return self._stored_dtype(base or models[0])
        dtypes = {self._stored_dtype(one) for one in (*models, *([base] if base else []))}
        if len(dtypes) == 1:
            return dtypes.pop()
        return "float64" if "float64" in dtypes else "float32"

    def _stored_dtype(self, one: PlannedInput) -> str:
        return self.sources.opened[one.source].tensors[one.name].dtype

    # What does not fit

    def _fits(self, matched: Matched, given: Sequence[PlannedInput | None]) -> bool:
        present = [one for one in given if one is not None]
        first, *others = present
        lead = self.sources.opened[first.source].name
        if _kind(first.dtype) == "complex":
            self._wrong.setdefault(lead, []).append(
                f"{lead}: tensor {first.name!r} is complex; no method merges it"
            )
            return False
        fits = True
        for one in others:
            owner = self.sources.opened[one.source].name
            if one.shape != first.shape:
                self._wrong.setdefault(owner, []).append(
                    f"{owner}: tensor {one.name!r} has shape {list(one.shape)}, expected "
                    f"{list(first.shape)} as in {lead}{self._about_rows(matched, one, first)}"
                )
                fits = False
            elif _kind(one.dtype) != _kind(first.dtype):
                self._wrong.setdefault(owner, []).append(
                    f"{owner}: tensor {one.name!r} is {one.dtype}, expected a kind of "
                    f"{_kind(first.dtype)} as in {lead} ({first.dtype})"
                )
                fits = False
            elif (stored := self._stored_dtype(one)) != self._stored_dtype(first):
                text = f"{one.name!r}: {stored}, {self._stored_dtype(first)}"
                self._others.setdefault(f"{owner}\0{lead}", []).append(text)
        return fits

    def _about_rows(self, matched: Matched, one: PlannedInput, first: PlannedInput) -> str:
        if not (layers.is_token_table(matched.name) or layers.is_head(matched.name)):
            return ""
        if one.shape[1:] != first.shape[1:]:
            return ""
        return (
            "; the vocabularies differ: say in the recipe which one the output gets, as in "
            "`tokenizer: {source: base}`"
        )

    def _report(self) -> None:
        for owner, wrong in self._wrong.items():
            self.problems += wrong[:_LISTED]
            if len(wrong) > _LISTED:
                self.problems.append(f"{owner}: {len(wrong) - _LISTED} more tensors do not match")
        recipe = self.resolved.recipe
        for (name, model), unset in self._unset.items():
            whose = "" if model is None else f" for {model!r}"
            text = (
                f"{self.resolved.method.name} needs {mergekit_name(name)!r}{whose} for every tensor: "
                f"no filter lets {unset[0]!r} through"
                + (f", nor {len(unset) - 1} more" if len(unset) > 1 else "")
            )
            self.problems.append(place(recipe.filename, recipe.line("parameters"), text))
        for i in sorted(self._idle_blocks):
            text = (
                f"block {i + 1}: no tensor that is merged is left for "
                f"{', '.join(map(repr, self.resolved.blocks[i].patterns[:_LISTED]))}"
                f"{nearest(self.resolved.blocks[i].patterns[0], self._names)}"
            )
            self.problems.append(place(recipe.filename, recipe.line("blocks", i), text))
        for pair, texts in self._others.items():
            owner, lead = pair.split("\0")
            self.notes.append(
                f"{owner}: {len(texts)} tensors have another dtype than in {lead} ({texts[0]})"
            )

    def _note_idle_bases(self) -> None:
        for part in self.resolved.parts:
            if part.base is None or self.resolved.method.base != "required":
                continue
            base = self.sources.of(part.base.reference)
            if part.slice is None and base in [self.sources.of(m.reference) for m in part.models]:
                name = self.sources.opened[base].name
                self.notes.append(f"{name} is also a model to merge: its task vector is 0")

    def _note_idle_filters(self) -> None:
        parts = {part for tensor in self.tensors for part in tensor.name.split(".")}
        for text in self._idle:
            self.notes.append(
                f"filter {text!r} is in the name of no tensor that is merged{nearest(text, parts)}"
            )

    # The config of the output

    def _config(self, matcher: Matcher) -> Mapping[str, Any] | None:
        donor = self.sources.opened[0]
        if donor.config is None:
            return None
        config = dict(donor.config)
        for stacked in matcher.stacked:
            config = with_layers(config, stacked)
        if self.rows.vocabulary is not None:
            moved = self.rows.moved(config)
            config = with_vocabulary(config, self.rows.vocabulary.size, moved)
            if moved:
                self.notes.append(
                    f"config.json: {', '.join(moved)} follow their tokens; mergekit leaves the ids of the "
                    "base"
                )
        tied = {name for group in self.ties for name in group}
        tables = any(layers.is_token_table(tensor.name) for tensor in self.tensors)
        heads = [tensor.name for tensor in self.tensors if layers.is_head(tensor.name)]
        says_tied = any(
            key == "tie_word_embeddings" and value for _, key, value in layers.walk(config)
        )
        if says_tied and tables and heads and not tied & set(heads):
            config = with_own_head(config)
            self.notes.append(
                f"{heads[0]!r} is a tensor of its own in the output; its config says so "
                "(tie_word_embeddings: false)"
            )
        return None if config == donor.config else config


def _tied(
    tensors: Sequence[PlannedTensor], sources: Sequence[PlannedSource], notes: list[str]
) -> tuple[list[PlannedTensor], tuple[tuple[str, ...], ...]]:
    """Ties the tensors that are tied in every source, and merged with the same numbers."""
    leaders = [{name: group[0] for group in s.ties for name in group} for s in sources]
    groups: dict[Hashable, list[PlannedTensor]] = {}
    seen: dict[Hashable, int] = {}
    for tensor in tensors:
        own = tuple((one.source, one.name) for one in tensor.inputs)
        if not all(name in leaders[source] for source, name in own):
            continue
        # A layer that stands in the output several times is not tied to itself.
        copy = seen[own] = seen.get(own, 0) + 1
        key = (
            tuple((source, leaders[source][name]) for source, name in own),
            tensor.base is None,
            tensor.merge,
            tensor.dtype,
            tuple(tensor.hyperparameters.items()),
            copy,
        )
        groups.setdefault(key, []).append(tensor)
    tied = {
        tensor.name: replace(group[0], name=tensor.name, tied_to=group[0].name)
        for group in groups.values()
        for tensor in group[1:]
    }
    kept = {
        (one.source, one.name)
        for group in groups.values()
        if len(group) > 1
        for tensor in group
        for one in tensor.inputs
    }
    used = {(one.source, one.name) for tensor in tensors for one in tensor.inputs}
    for index, source in enumerate(sources):
        loose = [
            name
            for group in source.ties
            for name in group
            if (index, name) in used and (index, name) not in kept
        ]
        if loose:
            notes.append(
                f"{source.name}: {', '.join(map(repr, loose[:_LISTED]))} are tied there but not in "
                "every source; they are written apart"
            )
    common = tuple(
        tuple(tensor.name for tensor in group) for group in groups.values() if len(group) > 1
    )
    return [tied.get(tensor.name, tensor) for tensor in tensors], common


def _fingerprint(
    resolved: Resolved,
    sources: Sequence[PlannedSource],
    seed: int,
    merged: Mapping[str, Plan],
    vocabulary: str | None,
    alignment: PlannedAlignment | None,
) -> str:
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
    if vocabulary is not None:
        content["vocabulary"] = vocabulary
    if alignment is not None:
        content["inputs"] = [(os.path.abspath(file), *stamp) for file, *stamp in alignment.files]
    if merged:
        content["merged"] = {name: plan.fingerprint for name, plan in sorted(merged.items())}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes_written(tensors: Iterable[PlannedTensor], output: Path | None) -> int:
    # Safetensors gives tied names bytes of their own.
    shared = output is not None and output.suffix in TORCH_SUFFIXES
    return sum(tensor.nbytes for tensor in tensors if not (shared and tensor.tied_to))


def _kind(dtype: str) -> str:
    if dtype.startswith(("float", "bfloat")):
        return "float"
    return "int" if dtype.startswith(("int", "uint")) else dtype.rstrip("0123456789")
