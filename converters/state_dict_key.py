"""Finding the state dict inside the nested structure of a PyTorch file, without torch itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxmerge.converters.errors import CheckpointError, nearest

# What training scripts call the model's own state dict.
_USUAL = frozenset(
    {"state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"}
    | {"params", "weights"}
)
_DEEPEST = 16


def select(
    structure: Any, key: str | None, is_tensor: Callable[[Any], bool], where: str
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Selects the state dict of a loaded PyTorch file.

    With a key, it is followed through the mappings; a key of one mapping may have dots itself, and
    the longest match is tried first. Without one, the top level is taken if it is a state dict.
    Otherwise there must be one candidate (a state dict further inside, optimiser state left out),
    or one that stands out: it alone has a usual name such as `state_dict` or `model`, and no other
    candidate has half as many tensors.

    Args:
      structure: what `torch.load` returned.
      key: names joined by dots, or None.
      is_tensor: says whether a value is a tensor.
      where: the file, for messages.

    Returns:
      The state dict and the path of keys that leads to it; `()` for the top level.

    Raises:
      CheckpointError: no such key, no state dict, or several; the message lists the candidates.
    """
    if key is not None:
        return _by_key(structure, key, is_tensor, where)
    if _is_state_dict(structure, is_tensor):
        return structure, ()
    found = _candidates(structure, is_tensor)
    chosen = _standing_out(found)
    if chosen is None:
        raise CheckpointError(
            f"{where}: {'no' if not found else 'more than one'} state dict inside; "
            f"{_listing(found, structure)}"
        )
    return found[chosen][0], chosen


def split(
    state: Mapping[str, Any], is_tensor: Callable[[Any], bool], where: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Splits a state dict into its tensors and what else it holds.

    Args:
      state: the state dict.
      is_tensor: says whether a value is a tensor.
      where: the file and key, for messages.

    Returns:
      The tensors, and for every other entry (numbers, text, None, `_extra_state` objects) a word on
      what it is.

    Raises:
      CheckpointError: an entry has tensors inside it, which would be lost.
    """
    tensors: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, value in state.items():
        if is_tensor(value):
            tensors[name] = value
        elif _holds_tensors(value, is_tensor) and not _is_extra(name):
            raise CheckpointError(
                f"{where}: entry {name!r}: expected a tensor, found a {type(value).__name__} with "
                "tensors inside; name the state dict by its key"
            )
        else:
            skipped[name] = type(value).__name__
    return tensors, skipped


def _by_key(
    structure: Any, key: str, is_tensor: Callable[[Any], bool], where: str
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    followed = list(_follow(structure, key))
    for path in followed:
        value = _at(structure, path)
        if _is_text_mapping(value) and any(is_tensor(entry) for entry in value.values()):
            return value, path
    found = _candidates(structure, is_tensor)
    hint = ""
    if followed:
        kind = type(_at(structure, followed[0])).__name__
        reason = f"key {key!r}: expected a state dict (names to tensors), found a {kind}"
    else:
        reason = f"no key {key!r}"
        hint = nearest(key, [".".join(path) for path in found])
    raise CheckpointError(f"{where}: {reason}; {_listing(found, structure)}.{hint}")


def _follow(value: Any, key: str) -> Iterator[tuple[str, ...]]:
    """Yields the paths that a dotted key may mean, longest first key first."""
    if not isinstance(value, Mapping):
        return
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        first, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if first not in value:
            continue
        if count == len(parts):
            yield (first,)
        else:
            yield from ((first, *path) for path in _follow(value[first], rest))


def _at(structure: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        structure = structure[part]
    return structure


def _candidates(
    structure: Any, is_tensor: Callable[[Any], bool]
) -> dict[tuple[str, ...], tuple[Mapping[str, Any], int]]:
    """Returns path -> (state dict, number of tensors) for every state dict inside a structure."""
    found: dict[tuple[str, ...], tuple[Mapping[str, Any], int]] = {}
    seen: set[int] = set()

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if not isinstance(value, Mapping) or "param_groups" in value or len(path) > _DEEPEST:
            return
        if _is_state_dict(value, is_tensor):
            found[path] = (value, sum(is_tensor(entry) for entry in value.values()))
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        for name, entry in value.items():
            if isinstance(name, str) and "optim" not in name.lower():
                walk(entry, (*path, name))

    walk(structure, ())
    return found


def _standing_out(
    found: Mapping[tuple[str, ...], tuple[Mapping[str, Any], int]],
) -> tuple[str, ...] | None:
    if len(found) == 1:
        return next(iter(found))
    usual = [path for path in found if path[-1] in _USUAL]
    if len(usual) != 1:
        return None
    size = found[usual[0]][1]
    # A second copy (an average along training, a second network) makes the choice a guess.
    rivals = [path for path in found if path != usual[0] and 2 * found[path][1] >= size]
    return None if rivals else usual[0]


def _is_state_dict(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    if not _is_text_mapping(value) or not any(is_tensor(entry) for entry in value.values()):
        return False
    return not any(
        _holds_tensors(entry, is_tensor)
        for name, entry in value.items()
        if not is_tensor(entry) and not _is_extra(name)
    )


def _is_text_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _is_extra(name: str) -> bool:
    """`torch.nn.Module.get_extra_state` may return anything, under this name."""
    return name.rpartition(".")[2] == "_extra_state"


def _holds_tensors(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    """Searches without recursion, each container once: pickles may hold cycles."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if is_tensor(value):
            return True
        if isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
    return False


def _listing(found: Mapping[tuple[str, ...], tuple[Mapping[str, Any], int]], structure: Any) -> str:
    if found:
        listed = ", ".join(
            f"{'.'.join(path) or 'the top level'} ({count} tensors)"
            for path, (_, count) in found.items()
        )
        return f"candidate keys: {listed}"
    if isinstance(structure, Mapping):
        return f"the top level has the keys {', '.join(map(repr, list(structure)[:12]))}"
    return f"the file holds a {type(structure).__name__}"
