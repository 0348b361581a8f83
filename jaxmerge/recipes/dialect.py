"""mergekit's dialect as data: what its twenty methods take, and the library's options for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BaseRole = Literal["required", "optional", "source"]


@dataclass(frozen=True)
class MethodDialect:
    """What mergekit's dialect changes for one method.

    Attributes:
        parameters: all the parameters of the method there, by the names that it uses, with the
            defaults; None where a value must be given.
        options: static options of the library's constructor that give the same result.
        switches: flags there that choose the structure of the method, with their defaults.
        switched: for some settings of the switches, more of the library's options.
        base: "source": the base is one more model. Else it is what task vectors start from (or
            the end at t = 0), "required" or "optional", and no model to be merged even where
            `models` lists it.
    """

    parameters: Mapping[str, float | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    base: BaseRole = "required"
    switches: Mapping[str, bool] = field(default_factory=dict)
    switched: tuple[tuple[Mapping[str, bool], Mapping[str, Any]], ...] = ()

    def options_for(self, switches: Mapping[str, bool]) -> dict[str, Any]:
        """Returns the library's options at given switches.

        >>> MERGEKIT["model_stock"].options_for({"filter_wise": True})
        {'guard': 'floor', 'over': 'last'}
        """
        chosen = {**self.switches, **switches}
        options = dict(self.options)
        for setting, more in self.switched:
            if setting == chosen:
                options.update(more)
        return options


def _task_vectors(
    *,
    normalize: float = 0.0,
    rescale: float = 0.0,
    options: Mapping[str, Any] | None = None,
    **parameters: float,
) -> MethodDialect:
    common = {"weight": None, "density": 1.0, "normalize": normalize, "rescale": rescale}
    return MethodDialect({**common, "lambda": 1.0, **parameters}, options or {})


_SIGNED = {"divisor": "signed"}
_BY_MASS = {"rescale_norm": "l1"}

MERGEKIT: Mapping[str, MethodDialect] = {
    "linear": MethodDialect({"weight": None, "normalize": 1.0}, base="source"),
    "task_arithmetic": _task_vectors(),
    "ties": _task_vectors(normalize=1.0, options={"scope": "tensor", "minimum": 1, **_SIGNED}),
    "dare_linear": _task_vectors(rescale=1.0, options=_BY_MASS),
    "dare_ties": _task_vectors(rescale=1.0, options={**_BY_MASS, **_SIGNED}),
    "della_linear": _task_vectors(rescale=1.0, epsilon=0.15, options=_BY_MASS),
    "della": _task_vectors(
        normalize=1.0, rescale=1.0, epsilon=0.15, options={**_BY_MASS, **_SIGNED}
    ),
    "breadcrumbs": _task_vectors(gamma=0.01),
    "breadcrumbs_ties": _task_vectors(gamma=0.01, options=_SIGNED),
    "slerp": MethodDialect({"t": None}, {"zero_norm": "arc"}),
    "nuslerp": MethodDialect(
        {"weight": None},
        {"zero_norm": "arc"},
        base="optional",
        switches={"nuslerp_flatten": True, "nuslerp_row_wise": False},
        switched=(
            ({"nuslerp_flatten": False, "nuslerp_row_wise": False}, {"over": "last"}),
            ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"over": "first"}),
        ),
    ),
    "multislerp": MethodDialect(
        {"weight": None, "normalize_weights": 1.0, "eps": 1e-8},
        {"tangent": "chord"},
        base="optional",
    ),
    "karcher": MethodDialect({"max_iter": 10.0, "tol": 1e-5}, base="source"),
    "model_stock": MethodDialect(
        {},
        {"guard": "floor"},
        switches={"filter_wise": False},
        switched=(({"filter_wise": True}, {"over": "last"}),),
    ),
    "sce": MethodDialect({"select_topk": 1.0}, {"among": "varying", "weak": "uniform"}),
    "nearswap": MethodDialect({"t": None}),
    "arcee_fusion": MethodDialect({}),
    "ram": MethodDialect({"epsilon": 1e-5}),
    "ramplus_tl": MethodDialect({"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "passthrough": MethodDialect({"scale": 1.0}, base="source"),
}

# Every parameter that some method there has; a method ignores those of the others.
PARAMETERS = frozenset(
    key for peer in MERGEKIT.values() for key in (*peer.parameters, *peer.switches)
)

# `lambda` is a word of Python's own.
_LIBRARY_NAMES = {"lambda": "scale"}


def library_name(name: str) -> str:
    """Returns the library's word for a parameter of a recipe.

    >>> library_name("lambda"), library_name("weight")
    ('scale', 'weight')
    """
    return _LIBRARY_NAMES.get(name, name)


def mergekit_name(name: str) -> str:
    """Returns mergekit's word for one of the library's.

    >>> mergekit_name("scale"), mergekit_name("weight")
    ('lambda', 'weight')
    """
    return next((peer for peer, library in _LIBRARY_NAMES.items() if library == name), name)
