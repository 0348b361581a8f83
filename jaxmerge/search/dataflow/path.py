"""A path through the layers of several models: what a search through data flow finds."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import yaml

from jaxmerge.search.dataflow.slots import Slots, origin


@dataclass(frozen=True)
class Path:
    """Layers in the order in which they run, and by what each one's input is multiplied.

    Attributes:
      layers: numbers in the row of all sources' layers.
      scales: one per layer of the path.
      sources: how many layers each source has.

    Example:
      >>> path = Path(layers=(0, 1, 3), scales=(1.0, 0.5, 1.0), sources=(2, 2))
      >>> path.origins
      ((0, 0), (0, 1), (1, 1))
    """

    layers: tuple[int, ...]
    scales: tuple[float, ...]
    sources: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.scales):
            raise ValueError(f"{len(self.layers)} layers, but {len(self.scales)} scales")
        beyond = [layer for layer in self.layers if not 0 <= layer < sum(self.sources)]
        if beyond:
            raise ValueError(
                f"the sources have {sum(self.sources)} layers; there is no {beyond[0]}"
            )

    @property
    def origins(self) -> tuple[tuple[int, int], ...]:
        """The source of each layer, and its number there."""
        return tuple(origin(self.sources, layer) for layer in self.layers)

    @property
    def on(self) -> np.ndarray:
        """bool [T]: slots that run the path, with as few repeats as it takes."""
        depth, slots = sum(self.sources), list[int]()
        for layer in self.layers:
            after = slots[-1] + 1 if slots else 0
            slots.append(after + (layer - after) % depth)
        count = depth * (slots[-1] // depth + 1 if slots else 1)
        return np.isin(np.arange(count), slots)

    def to_json(self) -> str:
        """The path as text, which `from_json` reads."""
        origins = [{"source": source, "layer": layer} for source, layer in self.origins]
        steps = [{**one, "scale": s} for one, s in zip(origins, self.scales, strict=True)]
        return json.dumps({"sources": list(self.sources), "path": steps}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The path that `to_json` wrote.

        Raises:
          ValueError: it is not of that form.

        Example:
          >>> path = Path((0, 3), (1.0, 0.5), (2, 2))
          >>> Path.from_json(path.to_json()) == path
          True
        """
        try:
            data = json.loads(text)
            sources = tuple(int(count) for count in data["sources"])
            steps = [(int(s["source"]), int(s["layer"]), float(s["scale"])) for s in data["path"]]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a path through layers: {error!r}") from None
        for source, layer, _ in steps:
            if not (0 <= source < len(sources) and 0 <= layer < sources[source]):
                raise ValueError(
                    f"source {source} has no layer {layer}: the sources have {sources}"
                )
        layers = tuple(sum(sources[:source]) + layer for source, layer, _ in steps)
        return cls(layers, tuple(scale for *_, scale in steps), sources)

    def recipe(
        self,
        models: Sequence[str],
        *,
        ends: str | None = None,
        outputs: Sequence[str] | None = ("o_proj", "down_proj"),
    ) -> str:
        r"""The path as a recipe of `passthrough` slices, which `jaxmerge merge` and mergekit run.

        The layers stand in the path's order, one slice for each run of layers that follow each other in their source.
        A recipe scales tensors, not what a layer reads. In layers that add to the hidden states what they compute of
        *normalised* hidden states (Llama, Mistral, Qwen, SmolLM, GPT-2) the two are one: with
        :math:`C_t = \prod_{s \le t} c_s`, the true hidden states after layer t are :math:`C_t` times those of a model
        without scales whose layer t has the tensors that it adds by divided by :math:`C_t`, and the norm before the
        head removes the last :math:`C`. This holds up to the epsilon of the norms, for scales above 0. Where a layer
        normalises what it adds (`output_norms`: Gemma 2 and 3), or another way out of the layers than a norm is taken,
        a recipe cannot say the scales: give ``outputs=None``, and keep `to_json` beside the recipe.

        Args:
          models: the sources as the recipe names them, in order.
          ends: the one of `models` that gives embeddings, final norm and head; None: the first layer's source gives the
            embeddings, the last layer's the rest, as in any recipe of slices.
          outputs: parts of the names of the tensors that a layer adds to the hidden states by ("c_proj" in GPT-2);
            None: the recipe leaves the scales out, and is the path's only where they are 1.

        Returns:
          YAML.

        Raises:
          ValueError: an empty path; a number of models that is not the sources'; an unknown `ends`; a scale of 0 or
            less with `outputs`.

        Example:
          >>> path = Path((0, 1, 3), (1.0, 1.0, 2.0), (2, 2))
          >>> print(path.recipe(["a", "b"]), end="")
          merge_method: passthrough
          slices:
          - sources:
            - model: a
              layer_range:
              - 0
              - 2
          - sources:
            - model: b
              layer_range:
              - 1
              - 2
              parameters:
                scale:
                - filter: o_proj
                  value: 0.5
                - filter: down_proj
                  value: 0.5
                - value: 1.0
        """
        if len(models) != len(self.sources):
            raise ValueError(
                f"the path has {len(self.sources)} sources, found {len(models)} models"
            )
        if not self.layers:
            raise ValueError("the path is empty: a recipe has layers")
        if ends is not None and ends not in models:
            raise ValueError(f"ends={ends!r} is none of the models {list(models)}")
        runs = self._runs(self._divisors() if outputs is not None else [1.0] * len(self.layers))
        slices = [
            _slice(models[source], first, end, 1 / divisor, outputs or ())
            for source, first, end, divisor in runs
        ]
        if ends is not None:
            # What stands outside of the layers comes from the first and the last slice: here from empty ones.
            empty = [_slice(ends, 0, 0, 1.0, ())]
            slices = (empty if models[runs[0][0]] != ends else []) + slices
            slices += empty if models[runs[-1][0]] != ends else []
        return yaml.safe_dump(
            {"merge_method": "passthrough", "slices": slices}, sort_keys=False, allow_unicode=True
        )

    def _divisors(self) -> list[float]:
        """C of each layer."""
        for layer, scale in enumerate(self.scales):
            if not (scale > 0 and math.isfinite(scale)):
                raise ValueError(
                    f"layer {layer} of the path has scale {scale:g}: a recipe can say scales above 0 only; give "
                    "outputs=None for one without scales"
                )
        return [float(value) for value in np.cumprod(self.scales)]

    def _runs(self, divisors: Sequence[float]) -> list[tuple[int, int, int, float]]:
        """(source, first, end, divisor) of layers that one slice can say."""
        runs: list[tuple[int, int, int, float]] = []
        for (source, layer), divisor in zip(self.origins, divisors, strict=True):
            if runs and (runs[-1][0], *runs[-1][2:]) == (source, layer, divisor):
                runs[-1] = (source, runs[-1][1], layer + 1, divisor)
            else:
                runs.append((source, layer, layer + 1, divisor))
        return runs


def path_of(slots: Slots, on: Any, scales: Any) -> Path:
    """The path that slots run.

    Args:
      slots: the row of slots.
      on: bool [T].
      scales: what each slot multiplies by if it runs, [T].

    Example:
      >>> path_of(Slots((1, 1), 2), [False, True, True, False], [1.0, 2.0, 3.0, 4.0])
      Path(layers=(1, 0), scales=(2.0, 3.0), sources=(1, 1))
    """
    taken = np.flatnonzero(np.asarray(on))
    factors = np.asarray(scales, np.float64)
    return Path(
        tuple(int(slot) % slots.depth for slot in taken),
        tuple(float(factors[slot]) for slot in taken),
        slots.sources,
    )


def _slice(
    model: str, first: int, end: int, factor: float, outputs: Sequence[str]
) -> dict[str, Any]:
    source: dict[str, Any] = {"model": model, "layer_range": [first, end]}
    if factor != 1:
        choices: list[dict[str, Any]] = [{"filter": name, "value": factor} for name in outputs]
        source["parameters"] = {"scale": [*choices, {"value": 1.0}]}
    return {"sources": [source]}
