"""Embeddings and output heads whose rows are put in the order of the output's vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.converters import CheckpointError
from jaxmerge.recipes.errors import place
from jaxmerge.recipes.inputs import RowMap
from jaxmerge.recipes.plan import PlannedInput
from jaxmerge.recipes.reference import ModelReference
from jaxmerge.recipes.resolve import Resolved
from jaxmerge.recipes.schema import Token
from jaxmerge.recipes.sources import Sources
from jaxmerge.recipes.tokenizers import (
    TokenizerFiles,
    TokenRule,
    Vocabulary,
    VocabularyModel,
    chosen_template,
    embedding_rows,
    is_named_table,
    may_be_table,
    plan_vocabulary,
    read_json,
    read_tokenizer,
    rows_for,
    tokenizer_files,
    vocabulary_size,
)
from jaxmerge.tree import nearest

_GENERATION = "generation_config.json"


class EmbeddingRows:
    """Maps the rows of a recipe's models to those of the output, where the recipe has a tokenizer.

    Args:
        resolved: the recipe.
        sources: its sources, open.

    Attributes:
        vocabulary: the output's; None where the recipe has no tokenizer.
        row_maps: what the inputs' `rows` count.
        problems: what is wrong.
        notes: remarks for the user.
    """

    def __init__(self, resolved: Resolved, sources: Sources) -> None:
        self.vocabulary: Vocabulary | None = None
        self.row_maps: list[RowMap] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._resolved = resolved
        self._sources = sources
        self._models = _references(resolved)
        self._rows: dict[ModelReference, int] = {}
        if resolved.recipe.tokenizer is not None:
            try:
                self.vocabulary = self._plan()
                self.notes += self.vocabulary.notes
                self._note_size()
            except (CheckpointError, OSError) as error:
                self._problem(str(error))

    def mapped(
        self,
        name: str,
        references: Sequence[ModelReference],
        given: Sequence[PlannedInput | None],
        base: ModelReference | None,
    ) -> list[PlannedInput | None]:
        """Returns the inputs of a tensor with their rows mapped, if it has a row for each token.

        Args:
            name: the tensor's name in the output.
            references: the models that are merged.
            given: the tensor in each of them.
            base: the base that they are merged with, or None.
        """
        present = [(m, one) for m, one in zip(references, given, strict=True) if one is not None]
        if self.vocabulary is None or not self._has_rows(name, present):
            return list(given)
        if not is_named_table(name):
            self.notes.append(
                f"tensor {name!r} is taken to have a row for each token: it has as many as the embedding"
            )
        held = {self._models.index(model): one for model, one in present}
        base = base or self._resolved.recipe.base_model
        number = self._models.index(base) if base in self._models else None
        try:
            rows = rows_for(self.vocabulary, tuple(held), number)
        except CheckpointError as error:
            self._problem(f"tensor {name!r}: {error}")
            return list(given)
        averaged = self.vocabulary.padding or any(found.averages for found in rows.values())
        dtypes = {one.dtype for one in held.values()}
        dtype = "float32" if averaged or len(dtypes) > 1 else min(dtypes)
        dtype = "float64" if "float64" in dtypes else dtype
        order = {model: index for index, model in enumerate(held)}
        tables = tuple(held.values())
        result: dict[int, PlannedInput] = {}
        for model, one in held.items():
            found = rows[model]
            table = np.array([order.get(int(m), -1) for m in range(len(self._models))], np.int32)
            self.row_maps.append(
                RowMap(
                    tables=tables,
                    table=np.where(found.table < 0, np.int32(-1), table[found.table]),
                    row=found.row,
                    averages={
                        row: tuple((order[m], at) for m, at in pairs)
                        for row, pairs in found.averages.items()
                    },
                    padding=self.vocabulary.padding,
                )
            )
            result[model] = replace(
                one,
                shape=(self.vocabulary.size, *one.shape[1:]),
                dtype=dtype,
                rows=len(self.row_maps) - 1,
                adapters=(),
            )
        return [
            None if one is None else result[self._models.index(model)]
            for model, one in zip(references, given, strict=True)
        ]

    def check_found(self) -> None:
        """Notes a problem if no tensor has been mapped."""
        if self.vocabulary is not None and not self.row_maps and not self.problems:
            self._problem("no tensor was found that has a row for each token of the vocabulary")

    def files(self) -> TokenizerFiles | None:
        """Returns what becomes of the tokenizer's files; None: the donor's are kept."""
        template = self._template()
        tokenizer = None if self.vocabulary is None else self.vocabulary.tokenizer
        if tokenizer is None and template is None:
            return None
        try:
            folder = self._folder(self._models[0]) if tokenizer is None else tokenizer.folder
            changed = self.vocabulary is not None and self.vocabulary.changed
            files = tokenizer_files(folder, tokenizer if changed else None, template)
            return replace(files, written={**files.written, **self._generation()})
        except CheckpointError as error:
            self._problem(str(error), "chat_template")
            return None

    def _generation(self) -> dict[str, str]:
        """The donor's settings of generation, if they name tokens by ids that have moved."""
        config = read_json(self._folder(self._resolved.donor), _GENERATION) or {}
        moved = self.moved(config)
        return {_GENERATION: json.dumps({**config, **moved}, indent=2) + "\n"} if moved else {}

    def moved(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries of a config that name tokens by ids, where those ids have moved.

        Args:
            config: `config.json` or `generation_config.json` of the donor.
        """
        if self.vocabulary is None:
            return {}
        donor = self._folder(self._resolved.donor)
        if Path(donor).samefile(self.vocabulary.tokenizer.folder):
            return {}
        old = {at: token for token, at in read_tokenizer(donor).table.vocabulary().items()}
        new = self.vocabulary.tokenizer.table.vocabulary()
        declared = self.vocabulary.tokenizer.config

        def moved(key: str, value: Any) -> Any:
            if isinstance(value, list):
                return [moved(key, one) for one in value]
            token = declared.get(key.removesuffix("_id"))
            token = token.get("content") if isinstance(token, Mapping) else token
            return new.get(old.get(value, ""), new.get(str(token), value))

        found = {
            key: moved(key, value)
            for key, value in config.items()
            if key.endswith("_token_id") and isinstance(value, int | list)
        }
        return {key: value for key, value in found.items() if value != config[key]}

    def digest(self) -> str | None:
        """Returns what tells vocabularies apart; None without one."""
        if self.vocabulary is None:
            return None
        digest = hashlib.sha256(repr((self.vocabulary.tokens, self.vocabulary.size)).encode())
        for rows in self.row_maps:
            digest.update(rows.table.tobytes() + rows.row.tobytes())
            digest.update(repr(sorted(rows.averages.items())).encode())
        return digest.hexdigest()

    def _plan(self) -> Vocabulary:
        tokenizer = self._resolved.recipe.tokenizer
        assert tokenizer is not None
        base = self._resolved.recipe.base_model
        source = tokenizer.source
        if isinstance(source, ModelReference):
            try:
                path = source.locate(self._resolved.recipe.folder)
            except FileNotFoundError as error:
                hint = nearest(str(source), ("union", "base"))
                raise FileNotFoundError(f"{error}{hint}") from None
            source = str(path if path.is_dir() else path.parent)
        return plan_vocabulary(
            [self._model(reference) for reference in self._models],
            source,
            base=base is not None,
            rules={token: self._rule(token, rule) for token, rule in tokenizer.tokens.items()},
            pad_to_multiple_of=tokenizer.pad_to_multiple_of,
        )

    def _note_size(self) -> None:
        recipe, vocabulary = self._resolved.recipe, self.vocabulary
        assert recipe.tokenizer is not None
        assert vocabulary is not None
        lacking = [
            f"{int((own < 0).sum())} missing in {model.name}"
            for model, own in zip(vocabulary.models, vocabulary.places, strict=True)
            if (own < 0).any()
        ]
        padding = f" and {vocabulary.padding} more rows" if vocabulary.padding else ""
        self.notes.append(
            f"the output has {len(vocabulary.tokens)} tokens{padding}"
            + (f": {', '.join(lacking)}" if lacking else "")
        )
        if recipe.base_model is None and recipe.tokenizer.source in ("union", "base"):
            self.notes.append(
                f"without a `base_model` the tokenizer is based on {self._models[0]}'s, the first "
                "model's; mergekit takes that of any model"
            )

    def _model(self, reference: ModelReference) -> VocabularyModel:
        source = self._sources.opened[self._sources.of(reference)]
        size = vocabulary_size(source.config)
        rows = embedding_rows(source.tensors, size)
        if rows is None:
            raise CheckpointError(
                f"{source.name}: its vocabulary is not known: no config.json says `vocab_size`, and no "
                "tensor has the name of an embedding"
            )
        self._rows[reference] = rows
        return VocabularyModel(str(reference), self._folder(reference), min(rows, size or rows))

    def _rule(self, token: str, given: Token) -> TokenRule:
        source = given.source
        if source is None:
            return TokenRule(force=given.force)
        if source.model is None:
            return TokenRule(source.kind, force=given.force)
        if source.model not in self._models:
            raise CheckpointError(
                f"token {token!r}: its source {source.model} is none of the recipe's models"
            )
        model = self._models.index(source.model)
        return TokenRule(source.kind, model, source.token, source.token_id, given.force)

    def _has_rows(self, name: str, present: Sequence[tuple[ModelReference, PlannedInput]]) -> bool:
        """Whether a tensor has a row for each token: by its name, or since it grows as embeddings do."""
        assert self.vocabulary is not None
        if not all(one.shape for _, one in present):
            return False
        if is_named_table(name):
            needed = self.vocabulary.models
            return all(
                one.shape[0] >= needed[self._models.index(model)].rows for model, one in present
            )
        rows = {self._rows[model] for model, _ in present}
        return (
            len(rows) > 1
            and may_be_table(name)
            and all(one.shape[0] == self._rows[model] for model, one in present)
        )

    def _folder(self, reference: ModelReference) -> str:
        """Where a model's tokenizer is; that of another merge of the recipe is its donor's."""
        plan = self._sources.merged.get(reference.path)
        path = self._sources.opened[self._sources.of(reference)].path
        if plan is not None:
            path = plan.sources[0].path
            if plan.tokenizer_files is not None or not path.exists():
                raise CheckpointError(
                    f"{reference}: the tokenizer of this merge is not known before it has run: run it by "
                    "itself, and name its folder"
                )
        return str(path if path.is_dir() else path.parent)

    def _template(self) -> str | None:
        wanted = self._resolved.recipe.chat_template
        if wanted is None:
            return None
        try:
            template = chosen_template(wanted, [self._folder(one) for one in self._models])
        except CheckpointError as error:
            self._problem(str(error), "chat_template")
            return None
        if template is None:
            self.notes.append("chat_template: none of the models has one")
        elif wanted in ("exaone", "llama3"):
            self.notes.append(
                f"chat_template: {wanted} has the line breaks of the models of that family; mergekit's "
                "own copy has more of them"
            )
        return template

    def _problem(self, text: str, key: str = "tokenizer") -> None:
        recipe = self._resolved.recipe
        self.problems.append(place(recipe.filename, recipe.line(key), text))


def _references(resolved: Resolved) -> list[ModelReference]:
    """Every model of a recipe, the base first."""
    base = resolved.recipe.base_model
    first = [resolved.donor] if base is None else [base]
    used = [model.reference for part in resolved.parts for model in part.sources]
    return list(dict.fromkeys([*first, *used]))
