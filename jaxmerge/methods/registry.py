"""One registry of merge methods: recipes, the command line, search and the contract tests read it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from jaxmerge.methods.method import MergeMethod
from jaxmerge.tree import nearest

Constructor = Callable[..., MergeMethod]
AnyConstructor = TypeVar("AnyConstructor", bound=Callable[..., MergeMethod])

_CONSTRUCTORS: dict[str, Constructor] = {}


def register(constructor: AnyConstructor) -> AnyConstructor:
    """Adds a constructor to the registry under its function's name.

    The constructor takes keyword-only options (the method's static structure) and returns a `MergeMethod`. Equal
    options give the same object, so that a method may be a static argument of a jitted function without retracing.

    Args:
      constructor: a function ``name(*, option=default, ...) -> MergeMethod``; all options hashable.

    Returns:
      The constructor, cached.

    Raises:
      ValueError: the name is taken, or a parameter is not a keyword-only option with a default.

    Example:
      >>> import jaxmerge as jm
      >>> jm.methods.get("ties")() is jm.methods.ties(scope="model")
      True
    """
    name = constructor.__name__
    taken = _CONSTRUCTORS.get(name)
    # A module that is loaded again registers its own methods again.
    if taken is not None and taken.__module__ != constructor.__module__:
        raise ValueError(f"a merge method {name!r} is registered already, by {taken.__module__}")
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise ValueError(
                f"{name}: parameter {parameter.name!r} must be keyword-only with a default"
            )
    cached = functools.lru_cache(maxsize=None)(constructor)
    defaults = options(constructor)

    @functools.wraps(constructor)
    def build(**given: Any) -> MergeMethod:
        unknown = [option for option in given if option not in defaults]
        if unknown:
            raise TypeError(
                f"{name} has no option {unknown[0]!r}{nearest(unknown[0], defaults)}; "
                f"it has: {', '.join(defaults) or 'none'}"
            )
        chosen = {**defaults, **given}
        _check_options(constructor, chosen)
        return cached(**chosen)

    _CONSTRUCTORS[name] = build
    return build  # type: ignore[return-value]


def names() -> list[str]:
    """The names of all registered methods, sorted."""
    return sorted(_CONSTRUCTORS)


def get(name: str) -> Constructor:
    """The constructor of a registered method.

    Raises:
      ValueError: unknown name; the message gives the nearest one.

    Example:
      >>> import jaxmerge as jm
      >>> jm.methods.get("linear")().name
      'linear'
    """
    if name not in _CONSTRUCTORS:
        raise ValueError(
            f"unknown merge method {name!r}{nearest(name, _CONSTRUCTORS)}; "
            f"the methods are {', '.join(names())}"
        )
    return _CONSTRUCTORS[name]


def options(constructor: Constructor) -> dict[str, Any]:
    """A constructor's static options with their defaults."""
    signature = inspect.signature(constructor)
    return {parameter.name: parameter.default for parameter in signature.parameters.values()}


def allowed(constructor: Constructor, option: str) -> tuple[Any, ...] | None:
    """The values that an option may take, where its type is a `Literal`."""
    annotation = inspect.signature(constructor).parameters[option].annotation
    return getattr(annotation, "__args__", None)


def _check_options(constructor: Constructor, chosen: dict[str, Any]) -> None:
    for option, value in chosen.items():
        values = allowed(constructor, option)
        if values is not None and value not in values:
            listed = ", ".join(map(repr, values))
            raise ValueError(
                f"{constructor.__name__}: option {option} must be one of {listed}, found {value!r}"
            )
