"""Where a model's layers are: read from its tensors' names and its config, without a table of architectures."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_NUMBERED = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.|$)")
_COUNT = re.compile(
    r"(num_|n_)?(hidden_|encoder_|decoder_|transformer_|text_|vision_)*(layers?|blocks?)|depth"
    r"|max_window_layers"
)
# What stacks of layers are called, other than two or three steps of some head.
_STACK = re.compile(r"(layers?|blocks?|h|stages?|resblocks|transformer|encoder|decoder)")
_INPUT = re.compile(
    r"emb|wte|wpe|relative_pe|patch|conv|rotary|shared|stem|(ln|norm)_?pre|pre_(ln|layernorm|norm)"
    r"|(class|cls|mask)_token|position_ids"
)
_OUTPUT = re.compile(r"embed_?out|out_?embed|unembed|classifier|predictions|lm_head|post_")
_HEAD = re.compile(
    r"(^|\.)(lm_head|output|output_layer|embed_out|vocab_projector|proj_out)(\.decoder)?\.weight$"
    r"|predictions\.decoder\.weight$"
)
_TABLE = re.compile(
    r"(^|\.)(wte|embed_tokens|word_embeddings|tok_embeddings|embed_in|embeddings?|shared)\.weight$"
)

# The parts that mergekit's recipes name, by what tensors' names contain.
_PROJECTOR = re.compile(r"projector|merger|connector|resampler|aligner")
_VISION = re.compile(r"vision|visual|image")
_AUDIO = re.compile(r"audio|speech")
_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("text_decoder", "text_model", "language_model", "text"), "text"),
    **dict.fromkeys(("vision_tower", "vision_model", "vision_encoder", "vision"), "vision"),
    **dict.fromkeys(("audio_tower", "audio_model", "audio_encoder", "audio"), "audio"),
    **dict.fromkeys(("multi_modal_projector", "projector", "connector"), "projector"),
    "shared": "shared",
}
DEFAULT = "default"


class Place(NamedTuple):
    """Where a tensor lies: `model.layers.3.mlp.up.weight` is `mlp.up.weight` of layer 3 of `model.layers`."""

    stack: str
    layer: int
    rest: str

    def named(self, layer: int) -> str:
        """The name of the same tensor of another layer."""
        return ".".join(part for part in (self.stack, str(layer), self.rest) if part)


def place_of(name: str) -> Place | None:
    """Reads the first number in a name as that of a layer.

    >>> place_of("model.layers.3.experts.0.w1.weight")
    Place(stack='model.layers', layer=3, rest='experts.0.w1.weight')
    >>> place_of("lm_head.weight") is None
    True
    """
    found = _NUMBERED.search(name)
    if found is None:
        return None
    return Place(
        name[: found.start()].removesuffix("."), int(found[1]), name[found.end() :].lstrip(".")
    )


def is_of_input(name: str) -> bool:
    """Whether a tensor outside of all layers comes before them, as an embedding does.

    >>> [is_of_input(name) for name in ("model.embed_tokens.weight", "model.norm.weight", "embed_out.weight")]
    [True, False, False]
    """
    lower = name.lower()
    return bool(_INPUT.search(lower)) and not _OUTPUT.search(lower)


def is_head(name: str) -> bool:
    """Whether a tensor gives the logits of tokens."""
    return bool(_HEAD.search(name))


def is_token_table(name: str) -> bool:
    """Whether a tensor holds the embeddings of tokens."""
    return bool(_TABLE.search(name))


@dataclass(frozen=True)
class Anatomy:
    """The layers of one model.

    Attributes:
        places: of each tensor, None for those outside of all layers.
        counts: how many layers each stack has, also that of two or three steps of a head.
        main: the stacks that are meant by layers.
    """

    places: Mapping[str, Place | None]
    counts: Mapping[str, int]
    main: tuple[str, ...]

    @functools.cached_property
    def by_layer(self) -> Mapping[tuple[str, int], Sequence[str]]:
        """The names in each layer of each stack."""
        found: dict[tuple[str, int], list[str]] = {}
        for name, place in self.places.items():
            if place is not None:
                found.setdefault((place.stack, place.layer), []).append(name)
        return found

    def position(self, name: str) -> float:
        """Where the tensor's layer lies in its stack: 0 for the first, 1 for the last or only one, 0 outside."""
        place = self.places[name]
        if place is None:
            return 0.0
        count = self.counts[place.stack]
        return place.layer / (count - 1) if count > 1 else 1.0

    def stack_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """The main stacks that some tensors belong to, or else the one stack there is."""
        stacks = dict.fromkeys(p.stack for name in names if (p := self.places[name]) is not None)
        main = tuple(stack for stack in self.main if stack in stacks)
        return main or (tuple(stacks) if len(stacks) == 1 else ())


