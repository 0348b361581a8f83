"""Canonical string paths of any pytree, and selection by pattern."""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.tree_util import KeyEntry, PyTreeDef

Pattern = str | re.Pattern[str]


def flatten(tree: Any) -> tuple[dict[str, Any], PyTreeDef]:
    """Flattens a pytree into an ordered mapping from path to leaf.

    A path joins the keys, indices and attribute names from the root with "/". The ``value`` attribute of an nnx
    ``Variable`` is left out, so that an nnx ``State`` and its pure dict have the same paths. A tree that is a single
    leaf has the path "".

    Args:
      tree: any pytree; ``None`` counts as an empty subtree.

    Returns:
      The leaves by path, in the order of ``jax.tree_util.tree_flatten``, and the tree's definition.

    Raises:
      ValueError: two leaves have the same path (a key holds a "/").

    Example:
      >>> leaves, _ = flatten({"layers": [{"kernel": 1.0}, {"kernel": 2.0}]})
      >>> leaves
      {'layers/0/kernel': 1.0, 'layers/1/kernel': 2.0}
    """
    variables = {
        path
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]
        if _is_variable(leaf)
    }
    entries, definition = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[str, Any] = {}
    for keys, leaf in entries:
        name = path_string(keys[:-1] if keys and keys[:-1] in variables else keys)
        if name in leaves:
            raise ValueError(f"two leaves have the same path {name!r}: a key holds a '/'")
        leaves[name] = leaf
    return leaves, definition


def unflatten(definition: PyTreeDef, leaves: Iterable[Any]) -> Any:
    """Builds the tree back from its definition and its leaves in the order of `flatten`."""
    return jax.tree_util.tree_unflatten(definition, list(leaves))


def paths(tree: Any) -> list[str]:
    """Lists the paths of a pytree's leaves, in order.

    Example:
      >>> paths({"b": 1.0, "a": {"x": 2.0}})
      ['a/x', 'b']
    """
    return list(flatten(tree)[0])


def path_string(keys: Sequence[KeyEntry]) -> str:
    """Writes a key path of JAX as "layers/3/attn/kernel"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def select(tree: Any, pattern: Pattern | Sequence[Pattern]) -> dict[str, Any]:
    """Selects the leaves whose path matches a pattern.

    Args:
      tree: any pytree.
      pattern: a glob, a compiled regular expression, or several of them (any may match); see `matches`.

    Returns:
      The matching leaves by path.

    Example:
      >>> select({"a": {"kernel": 1.0, "bias": 2.0}, "b": {"kernel": 3.0}}, "*/kernel")
      {'a/kernel': 1.0, 'b/kernel': 3.0}
    """
    patterns = [pattern] if isinstance(pattern, str | re.Pattern) else list(pattern)
    return {
        path: leaf
        for path, leaf in flatten(tree)[0].items()
        if any(matches(path, one) for one in patterns)
    }


def matches(path: str, pattern: Pattern) -> bool:
    """Tells whether a path matches a glob or a compiled regular expression.

    In a glob ``*`` stands for any run of characters but "/", ``**`` for any run, ``?`` for one character but "/",
    ``[abc]`` for one of a set; the whole path must match. A regular expression matches anywhere (``re.search``).

    Example:
      >>> matches("layers/3/attn/kernel", "layers/*/attn/*"), matches("layers/3/attn/kernel", "**/kernel")
      (True, True)
    """
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    return _glob(pattern).fullmatch(path) is not None


def nearest(name: str, known: Iterable[str]) -> str:
    """Words a suggestion for an unknown name: "; did you mean 'ties'?", or nothing.

    Example:
      >>> nearest("tise", ["ties", "linear"])
      "; did you mean 'ties'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_variable(node: Any) -> bool:
    # nnx is recognised by its module's name: the core does not import Flax.
    kind = type(node)
    return any(
        base.__module__.startswith("flax.nnx") and base.__name__ == "Variable"
        for base in kind.__mro__
    )


@functools.lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
    return re.compile("".join(map(_expression, parts)), re.DOTALL)


def _expression(part: str) -> str:
    """The regular expression of one part of a glob."""
    special = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    if part in special:
        return special[part]
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        return "[" + part[1:-1].replace("\\", r"\\").replace("[", r"\[") + "]"
    return re.escape(part)
