"""Tokens added to a tokenizer's own vocabulary, and the ids that they get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxmerge.converters import CheckpointError


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text itself, before the text is split.

    Attributes:
        content: the token.
        single_word: it is found as a whole word only.
        lstrip: whitespace before it belongs to it.
        rstrip: whitespace after it belongs to it.
        normalized: it is looked for in the normalised text.
        special: it is left out when text is decoded without special tokens.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


def named(value: object, where: str, *, special: bool | None = None) -> AddedToken:
    """Reads a token as `tokenizer.json` and the files beside it give it.

    Args:
        value: text, or a mapping with `content`.
        where: the file, for the message.
        special: None: as the mapping says; text alone is special then.

    Raises:
        CheckpointError: it is neither.

    >>> named("<s>", "tokenizer_config.json")
    AddedToken(content='<s>', single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    """
    if isinstance(value, str):
        chosen = special is not False
        return AddedToken(value, normalized=not chosen, special=chosen)
    content = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(content, str):
        raise CheckpointError(f"{where}: expected a token with its content, found {value!r:.80}")
    flags = {key: value.get(key) is True for key in ("single_word", "lstrip", "rstrip")}
    chosen = value.get("special") is True if special is None else special
    normalized = value.get("normalized", not chosen) is True
    return AddedToken(content, **flags, normalized=normalized, special=chosen)


class TokenTable:
    """A vocabulary that grows: the model's own tokens, and those added to them.

    Ids are given as the `tokenizers` library gives them, which ignores the ids of a file: a token
    that the model has keeps its id; any other gets the next one.

    >>> table = TokenTable({"a": 0, "b": 1})
    >>> table.add([AddedToken("b"), AddedToken("c"), AddedToken("d")])
    >>> table.vocabulary()
    {'a': 0, 'b': 1, 'c': 2, 'd': 3}
    """

    def __init__(self, own: Mapping[str, int]) -> None:
        self.own = own
        self.added: dict[int, AddedToken] = {}
        self._ids: dict[str, int] = {}
        self._next = len(own)

    def copy(self) -> TokenTable:
        """Returns a table that grows by itself."""
        table = TokenTable(self.own)
        table.added, table._ids, table._next = dict(self.added), dict(self._ids), self._next
        return table

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Adds tokens, in their order; one that is there already takes the new settings."""
        for token in tokens:
            if not token.content:
                continue
            place = self.id_of(token.content)
            if place is None:
                place = self._next
            self._ids[token.content] = place
            self.added[place] = token
            self._next = max(self._next, place + 1)

    def id_of(self, content: str) -> int | None:
        """Returns a token's id, or None."""
        return self._ids.get(content, self.own.get(content))

    def vocabulary(self) -> dict[str, int]:
        """Returns every token's id."""
        return {**self.own, **self._ids}

    def entries(self) -> list[dict[str, Any]]:
        """Returns what `tokenizer.json` lists under `added_tokens`."""
        return [{"id": place, **asdict(token)} for place, token in sorted(self.added.items())]
