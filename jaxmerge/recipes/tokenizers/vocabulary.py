"""The output's vocabulary, and where each model has its tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jaxmerge.converters import CheckpointError
from jaxmerge.recipes.tokenizers.added_tokens import AddedToken
from jaxmerge.recipes.tokenizers.tokenizer import Tokenizer, read_tokenizer, without_tokens_from
from jaxmerge.tree import nearest

_LISTED = 3


@dataclass(frozen=True)
class VocabularyModel:
    """A model whose tokens are looked up.

    Attributes:
        name: as the recipe names it.
        folder: where its tokenizer's files are.
        rows: how many rows its embeddings have.
    """

    name: str
    folder: str
    rows: int


@dataclass(frozen=True)
class TokenRule:
    """What a recipe says of one token's embedding.

    Attributes:
        kind: "zero"; "model": the same token of a model; "model_token": another token of a model;
            None: nothing, the token is only added.
        model: index of the model.
        token: the other token, or None.
        token_id: the other token's id, or None.
        force: the rule also holds for models that have the token.
    """

    kind: Literal["zero", "model", "model_token"] | None = None
    model: int | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The output's vocabulary.

    Attributes:
        tokenizer: the output's.
        tokens: its tokens by id; None for an id that no token has.
        size: rows of the output's embeddings, padding counted.
        models: the models whose rows it takes, in order.
        places: for each model, int32 `[tokens]`: the token's row there, -1 where it has none.
        rules: by token.
        base: whether the first model is the base.
        changed: whether the tokenizer differs from the files that it was read from.
        notes: remarks for the user.
    """

    tokenizer: Tokenizer
    tokens: tuple[str | None, ...]
    size: int
    models: tuple[VocabularyModel, ...]
    places: tuple[np.ndarray, ...]
    rules: Mapping[str, TokenRule]
    base: bool
    changed: bool
    notes: tuple[str, ...]

    @property
    def padding(self) -> int:
        """How many rows belong to no token."""
        return self.size - len(self.tokens)


