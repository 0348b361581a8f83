"""A merge per block written as a recipe that `jaxmerge merge` runs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from jaxmerge.methods import MergeMethod, allowed, get, options
from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.inputs import is_mergeable
from jaxmerge.tree import Layout, flatten
from jaxmerge.tree.blocks import Label, Rules, labels_of


def options_of(method: MergeMethod) -> dict[str, Any]:
    """The options with which a registered constructor makes a method, those at their defaults left out.

    Raises:
      ValueError: no constructor of the method's name makes it.
    """
    try:
        constructor = get(method.name)
    except ValueError:
        raise ValueError(
            f"{method.name!r} is not a registered method: a recipe cannot name it"
        ) from None
    defaults = options(constructor)
    choices = {
        name: allowed(constructor, name) or _flags(value) for name, value in defaults.items()
    }
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        if constructor(**chosen) is method:
            return {name: value for name, value in chosen.items() if value != defaults[name]}
    raise ValueError(f"{method.name!r} was made with options that a recipe cannot name")


def recipe_text(
    chosen: Mapping[Label, tuple[MergeMethod, Mapping[str, Any]]],
    rules: Rules,
    params: Any,
    layout: Layout,
    models: Sequence[str],
    base: str | None,
    dtype: str | None,
    seed: int,
) -> str:
    """The recipe as YAML.

    Args:
      chosen: for each block its method and its hyperparameters.
      rules: which tensors are whose.
      params: a tree like the models.
      layout: the tensors' names.
      models, base: where they are.
      dtype: of the output; None: that of the base, or of the first model.
      seed: of random methods; the command line gets it, and a remark says so.
    """
    names = _names(rules, params, layout)
    owners = {name: label for label, mine in names.items() for name in mine}
    document: dict[str, Any] = {"dialect": "jaxmerge", "merge_method": "linear"}
    if base is not None:
        document["base_model"] = base
    document["models"] = [{"model": model} for model in models]
    document["blocks"] = [
        {
            "tensors": _patterns(names[label], owners, label),
            "merge_method": method.name,
            **({"options": options_of(method)} if options_of(method) else {}),
            "parameters": {name: _plain(method.hyperparams[name], v) for name, v in values.items()},
        }
        for label, (method, values) in chosen.items()
    ]
    if dtype is not None:
        document["dtype"] = dtype
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    if any(method.random for method, _ in chosen.values()):
        return f"# jaxmerge merge THIS-FILE OUT --seed {seed}\n{text}"
    return text


def _names(rules: Rules, params: Any, layout: Layout) -> dict[Label, list[str]]:
    """By block the names of its tensors in the checkpoint."""
    found: dict[Label, list[str]] = {}
    for path, leaf in flatten(params)[0].items():
        if is_mergeable(leaf):
            one = layout.of(path)
            for name, label in zip(one.names, labels_of(rules, path, one), strict=True):
                found.setdefault(label, []).append(name)
    return found


def _patterns(names: list[str], owners: Mapping[str, Label], label: Label) -> list[str]:
    """Few patterns for many names: a leading part and `**`, where all names that begin so are the block's."""
    left = dict.fromkeys(names)
    patterns = []
    while left:
        name = next(iter(left))
        cuts = [i + 1 for i, letter in enumerate(name) if letter in "./"]
        pattern, mine = _escaped(name), [name]
        for cut in cuts:
            alike = [other for other in owners if other.startswith(name[:cut])]
            if len(alike) > 1 and all(owners[other] == label for other in alike):
                pattern, mine = f"{_escaped(name[:cut])}**", alike
                break
        patterns.append(pattern)
        for one in mine:
            left.pop(one, None)
    return patterns


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _plain(spec: Hyperparameter, value: Any) -> Any:
    numbers = np.asarray(value, np.float64)
    if spec.kind == "flag":
        return bool(numbers)
    return numbers.tolist()


def _flags(default: Any) -> tuple[Any, ...]:
    return (False, True) if isinstance(default, bool) else (default,)
