"""Which of a recipe's settings holds for a tensor of a model: the nearest one that lets it through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxmerge.methods import MergeMethod
from jaxmerge.recipes.settings import Setting, evaluate, filters, varies

Path = tuple[str | int, ...]


class Level(NamedTuple):
    """One mapping of parameters of a recipe.

    Attributes:
        path: where it stands in the recipe.
        settings: by the library's names.
        keys: the names as written.
    """

    path: Path
    settings: Mapping[str, Setting]
    keys: Mapping[str, str]

    def place(self, name: str) -> Path:
        """Where a setting stands in the recipe."""
        return (*self.path, self.keys.get(name, name))


@dataclass(frozen=True)
class Parameters:
    """The settings that hold for models merged together, the nearest first.

    Attributes:
        models: for each model its own level, then those of `shared`.
        shared: the levels of the output slice, of the module, and of the recipe.
        defaults: what holds where nothing is set.
        apart: the names that are set for single models.
    """

    models: tuple[tuple[Level, ...], ...]
    shared: tuple[Level, ...]
    defaults: Mapping[str, float]
    apart: frozenset[str]

    def value_for(
        self,
        name: str,
        tensor: str = "",
        model: int | None = None,
        *,
        at: float = 0.0,
        discrete: bool = False,
    ) -> float | None:
        """Returns the value that one tensor of one model sees.

        Args:
            name: the library's name of the hyperparameter.
            tensor: the tensor's name, which filters are looked for in.
            model: which of the merged models; None for what all of them share.
            at: where the tensor's layer lies among those merged together, from 0 to 1.
            discrete: whether a gradient is a list to choose from.

        Returns:
            The number, or None where nothing is set and there is no default.
        """
        for level in self.shared if model is None else self.models[model]:
            if name in level.settings:
                value = evaluate(level.settings[name], tensor, at, discrete=discrete)
                if value is not None:
                    return value
        return self.defaults.get(name)

    def settings(self, name: str) -> list[tuple[Setting, Path]]:
        """Returns every setting of a name and where it stands."""
        levels = dict.fromkeys(
            (level.place(name), level.settings[name])
            for chain in (self.shared, *self.models)
            for level in chain
            if name in level.settings
        )
        return [(setting, place) for place, setting in levels]

    @property
    def filters(self) -> tuple[str, ...]:
        """Every text that some setting searches names for."""
        found = (
            text
            for chain in (self.shared, *self.models)
            for level in chain
            for setting in level.settings.values()
            for text in filters(setting)
        )
        return tuple(dict.fromkeys(found))

    @property
    def varies(self) -> bool:
        """Whether some number may differ between tensors."""
        chains = (self.shared, *self.models)
        return any(varies(s) for chain in chains for one in chain for s in one.settings.values())


def hyperparameters(
    method: MergeMethod,
    parameters: Parameters,
    tensor: str = "",
    inputs: Sequence[str] | None = None,
    *,
    chosen: Sequence[int] | None = None,
    at: float = 0.0,
) -> tuple[dict[str, float | tuple[float, ...]], list[tuple[str, int | None]]]:
    """Returns the hyperparameters that one tensor is merged with.

    Args:
        method: the merge method.
        parameters: the settings.
        tensor: the output's name, by which shared settings are filtered.
        inputs: the name in each model, by which the model's settings are filtered.
        chosen: which of the models are merged; None: all.
        at: where the tensor's layer lies among those merged together, from 0 to 1.

    Returns:
        Numbers, or tuples of one per model; and what has no value: names, and indices of models.
    """
    found: dict[str, float | tuple[float, ...]] = {}
    missing: list[tuple[str, int | None]] = []
    models = range(len(parameters.models)) if chosen is None else chosen
    for name, spec in method.hyperparams.items():
        discrete = spec.kind == "flag"
        if spec.scope == "shared":
            value = parameters.value_for(name, tensor, at=at, discrete=discrete)
            if value is None:
                missing.append((name, None))
            else:
                found[name] = value
            continue
        values: list[float] = []
        for place, model in enumerate(models):
            text = tensor if inputs is None else inputs[place]
            value = parameters.value_for(name, text, model, at=at, discrete=discrete)
            if value is None:
                missing.append((name, model))
            else:
                values.append(value)
        if len(values) == len(models) and values:
            same = name not in parameters.apart and len(set(values)) == 1
            found[name] = values[0] if same else tuple(values)
    return found, missing
