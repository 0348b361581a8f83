"""The task-vector family as data: a sparsifier, a consensus and a reduction.

    merged = base + scale * sum_i w_i r_i m_i a_i d_i / D,      d_i = model_i - base

m_i is the sparsifier's mask (none, largest magnitudes, a band of magnitudes, random, random by rank), r_i restores the
mass that it took, a_i keeps the entries whose sign agrees with the elected one (consensus), and D normalises by the
weights in play.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.hyperparameters import Fraction, Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Measure, Select, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register
from jaxmerge.methods.selection.ranks import ranks_within_rows

TrimScope = Literal["model", "tensor"]
Sparsifier = Literal["none", "magnitude", "band", "random", "rank"]
RescaleNorm = Literal["paper", "l1"]
Divisor = Literal["absolute", "signed"]

WEIGHT = Hyperparameter(
    1.0, -float("inf"), float("inf"), "weight of each model", "model", search=(0.0, 2.0)
)
SCALE = Hyperparameter(
    1.0, -float("inf"), float("inf"), "lambda: scale of the merged task vector", search=(0.0, 2.0)
)
GAMMA = Hyperparameter(
    0.01,
    0.0,
    1.0,
    "share of each task vector's entries, the largest, that is dropped",
    "model",
    "fraction",
    False,
    search=(0.0, 0.1),
)
EPSILON = Hyperparameter(
    0.15,
    0.0,
    0.5,
    "how far the survival of large and small entries differs from the density",
    "model",
    differentiable=False,
    search=(0.0, 0.3),
)


class Settings(NamedTuple):
    """What the family's one kernel needs for a tensor; flags are Python bools where static, arrays where chosen.

    Attributes:
      weight: float32 [models].
      scale: float32 [].
      normalize: divide by the weights in play.
      density: share of the entries that survive, [models].
      trims: the largest magnitudes survive.
      drops: random entries survive.
      elects: entries that disagree with the elected sign are left out.
      rescale: the surviving entries are scaled up.
      by_mass: by the lost L1 norm rather than by 1 / density.
      absolute: D sums |w| rather than w.
      skip: share of the entries, the largest, that do not survive trimming, [models]; None for none.
      epsilon: how far random survival leans towards large magnitudes, [models]; None for not at all.
    """

    weight: jax.Array
    scale: jax.Array
    normalize: jax.Array
    density: Fraction | None
    trims: Any
    drops: Any
    elects: Any
    rescale: jax.Array | None
    by_mass: Any
    absolute: Any
    skip: Fraction | None = None
    epsilon: jax.Array | None = None


class Family(NamedTuple):
    """A member of the family: how hyperparameters become `Settings`, and what must be measured."""

    settings: Any
    trims: bool
    drops: bool
    rescales: bool
    scope: TrimScope
    ranks: bool = False


def family_leaf(name: str, member: Family, hyperparams: Mapping[str, Any]) -> LeafMethod:
    """Builds the leaf method of one member, or of several members behind a traced choice."""
    measures: list[Measure] = []
    if member.ranks:
        measures.append(Local("ranks", _ranks, on_host=True))
    if member.trims:
        measures.append(
            Select(
                "selection",
                _magnitudes,
                lambda values, size: _counts(member.settings(values), size),
                member.scope,
            )
        )
    if member.rescales:
        measures.append(
            Sums(
                "mass",
                lambda chunk, values, found: _mass(chunk, member.settings(values), found, member),
                lambda sums, values, found: sums,
                scope=member.scope,
                unasked=lambda values: _unasked_mass(member.settings(values)),
            )
        )
    return LeafMethod(
        name,
        lambda chunk, values, found: _merge(chunk, member.settings(values), found, member),
        hyperparams,
        tuple(measures),
        base="required",
        random=member.drops,
        cuts="rows" if member.ranks else "elements",
    )


@register
def task_arithmetic() -> MergeMethod:
    r"""Task arithmetic: adds the weighted task vectors to the base.

    .. math:: \theta = \theta_0 + \lambda \frac{\sum_i w_i (\theta_i - \theta_0)}{D}, \quad
       D = \textstyle\sum_i w_i \text{ if normalize and not } 0 \text{, else } 1

    Returns:
      A `MergeMethod` with hyperparameters weight [models], scale, normalize. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}
      >>> jm.merge("task_arithmetic", [a, b], base=base, scale=0.5)["w"]
      Array([0.5, 1. ], dtype=float32)

    Reference:
      Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023.
    """
    return _member("task_arithmetic", "Sum of weighted task vectors.")


@register
def ties(
    *, scope: TrimScope = "model", divisor: Divisor = "absolute", minimum: Literal[0, 1] = 0
) -> MergeMethod:
    r"""TIES: trims each task vector, elects a sign per entry, averages the entries that agree with it.

    .. math:: \hat d_i = \mathrm{top}_{\rho}(|d_i|), \quad s = \mathrm{sign} \textstyle\sum_i w_i \hat d_i, \quad
       \theta = \theta_0 + \lambda \frac{\sum_i w_i \hat d_i [\mathrm{sign}(w_i \hat d_i) = s]}
       {\sum_i |w_i| [\mathrm{sign}(w_i \hat d_i) = s]}

    Exactly floor(density * n) entries survive, ties at the threshold to the lower index; the sign of 0 is +. Without
    `normalize` the divisor is 1. `rescale` gives the trimmed vector back its L1 norm.

    Args:
      scope: n counts the whole "model" (the paper) or each "tensor".
      divisor: "absolute" sums the weights' magnitudes, "signed" the weights, in the divisor.
      minimum: how many entries survive at least where the density is not 0.

    Returns:
      A `MergeMethod` with hyperparameters weight and density [models], scale, normalize, rescale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(3)}, {"w": jnp.array([3.0, 1.0, 0.1])}, {"w": jnp.array([1.0, -2.0, 0.2])}
      >>> jm.merge("ties", [a, b], base=base, density=0.7)["w"]
      Array([ 2., -2.,  0.], dtype=float32)

    Reference:
      Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023.
    """
    return _member(
        "ties",
        "Trim by magnitude, elect signs, average what agrees.",
        sparsifier="magnitude",
        elects=True,
        scope=scope,
        rescale_norm="l1",
        divisor=divisor,
        minimum=minimum,
        density=0.2,
        normalize=1.0,
        rescale=0.0,
    )


@register
def dare_linear(*, rescale_norm: RescaleNorm = "paper") -> MergeMethod:
    r"""DARE: drops entries of each task vector at random, rescales the rest, adds them up.

    .. math:: \hat d_i = m_i d_i / p_i, \ m_i \sim \mathrm{Bernoulli}(p_i), \quad
       \theta = \theta_0 + \lambda \textstyle\sum_i w_i \hat d_i / D

    Draws depend on the key, the tensor's name and the element's index alone.

    Args:
      rescale_norm: "paper" divides by the density p; "l1" gives each tensor back its L1 norm.

    Returns:
      A `MergeMethod` with hyperparameters weight and density [models], scale, normalize, rescale. Needs a base and a
      key. The density's default, 0.1, drops 90 % as the paper does.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros(4)}, {"w": jnp.ones(4)}
      >>> out = jm.merge("dare_linear", [a], base=base, density=0.5, key=jax.random.key(0))["w"]
      >>> bool(jnp.all((out == 0) | (out == 2)))
      True

    Reference:
      Yu et al., Language Models are Super Mario, ICML 2024.
    """
    return _member(
        "dare_linear",
        "Drop at random and rescale, then add.",
        sparsifier="random",
        rescale_norm=rescale_norm,
        density=0.1,
        rescale=1.0,
    )


@register
def dare_ties(*, rescale_norm: RescaleNorm = "paper", divisor: Divisor = "absolute") -> MergeMethod:
    r"""DARE with the sign election of TIES in place of the plain sum.

    .. math:: \hat d_i = m_i d_i / p_i, \quad s = \mathrm{sign} \textstyle\sum_i w_i \hat d_i, \quad
       \theta = \theta_0 + \lambda \textstyle\sum_i w_i \hat d_i [\mathrm{sign}(w_i \hat d_i) = s] / D

    Args:
      rescale_norm: "paper" divides by the density p; "l1" gives each tensor back its L1 norm.
      divisor: see `ties`.

    Returns:
      A `MergeMethod` with hyperparameters weight and density [models], scale, normalize, rescale. Needs a base and a
      key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros(4)}, {"w": jnp.ones(4)}
      >>> jm.merge("dare_ties", [a, a], base=base, density=1.0, key=jax.random.key(0))["w"]
      Array([2., 2., 2., 2.], dtype=float32)

    Reference:
      Yu et al., Language Models are Super Mario, ICML 2024; Yadav et al., TIES-Merging, NeurIPS 2023.
    """
    return _member(
        "dare_ties",
        "Drop at random and rescale, elect signs, add what agrees.",
        sparsifier="random",
        elects=True,
        rescale_norm=rescale_norm,
        divisor=divisor,
        density=0.1,
        rescale=1.0,
    )


@register
def della_linear(*, rescale_norm: RescaleNorm = "paper") -> MergeMethod:
    r"""DELLA's sampling by magnitude: large entries survive more often than small ones; then a plain sum.

    .. math:: \hat d_i = m_i d_i / p_i, \ m_i \sim \mathrm{Bernoulli}(p_i), \quad
       p_i = \rho_i - \epsilon_i + 2 \epsilon_i \frac{\mathrm{rank}}{n - 1}, \quad
       \theta = \theta_0 + \lambda \textstyle\sum_i w_i \hat d_i / D

    The rank is that of the entry's magnitude within its row, 0 for the smallest, of equal ones the lower index above. A
    row is all that belongs to one index of the first axis; a vector is one row; an entry alone in its row survives with
    probability `density`. Where density +- epsilon would leave [0, 1], epsilon shrinks to fit.

    Args:
      rescale_norm: "paper" divides each entry by its own probability; "l1" gives each tensor back its L1 norm.

    Returns:
      A `MergeMethod` with hyperparameters weight, density and epsilon [models], scale, normalize, rescale. Needs a base
      and a key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}
      >>> jm.merge("della_linear", [a], base=base, density=0.5, epsilon=0.5, key=jax.random.key(0))["w"]
      Array([0., 2.], dtype=float32)

    Reference:
      Deep et al., DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling, 2024. Its
      epsilon is the width of the range of probabilities, twice this one.
    """
    return _member(
        "della_linear",
        "Drop at random, small magnitudes more often, and rescale, then add.",
        sparsifier="rank",
        rescale_norm=rescale_norm,
        density=0.5,
        rescale=1.0,
    )


@register
def della(*, rescale_norm: RescaleNorm = "paper", divisor: Divisor = "absolute") -> MergeMethod:
    r"""DELLA: sampling by magnitude, then the sign election of TIES.

    .. math:: \hat d_i = m_i d_i / p_i, \quad s = \mathrm{sign} \textstyle\sum_i w_i \hat d_i, \quad
       \theta = \theta_0 + \lambda \textstyle\sum_i w_i \hat d_i [\mathrm{sign}(w_i \hat d_i) = s] / D

    Args:
      rescale_norm: see `della_linear`.
      divisor: see `ties`.

    Returns:
      A `MergeMethod` with hyperparameters weight, density and epsilon [models], scale, normalize, rescale; see
      `della_linear`. Needs a base and a key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 4.0])}, {"w": jnp.array([2.0, -1.0])}
      >>> jm.merge("della", [a, b], base=base, density=1.0, key=jax.random.key(0))["w"]
      Array([1.5, 4. ], dtype=float32)

    Reference:
      Deep et al., DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling, 2024.
    """
    return _member(
        "della",
        "Drop at random, small magnitudes more often, elect signs, average what agrees.",
        sparsifier="rank",
        elects=True,
        rescale_norm=rescale_norm,
        divisor=divisor,
        density=0.5,
        normalize=1.0,
        rescale=1.0,
    )


@register
def breadcrumbs() -> MergeMethod:
    r"""Model Breadcrumbs: drops the largest and the smallest entries of each task vector, adds up the rest.

    .. math:: \hat d_i = d_i [t_i \le \mathrm{rank} |d_i| < t_i + k_i], \quad
       k_i = \lfloor \rho_i n \rfloor, \ t_i = \min(\lfloor \gamma_i n \rfloor, n - k_i), \quad
       \theta = \theta_0 + \lambda \textstyle\sum_i w_i \hat d_i / D

    Ranks count from the largest magnitude of the tensor, of equal ones the lower index first. Exactly k entries
    survive: where density and gamma do not fit together, fewer of the largest are dropped. `rescale` gives each tensor
    back its L1 norm.

    Returns:
      A `MergeMethod` with hyperparameters weight, density and gamma [models], scale, normalize, rescale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros(4)}, {"w": jnp.array([9.0, -2.0, 0.1, 1.0])}
      >>> jm.merge("breadcrumbs", [a], base=base, density=0.5, gamma=0.25)["w"]
      Array([ 0., -2.,  0.,  1.], dtype=float32)

    Reference:
      Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, ECCV 2024.
    """
    return _member(
        "breadcrumbs",
        "Drop the largest and smallest entries, then add.",
        sparsifier="band",
        rescale_norm="l1",
        density=0.15,
        rescale=0.0,
    )


@register
def breadcrumbs_ties(*, divisor: Divisor = "absolute") -> MergeMethod:
    r"""Model Breadcrumbs with the sign election of TIES in place of the plain sum.

    .. math:: s = \mathrm{sign} \textstyle\sum_i w_i \hat d_i, \quad
       \theta = \theta_0 + \lambda \textstyle\sum_i w_i \hat d_i [\mathrm{sign}(w_i \hat d_i) = s] / D

    Args:
      divisor: see `ties`.

    Returns:
      A `MergeMethod` with hyperparameters weight, density and gamma [models], scale, normalize, rescale; see
      `breadcrumbs`. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([-1.0, 2.0])}
      >>> jm.merge("breadcrumbs_ties", [a, b], base=base, density=1.0)["w"]
      Array([3., 3.], dtype=float32)

    Reference:
      Davari and Belilovsky, Model Breadcrumbs, ECCV 2024; Yadav et al., TIES-Merging, NeurIPS 2023.
    """
    return _member(
        "breadcrumbs_ties",
        "Drop the largest and smallest entries, elect signs, add what agrees.",
        sparsifier="band",
        elects=True,
        rescale_norm="l1",
        divisor=divisor,
        density=0.15,
        rescale=0.0,
    )


def _member(
    name: str,
    summary: str,
    *,
    sparsifier: Sparsifier = "none",
    elects: bool = False,
    scope: TrimScope = "tensor",
    rescale_norm: RescaleNorm = "paper",
    divisor: Divisor = "absolute",
    minimum: int = 0,
    density: float | None = None,
    normalize: float = 0.0,
    rescale: float | None = None,
) -> MergeMethod:
    trims, drops = sparsifier in ("magnitude", "band"), sparsifier in ("random", "rank")
    hyperparams: dict[str, Hyperparameter] = {"weight": WEIGHT}
    if density is not None:
        meaning = "share of each task vector's entries that survives"
        hyperparams["density"] = Hyperparameter(
            density, 0.0, 1.0, meaning, "model", "fraction", False, share_of=scope
        )
    if sparsifier == "band":
        hyperparams["gamma"] = GAMMA
    if sparsifier == "rank":
        hyperparams["epsilon"] = EPSILON
    hyperparams["scale"] = SCALE
    hyperparams["normalize"] = Hyperparameter(
        normalize, 0.0, 1.0, "divide by the weights in play", kind="flag", differentiable=False
    )
    if rescale is not None:
        hyperparams["rescale"] = Hyperparameter(
            rescale,
            0.0,
            1.0,
            "scale survivors up for what was dropped",
            kind="flag",
            differentiable=False,
        )

    def settings(values: Values) -> Settings:
        return Settings(
            values["weight"],
            values["scale"],
            values["normalize"],
            _at_least(minimum, values.get("density")),
            trims,
            drops,
            elects,
            values.get("rescale"),
            rescale_norm == "l1",
            elects and divisor == "absolute",
            values.get("gamma"),
            values.get("epsilon"),
        )

    by_mass = rescale is not None and rescale_norm == "l1"
    member = Family(settings, trims, drops, by_mass, scope, sparsifier == "rank")
    return from_leaf(
        family_leaf(name, member, MappingProxyType(hyperparams)), summary=summary, family=member
    )


def _at_least(minimum: int, density: Fraction | None) -> Fraction | None:
    if density is None or not minimum:
        return density
    low = jnp.where(density.value > 0, jnp.uint32(minimum), jnp.uint32(0))
    return replace(density, count=jnp.maximum(density.count, low))


def _magnitudes(chunk: Chunk) -> list[jax.Array]:
    return [_magnitude(delta) for delta in chunk.deltas()]


def _magnitude(delta: jax.Array) -> jax.Array:
    # Selection works on at most 32 bits.
    return jnp.abs(delta).astype(jnp.float32)


def _counts(settings: Settings, size: int) -> list[tuple[jax.Array, ...]]:
    """How many survive, of them on top of how many that do not; all, where the chosen member does not trim."""
    assert settings.density is not None
    counts = settings.density.count
    if settings.trims is not True:
        counts = jnp.where(settings.trims, counts, jnp.uint32(size))
    if settings.skip is None:
        return [(count,) for count in counts]
    skipped = jnp.minimum(settings.skip.count, jnp.uint32(size) - counts)
    return [(count + skip, skip) for count, skip in zip(counts, skipped, strict=True)]


def _ranks(chunk: Chunk) -> list[jax.Array]:
    """Per model, the rank of each magnitude within its row, from 0 for the smallest to 1; 1/2 alone in a row."""
    shape = chunk.shape
    rows = (shape[0] if len(shape) > 1 else 1, -1)
    return [
        ranks_within_rows(_magnitude(delta).reshape(rows)).reshape(shape)
        for delta in chunk.deltas()
    ]


def _masks(chunk: Chunk, settings: Settings, found: Found, member: Family) -> list[Any]:
    """What survives of each model: True where the sparsifier is not in play."""
    masks: list[Any] = [True] * len(chunk.models)
    deltas = chunk.deltas()
    if member.trims:
        for i, (kept, *skipped) in enumerate(found["selection"]):
            size = _magnitude(deltas[i])
            masks[i] = chunk.keep(size, kept)
            for top in skipped:
                masks[i] = masks[i] & ~chunk.keep(size, top)
    if member.drops:
        shares = _shares(settings, found, member)
        for i, (draw, share) in enumerate(zip(chunk.uniform(), shares, strict=True)):
            mask = draw < share
            masks[i] = mask if masks[i] is True else masks[i] & mask
    return masks


def _shares(settings: Settings, found: Found, member: Family) -> list[jax.Array]:
    """Per model, the probability with which an entry survives the draws: one for all, or one for each entry."""
    assert settings.density is not None
    share = settings.density.value
    if settings.drops is not True:
        share = jnp.where(settings.drops, share, 1.0)
    if not member.ranks:
        return list(share)
    assert settings.epsilon is not None
    lean = jnp.minimum(settings.epsilon, jnp.minimum(share, 1.0 - share))
    return [share[i] + lean[i] * (2.0 * rank - 1.0) for i, rank in enumerate(found["ranks"])]


def _mass(chunk: Chunk, settings: Settings, found: Found, member: Family) -> jax.Array:
    """[models, 2]: the L1 norm of each task vector and of what survives of it."""
    assert settings.rescale is not None

    def measure(_: None) -> jax.Array:
        rows = []
        masks = _masks(chunk, settings, found, member)
        for delta, mask in zip(chunk.deltas(), masks, strict=True):
            size = jnp.abs(delta)
            rows.append(jnp.stack([jnp.sum(size), jnp.sum(jnp.where(mask, size, 0.0))]))
        return jnp.stack(rows)

    # Without rescaling the two passes over the data are not made.
    nothing = jnp.ones((len(chunk.models), 2), chunk.sources()[0].dtype)
    return jax.lax.cond(settings.rescale > 0.5, measure, lambda _: nothing, None)


def _unasked_mass(settings: Settings) -> np.ndarray | None:
    """What `_mass` comes to where nothing is rescaled; the values are concrete, of one tensor or of several."""
    if np.any(np.asarray(settings.rescale) > 0.5):
        return None
    return np.ones((*np.shape(settings.weight), 2), np.float32)


def _factors(settings: Settings, found: Found, member: Family) -> list[jax.Array] | None:
    """How much each model's survivors are scaled up: one number for all, or one for each entry."""
    if settings.rescale is None:
        return None
    factors = list(jnp.ones_like(settings.weight))
    if member.rescales:
        whole, kept = found["mass"][:, 0], found["mass"][:, 1]
        factors = list(jnp.where(kept > 0, whole / jnp.where(kept > 0, kept, 1.0), 1.0))
    if settings.by_mass is not True:
        for i, share in enumerate(_shares(settings, found, member)):
            inverse = jnp.where(share > 0, 1.0 / jnp.where(share > 0, share, 1.0), 1.0)
            mixed = settings.by_mass is not False
            factors[i] = jnp.where(settings.by_mass, factors[i], inverse) if mixed else inverse
    return [jnp.where(settings.rescale > 0.5, factor, 1.0) for factor in factors]