def anatomy(names: Iterable[str], config: Mapping[str, Any] | None) -> Anatomy:
    """Finds the stacks of layers of a model.

    Args:
        names: its tensors' names.
        config: its `config.json`; None without one.

    >>> found = anatomy(["embed.weight", "layers.0.w", "layers.1.w", "head.0.w"], {"n_layers": 2})
    >>> dict(found.counts), found.main
    ({'layers': 2, 'head': 1}, ('layers',))
    """
    places = {name: place_of(name) for name in names}
    counts: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            counts[place.stack] = max(counts.get(place.stack, 0), place.layer + 1)
    told = {value for _, key, value in walk(config or {}) if is_layer_count(key, value)}
    main = [stack for stack, count in counts.items() if count in told] or list(counts)
    usual = [stack for stack in main if _STACK.fullmatch(stack.rpartition(".")[2])]
    return Anatomy(places, counts, tuple(usual or main))


def is_layer_count(key: str, value: object) -> bool:
    """Whether an entry of a config tells a number of layers."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and bool(_COUNT.fullmatch(key))


def walk(
    config: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Gives every entry of a config, nested ones too: the keys above it, its key, its value."""
    for key, value in config.items():
        yield above, key, value
        if isinstance(value, Mapping):
            yield from walk(value, (*above, key))


def role_of(name: str) -> str:
    """Which part of a model of several kinds of data a tensor belongs to.

    >>> [role_of(name) for name in ("visual.blocks.0.w", "visual.merger.w", "model.norm.weight")]
    ['vision', 'projector', 'text']
    """
    for role, pattern in (("projector", _PROJECTOR), ("vision", _VISION), ("audio", _AUDIO)):
        if pattern.search(name):
            return role
    return "text"


def members(found: Anatomy, modules: Sequence[str]) -> dict[str, list[str]]:
    """Says which tensors each module of a recipe means.

    A module is the path of a stack of layers, the beginning of tensors' names (after "model."), a
    part that mergekit names ("text_decoder", "vision_tower", "multi_modal_projector", "shared"),
    or "default": whatever no other module takes. What is named more closely wins.

    Args:
        found: the model's layers.
        modules: the names in the recipe.

    >>> model = anatomy(["encoder.block.0.w", "decoder.block.0.w", "lm_head.weight"], None)
    >>> members(model, ["encoder", "decoder", "shared"])
    {'encoder': ['encoder.block.0.w'], 'decoder': ['decoder.block.0.w'], 'shared': ['lm_head.weight']}
    """
    paths = sorted((name for name in modules if name != DEFAULT), key=len, reverse=True)
    begins = [
        (module, (f"{module}.", f"model.{module}."))
        for module in paths
        if any(_begins(name, module) for name in found.places)
    ]
    named = {module for module, _ in begins}
    roles = {_ROLES[m]: m for m in modules if m not in named and m in _ROLES}
    taken: dict[str, list[str]] = {module: [] for module in modules}
    for name in found.places:
        chosen = next((m for m, start in begins if name == m or name.startswith(start)), None)
        if chosen is None:
            chosen = roles.get(role_of(name), roles.get("shared"))
        if chosen is None and DEFAULT in taken:
            chosen = DEFAULT
        if chosen is not None:
            taken[chosen].append(name)
    return taken


def possible_modules(found: Anatomy) -> list[str]:
    """Names of modules that a recipe may use for a model."""
    if len(found.main) < 2:
        return [DEFAULT]
    roles = {role_of(name) for name in found.places}
    if roles > {"text"}:
        names = {"text": "text_decoder", "vision": "vision_tower", "audio": "audio_tower"}
        return [
            names.get(role, "multi_modal_projector")
            for role in ("text", "vision", "audio", "projector")
            if role in roles
        ]
    return [*found.main, DEFAULT]


def _begins(name: str, module: str) -> bool:
    return name == module or name.startswith((f"{module}.", f"model.{module}."))