def plan_vocabulary(
    models: Sequence[VocabularyModel],
    source: Literal["union", "base"] | str,
    *,
    base: bool,
    rules: Mapping[str, TokenRule] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Vocabulary:
    """Builds the output's vocabulary as mergekit does.

    "union" keeps the ids of the base's tokens (of the first model's without a base); then come the
    other models' own tokens, model by model in the order of their ids, then their added tokens.
    All are added tokens of the base's tokenizer: they are found in the text itself.

    Args:
        models: the models, the base first.
        source: "union", "base", or the folder of a model whose tokenizer is taken as it is.
        base: whether the first model is the base.
        rules: what the recipe says of single tokens, which are added where they are not there.
        pad_to_multiple_of: of the number of rows.

    Returns:
        The vocabulary with the places of its tokens in every model.

    Raises:
        CheckpointError: a tokenizer that cannot be read, or a rule that cannot be kept.
    """
    rules = dict(rules or {})
    notes: list[str] = []
    whole = read_tokenizer(models[0].folder)
    tokenizers = _read_others(models, without_tokens_from(whole, models[0].rows), notes)
    read = whole if source in ("union", "base") else read_tokenizer(source)
    chosen = tokenizers[0] if source in ("union", "base") else read
    if source == "union":
        chosen = chosen.added(_union(tokenizers, models))
    known = chosen.table.vocabulary()
    chosen = chosen.added([AddedToken(token) for token in rules if token not in known])
    changed = (chosen.table.own, chosen.table.added) != (read.table.own, read.table.added)
    tokens = _by_id(chosen.table.vocabulary())
    places = []
    for model, tokenizer in zip(models, tokenizers, strict=True):
        vocabulary = tokenizer.table.vocabulary()
        own = np.array([-1 if t is None else vocabulary.get(t, -1) for t in tokens], np.int32)
        if os.path.samefile(tokenizer.folder, chosen.folder):
            # Ids that no token has keep their rows.
            own = np.where([token is None for token in tokens], np.arange(len(tokens)), own)
        beyond = own >= model.rows
        if beyond.any():
            lost = [repr(tokens[i]) for i in np.flatnonzero(beyond)]
            notes.append(
                f"{model.name}: {len(lost)} tokens ({', '.join(lost[:_LISTED])}) have ids beyond its "
                f"{model.rows} rows and count as missing"
            )
        places.append(np.where(beyond, -1, own).astype(np.int32))
    _check_rules(rules, models, tokenizers, tokens, places)
    multiple = pad_to_multiple_of or 1
    return Vocabulary(
        tokenizer=chosen,
        tokens=tokens,
        size=-(-len(tokens) // multiple) * multiple,
        models=tuple(models),
        places=tuple(places),
        rules={token: _by_number(rule, tokenizers) for token, rule in rules.items()},
        base=base,
        changed=changed,
        notes=tuple(notes),
    )


def _read_others(
    models: Sequence[VocabularyModel], first: Tokenizer, notes: list[str]
) -> list[Tokenizer]:
    tokenizers = [first]
    for model in models[1:]:
        if model.folder == models[0].folder:
            tokenizers.append(first)
            continue
        try:
            # Merges take most of the memory, and only the output's are wanted.
            tokenizers.append(replace(read_tokenizer(model.folder), document=None))
        except CheckpointError as error:
            if "no tokenizer" not in str(error):
                raise
            notes.append(
                f"{model.name} has no tokenizer: {models[0].name}'s is taken to be its own"
            )
            tokenizers.append(first)
    return tokenizers


def _union(tokenizers: Sequence[Tokenizer], models: Sequence[VocabularyModel]) -> list[AddedToken]:
    """Returns what the first tokenizer lacks: plain tokens, then added ones with their settings."""
    added: dict[str, AddedToken] = {}
    plain: dict[str, None] = {}
    for tokenizer, model in zip(tokenizers, models, strict=True):
        for place, token in sorted(tokenizer.table.added.items()):
            if place < model.rows:
                added.setdefault(token.content, token)
        special = {token.content for token in tokenizer.table.added.values()}
        own = sorted(tokenizer.table.own.items(), key=lambda item: item[1])
        for content, place in own:
            if place < model.rows and content not in special:
                plain.setdefault(content)
    first = tokenizers[0].table.vocabulary()
    missing = [AddedToken(one) for one in plain if one not in added and one not in first]
    return [*missing, *added.values()]


def _by_id(vocabulary: Mapping[str, int]) -> tuple[str | None, ...]:
    tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, place in vocabulary.items():
        tokens[place] = token
    return tuple(tokens)


def _by_number(rule: TokenRule, tokenizers: Sequence[Tokenizer]) -> TokenRule:
    if rule.kind != "model_token" or rule.token is None or rule.model is None:
        return rule
    place = tokenizers[rule.model].table.id_of(rule.token)
    return TokenRule("model_token", rule.model, rule.token, place, rule.force)


def _check_rules(
    rules: Mapping[str, TokenRule],
    models: Sequence[VocabularyModel],
    tokenizers: Sequence[Tokenizer],
    tokens: Sequence[str | None],
    places: Sequence[np.ndarray],
) -> None:
    ids = {token: place for place, token in enumerate(tokens) if token is not None}
    for token, rule in rules.items():
        owners = [own[ids[token]] >= 0 for own in places]
        if all(owners) and not rule.force:
            continue
        if rule.kind is None and rule.force:
            raise CheckpointError(f"token {token!r}: `force` needs a `source`")
        if rule.model is None:
            continue
        model, vocabulary = models[rule.model], tokenizers[rule.model].table.vocabulary()
        if rule.kind == "model" and not owners[rule.model]:
            raise CheckpointError(
                f"token {token!r}: its source {model.name} does not have it{nearest(token, vocabulary)}"
            )
        if rule.kind == "model_token":
            wanted = rule.token_id if rule.token is None else vocabulary.get(rule.token)
            if wanted is None:
                assert rule.token is not None
                raise CheckpointError(
                    f"token {token!r}: its source {model.name} has no token {rule.token!r}"
                    f"{nearest(rule.token, vocabulary)}"
                )
            if not 0 <= wanted < model.rows:
                raise CheckpointError(
                    f"token {token!r}: its source {model.name} has {model.rows} rows and no row {wanted}"
                )