def _merge(chunk: Chunk, settings: Settings, found: Found, member: Family) -> jax.Array:
    factors = _factors(settings, found, member)
    masks = _masks(chunk, settings, found, member)
    parts = []
    for i, (delta, mask) in enumerate(zip(chunk.deltas(), masks, strict=True)):
        weight = settings.weight[i] if factors is None else settings.weight[i] * factors[i]
        part = weight * delta
        parts.append(part if mask is True else jnp.where(mask, part, 0.0))
    agreeing: list[Any] = [True] * len(parts)
    if settings.elects is not False:
        positive = functools.reduce(jnp.add, parts) >= 0
        for i, part in enumerate(parts):
            agrees = (part != 0) & ((part > 0) == positive)
            agreeing[i] = agrees if settings.elects is True else agrees | ~settings.elects
        parts = [jnp.where(a, part, 0.0) for a, part in zip(agreeing, parts, strict=True)]
    total = functools.reduce(jnp.add, parts)
    counted = _absolute(settings)
    if settings.elects is False:
        divisor = jnp.sum(counted)
    else:
        divisor = functools.reduce(
            jnp.add, [jnp.where(a, counted[i], 0.0) for i, a in enumerate(agreeing)]
        )
    # A divisor that cancels to nothing would blow the merge up: it counts as 1.
    tolerance = jnp.where(settings.absolute, 0.0, 1e-6)
    vanishes = jnp.abs(divisor) <= tolerance * jnp.sum(jnp.abs(settings.weight))
    divisor = jnp.where((settings.normalize > 0.5) & ~vanishes, divisor, 1.0)
    return chunk.with_base(settings.scale * (total / divisor))


def _absolute(settings: Settings) -> jax.Array:
    if settings.absolute is True:
        return jnp.abs(settings.weight)
    if settings.absolute is False:
        return settings.weight
    return jnp.where(settings.absolute, jnp.abs(settings.weight), settings.weight)
