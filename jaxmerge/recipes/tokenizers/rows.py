"""Rows of embeddings and output heads for the output's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmerge.converters import CheckpointError
from jaxmerge.recipes.tokenizers.vocabulary import TokenRule, Vocabulary


@dataclass(frozen=True, eq=False)
class Rows:
    """Where one model's rows come from, see `jaxmerge.recipes.inputs.RowMap`.

    Attributes:
        table: int32 `[tokens]`: index of a model, or -1 for zeros.
        row: int32 `[tokens]`: the row there.
        averages: token's id -> (model, row) pairs whose mean it is.
    """

    table: np.ndarray
    row: np.ndarray
    averages: Mapping[int, tuple[tuple[int, int], ...]]


def rows_for(vocabulary: Vocabulary, present: Sequence[int], base: int | None) -> dict[int, Rows]:
    """Says for one tensor where each model's rows come from.

    A model keeps the rows that it has. A row that it lacks is, in this order: what the recipe's rule
    says; the row of the only model that has the token; zeros if no model has it; the base's row; the
    mean of all rows that there are.

    Args:
        vocabulary: the output's vocabulary.
        present: the models that have the tensor.
        base: which of them is the base of this tensor; None for none.

    Returns:
        For each of `present` its rows.

    Raises:
        CheckpointError: a rule takes rows from a model that lacks the tensor.
    """
    places = np.stack([vocabulary.places[model] for model in present])
    owned = places >= 0
    count = owned.sum(axis=0)
    rows = np.full(len(vocabulary.tokens), -1, np.int32)
    tables = rows.copy()
    only = np.argmax(owned, axis=0)
    donors = np.where(count == 1, only, -1)
    if base is not None and base in present:
        position = list(present).index(base)
        donors = np.where((count > 1) & owned[position], position, donors)
    given = donors >= 0
    tables[given] = np.asarray(present, np.int32)[donors[given]]
    rows[given] = places[donors[given], np.flatnonzero(given)]
    rules = _rules_by_id(vocabulary)
    averaged = np.flatnonzero((count > 1) & (count < len(present)) & ~given)
    averages = {
        int(place): tuple(
            (model, int(own[place]))
            for model, own in zip(present, places, strict=True)
            if own[place] >= 0
        )
        for place in averaged
        if int(place) not in rules
    }
    forced = np.zeros(len(rows), bool)
    for place, (token, rule) in rules.items():
        if not rule.force and count[place] == len(present):
            continue
        forced[place] = rule.force
        tables[place], rows[place] = _ruled(vocabulary, token, rule, place, present)
    result = {}
    for model, own in zip(present, places, strict=True):
        keeps = (own >= 0) & ~forced
        result[model] = Rows(
            table=np.where(keeps, np.int32(model), tables),
            row=np.where(keeps, own, rows),
            averages={place: pairs for place, pairs in averages.items() if own[place] < 0},
        )
    return result


def _rules_by_id(vocabulary: Vocabulary) -> dict[int, tuple[str, TokenRule]]:
    ids = {token: place for place, token in enumerate(vocabulary.tokens) if token is not None}
    return {
        ids[token]: (token, rule)
        for token, rule in vocabulary.rules.items()
        if rule.kind is not None
    }


def _ruled(
    vocabulary: Vocabulary, token: str, rule: TokenRule, place: int, present: Sequence[int]
) -> tuple[int, int]:
    if rule.kind == "zero":
        return -1, -1
    assert rule.model is not None
    if rule.model not in present:
        raise CheckpointError(
            f"token {token!r}: its source {vocabulary.models[rule.model].name} does not have the tensor"
        )
    if rule.kind == "model_token":
        assert rule.token_id is not None
        return rule.model, rule.token_id
    return rule.model, int(vocabulary.places[rule.model][place])
