"""The search for a path: slots and scales as one mixed space, the data flow and its score as one compiled program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.dataflow.path import Path, path_of
from jaxmerge.search.dataflow.program import LayerFunction, run
from jaxmerge.search.dataflow.scales import Form, factors, scale_function
from jaxmerge.search.dataflow.slots import Slots, slots_of
from jaxmerge.search.dataflow.spaces import flow_space
from jaxmerge.search.evolve import Result, evolve
from jaxmerge.search.space import Space
from jaxmerge.tree import unstack

CHANGED = 0.1
"""Probability of a slot to differ from the source from which a search starts."""


@dataclass(frozen=True)
class Flow:
    """The objective of a search through data flow: minus a score of the path that a point of the space says.

    Compares by value, so that searches of equal programs share their compilation.

    Attributes:
      layer_fn: (layer, hidden, *context) -> hidden.
      evaluate: (flow, key, *args) -> scores, maximised; `flow(hidden, *context)` runs the path.
      slots: the row of slots.
      form: of the scales, see `scale_function`.
      bounds: of the scales.
      objectives: 1: the mean score is searched for; more: each score is an objective.
      skip: candidates run one by one, and slots that are off are not computed; see `run`.
    """

    layer_fn: LayerFunction
    evaluate: Callable[..., Any]
    slots: Slots
    form: Form
    bounds: tuple[float, float]
    objectives: int = 1
    skip: bool = False

    def __call__(self, point: Any, key: jax.Array, layers: Any, *args: Any) -> jax.Array:
        """point: of the `flow_space`; layers: a tree with a leading axis of M; args: what `evaluate` takes."""
        scale = self.scale(point)

        def flow(hidden: jax.Array, *context: Any) -> jax.Array:
            return run(self.layer_fn, layers, point["on"], scale, hidden, *context, skip=self.skip)

        scores = jnp.asarray(self.evaluate(flow, key, *args))
        return -jnp.mean(scores) if self.objectives == 1 else -scores

    def scale(self, point: Any) -> Any:
        """The scale at a point, as `run` takes it."""
        return scale_function(self.form, self.slots, point.get("scale"), self.bounds)

    def path(self, point: Any) -> Path:
        """The path at a point."""
        on = jnp.asarray(point["on"])
        return path_of(self.slots, on, factors(self.scale(point), self.slots, on))


@dataclass(frozen=True)
class FlowResult:
    """What a search through data flow found.

    Attributes:
      paths: the best one; of several objectives those of the front.
      space: that was searched.
      flow: the objective; ``flow.path(point)`` is the path at another point.
      evolution: the search's own result; its `fitness` is minus the score.
    """

    paths: tuple[Path, ...]
    space: Space
    flow: Flow
    evolution: Result

    @property
    def path(self) -> Path:
        """The best path; of several objectives the first of the front."""
        return self.paths[0]


def dataflow(
    layer_fn: LayerFunction,
    layers: Any,
    evaluate: Callable[..., Any],
    *,
    key: jax.Array,
    sources: Sequence[int] | None = None,
    repeats: int = 3,
    scales: Form = "slots",
    bounds: tuple[float, float] = (0.5, 2.0),
    conditional: bool = True,
    probability: float | None = None,
    start: int | None = None,
    strategy: str = "catcma",
    args: tuple[Any, ...] = (),
    chunk: int | None = None,
    objectives: int = 1,
    **evolution: Any,
) -> FlowResult:
    r"""Searches for the path through the layers of one or several models that scores best.

    The M layers stand in a row, `repeats` times over; each of the T slots is on or off, and multiplies what it reads:

    .. math:: \max_{z, x} \; \text{score}(f_{z, x}), \qquad z \in \{0, 1\}^T, \; x_t \text{ counts only where } z_t = 1

    No weights change, and the weights are read once per slot for a whole population. A model merged in parameter space
    may be one of the sources: put its layers in the row.

    Args:
      layer_fn: one layer, a pure function (layer, hidden, *context) -> hidden of the same shape and dtype.
      layers: a tree whose leaves have a leading axis of M layers, those of all sources.
      evaluate: traced, (flow, key, *args) -> score, or [tasks] scores; larger is better. It makes the first hidden
        states, calls ``flow(hidden, *context)``, and reads the result: embeddings, final norm and head are its own, and
        come in by `args`.
      key: of the search.
      sources: how many of the layers each source has; None: all belong to one.
      repeats: T = M * repeats.
      scales: "slots", "pairs", "network" or "none"; see `flow_space`.
      bounds: of the scales.
      conditional: whether the strategy is told which scales count.
      probability: of a slot to be on at the beginning (None: 0.5); with `start`, of a slot to differ from that source
        (None: 0.1).
      start: the source from whose own path the search starts; None: from a random one.
      strategy: of `evolve`.
      args: what `evaluate` takes: data and parameters.
      chunk: candidates evaluated at once; None: as many as memory allows. With 1 they run one by one, and slots that
        are off cost nothing: the faster way on a CPU where few slots are on.
      objectives: 1, or the number of scores for a strategy of several objectives.
      **evolution: passed on to `evolve`: population, generations, checkpoint, ...

    Returns:
      A `FlowResult`.

    Raises:
      ValueError: layers and sources that do not fit, an unknown source or form of scales, and as for `evolve`.

    Example:
      >>> layers = {"add": jnp.array([1.0, -3.0, 10.0])}
      >>> def evaluate(flow, key):
      ...     return -jnp.abs(flow(jnp.zeros(1))[0] - 12.0)
      >>> found = dataflow(lambda layer, hidden: hidden + layer["add"], layers, evaluate, key=jax.random.key(0),
      ...                  repeats=2, scales="none", population=16, generations=20)
      >>> sorted(found.path.layers)
      [0, 0, 2]

    Reference:
      Akiba et al., Evolutionary Optimization of Model Merging Recipes, Nature Machine Intelligence 2025. Hamano et al.,
      CatCMA, GECCO 2024.
    """
    slots = slots_of(layers, sources, repeats)
    if probability is None:
        probability = 0.5 if start is None else CHANGED
    chance = probability if start is None else around(slots, start, probability)
    space = flow_space(slots, scales, bounds=bounds, probability=chance, conditional=conditional)
    flow = Flow(layer_fn, evaluate, slots, scales, bounds, objectives, skip=chunk == 1)
    found = evolve(
        flow,
        space,
        strategy=strategy,
        key=key,
        args=(layers, *args),
        chunk=chunk,
        objectives=objectives,
        **evolution,
    )
    points = [found.best] if objectives == 1 else unstack(found.best)
    return FlowResult(tuple(map(flow.path, points)), space, flow, found)


def around(slots: Slots, source: int, changed: float) -> np.ndarray:
    """The probabilities of slots to be on, each of which differs from a source's own path with a probability.

    Args:
      slots: the row of slots.
      source: which.
      changed: the probability.

    Returns:
      float64 [T].

    Example:
      >>> around(Slots((1, 1), repeats=1), 1, 0.25)
      array([0.25, 0.75])
    """
    return np.where(slots.of_source(source), 1 - changed, changed)
