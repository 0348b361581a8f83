"""Which family, config and prefix a checkpoint's tensors fit; strict in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from jaxmerge.converters import families
from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.families.family import Config, Family
from jaxmerge.converters.families.rules import listed, matches
from jaxmerge.converters.tensor_info import TensorInfo

# What training in parallel and `torch.compile` put before every name.
WRAPPERS = ("module.", "_orig_mod.")
_DEPTHS = frozenset(
    {"num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "layers", "blocks"}
)


class Match(NamedTuple):
    """What a checkpoint was recognised as.

    Attributes:
      family: its layout.
      config: the Flax config.
      prefix: what stands before every name.
    """

    family: Family
    config: Config
    prefix: str


def recognise(
    tensors: Mapping[str, TensorInfo],
    *,
    json: Mapping[str, Any] | None = None,
    family: str | None = None,
    config: Config | None = None,
    where: str = "checkpoint",
) -> Match:
    """Finds the family and the config of a checkpoint.

    Args:
      tensors: the infos, as in `Checkpoint.tensors`.
      json: the parsed config.json, if there is one.
      family: the family's name; None: by the `model_type` of config.json, else by the tensors.
      config: the Flax config, or a mapping in place of config.json; None: from config.json, else from the tensors'
        shapes.
      where: the checkpoint, for messages.

    Returns:
      The match; every tensor has its leaf and every leaf its tensor, of the right shape.

    Raises:
      CheckpointError: no family fits, several do, or the one asked for does not; the message says which tensors are
        missing, unexpected or of other shapes.
    """
    if isinstance(config, Mapping):
        json, config = config, None
    candidates = _candidates(json or {}, family, config, where)
    _check_depth(json or {}, len(tensors), where)
    found: list[Match] = []
    refusals: dict[str, list[str]] = {}
    near: dict[str, list[str]] = {}
    for candidate in candidates:
        try:
            found.append(_match(candidate, tensors, json or {}, config))
        except _NearMiss as error:
            near.setdefault(str(error), []).append(candidate.name)
        except CheckpointError as error:
            refusals.setdefault(str(error), []).append(candidate.name)
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(match.family.name for match in found)
        raise CheckpointError(f"{where}: fits several families, name one of them: {several}")
    reasons = near or refusals
    if len(candidates) == 1:
        raise CheckpointError(f"{where}: not of family {candidates[0].name}: {next(iter(reasons))}")
    lines = "".join(f"\n  {', '.join(names)}: {reason}" for reason, names in reasons.items())
    raise CheckpointError(f"{where}: fits no family:{lines}")


class _NearMiss(CheckpointError):
    """The config could be read, but some tensors do not fit it."""


def disagreements(match: Match, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """What keeps a checkpoint from being what a match says, a sentence for each kind; empty if nothing does."""
    family, config, prefix = match
    layout, shapes = family.layout(config, prefix), family.shapes(config)
    expected = {
        layout[path].names[0]: layout[path].checkpoint_shape(shape)
        for path, shape in shapes.items()
    }
    known = {*expected, *optional_names(match)}
    missing = [name for name in expected if name not in tensors]
    unexpected = [
        name
        for name in tensors
        if name not in known
        and not any(matches(name.removeprefix(prefix), one) for one in family.ignored)
    ]
    shaped = [
        f"{name!r} expected {list(shape)}, found {list(tensors[name].shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    said = []
    if missing:
        said.append(f"missing {listed(missing)}.{_hint(missing, unexpected)}")
    if unexpected:
        said.append(f"unexpected {listed(unexpected)}.{_hint(unexpected, missing or known)}")
    if shaped:
        more = f" and {len(shaped) - 4} more" if len(shaped) > 4 else ""
        said.append(f"shapes that do not fit the config: {'; '.join(shaped[:4])}{more}.")
    return said


def optional_names(match: Match) -> list[str]:
    """Names that a layout has beside those of its leaves: tied names and buffers."""
    family, config, prefix = match
    names = [
        family_name(layout.names[0], prefix) for layout in family.layout(config, prefix).values()
    ]
    return [prefix + name for name in (*family.aliases(config), *family.buffers(config, names))]


def family_name(name: str, prefix: str) -> str:
    """A checkpoint's name as its family's table has it."""
    return name.removeprefix(prefix)


def _candidates(
    json: Mapping[str, Any], family: str | None, config: Config | None, where: str
) -> Sequence[Family]:
    if family is not None:
        chosen = families.get(family)
        if config is not None and not isinstance(config, chosen.config_type):
            raise CheckpointError(
                f"{where}: family {family!r} has a {chosen.config_type.__name__} as config, found "
                f"{type(config).__name__}"
            )
        return [chosen]
    known = list(families.FAMILIES.values())
    if config is not None:
        if not is_dataclass(config):
            raise CheckpointError(f"{where}: expected a config or a mapping, found {config!r}")
        fitting = [one for one in known if isinstance(config, one.config_type)]
        if not fitting:
            raise CheckpointError(f"{where}: no family has a {type(config).__name__} as config")
        # Several families may share a config and a table; config.json then says which it is.
        return [one for one in fitting if json.get("model_type") in one.accepted_types] or fitting
    kind = json.get("model_type")
    if kind is None:
        return known
    fitting = [one for one in known if kind in one.accepted_types]
    if not fitting:
        types = sorted({name for one in known for name in one.accepted_types})
        raise CheckpointError(
            f"{where}: config.json has model_type {kind!r}, which no family reads."
            f"{nearest(str(kind), types)} Known: {', '.join(types)}"
        )
    return fitting


def _match(
    family: Family,
    tensors: Mapping[str, TensorInfo],
    json: Mapping[str, Any],
    config: Config | None,
) -> Match:
    prefix = _prefix(family, tensors)
    bare = {name.removeprefix(prefix): info for name, info in tensors.items()}
    if config is None:
        try:
            config = family.config_of(json, bare)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"its config.json cannot be read: {type(error).__name__}: {error}"
            ) from None
    match = Match(family, config, prefix)
    said = disagreements(match, tensors)
    if said:
        raise _NearMiss(" ".join(said))
    return match


def _check_depth(json: Mapping[str, Any], tensors: int, where: str) -> None:
    """A layer has a tensor at least; a config of a billion layers would be built before the tensors are compared."""
    for key, value in json.items():
        if isinstance(value, Mapping):
            _check_depth(value, tensors, where)
        counts = value if isinstance(value, list | tuple) else [value]
        numbers = [one for one in counts if isinstance(one, int)]
        if key in _DEPTHS and sum(numbers) > tensors:
            raise CheckpointError(
                f"{where}: the config has {key} = {value}, the checkpoint {tensors} tensors"
            )


def _prefix(family: Family, tensors: Mapping[str, TensorInfo]) -> str:
    """The prefixes that all names have, one after the other, each wrapper once."""
    prefix, left = "", [*WRAPPERS, *family.prefixes]
    while hit := next(
        (one for one in left if all(name.startswith(prefix + one) for name in tensors)), None
    ):
        prefix += hit
        left.remove(hit)
    return prefix


def _hint(names: Sequence[str], known: Iterable[str]) -> str:
    # Of many names the first ones will do: a search takes long among thousands.
    return next((hint for name in names[:3] if (hint := nearest(name, known))), "")
