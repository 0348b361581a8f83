"""Alignment from checkpoint to checkpoint: one model's units in another's order, written as a model of its own."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.matching import MatchInfo, match, match_restarts
from jaxmerge.align.permuting import Permutations, permute
from jaxmerge.align.spaces import Space, activation_space, dual_space, weight_space
from jaxmerge.align.spec import PermutationSpec
from jaxmerge.align.splitting import split_trees
from jaxmerge.align.symmetry import symmetry
from jaxmerge.converters import load_model, save_model, split_key
from jaxmerge.converters.side_files import side_files
from jaxmerge.tree import flatten, nearest

RECORD = "alignment.json"
"""The file in the output that holds the permutations and how well the units match."""
METHODS = ("weight", "activation", "dual")
Method = Literal["weight", "activation", "dual"]
Heads = Literal["joint", "split"]
# Examples that are run at once.
_BATCH = 256


class How(NamedTuple):
    """How units are matched.

    Attributes:
      method: what is compared: "weight", "activation", or "dual" for both.
      alpha: the share of the weights, for "dual".
      seed: of the orders in which layers are visited, and of random starts.
      restarts: how many matchings are made, of which the best counts.
      heads: "joint" for what the program's symmetry allows; "split" as the official code of MuDSC does it, which
        changes the function of models with attention (`jaxmerge.align.split_trees`).
    """

    method: Method = "dual"
    alpha: float = 0.5
    seed: int = 0
    restarts: int = 1
    heads: Heads = "joint"


DEFAULT = How()


class Aligned(NamedTuple):
    """An alignment that was written.

    Attributes:
      permutations: per node, as `jaxmerge.align.match` finds them.
      info: how the matching went.
      record: what alignment.json holds.
    """

    permutations: Permutations
    info: MatchInfo
    record: dict[str, Any]


def align_checkpoints(
    a: str,
    b: str,
    out: str | os.PathLike[str],
    how: How = DEFAULT,
    *,
    data: str | os.PathLike[str] | None = None,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Aligned:
    """Aligns one checkpoint with another and writes it as a model of its own, of the same function.

    Args:
      a: the model that stays as it is: a path that `jaxmerge.converters.load_model` reads, ``FILE#KEY`` too.
      b: the model whose units are brought into the order of `a`'s; of the same family and sizes.
      out: the output's folder, which must not exist; it comes to be beside it and is renamed when it is whole. It
        gets the files that stand beside `b`'s weights, and alignment.json.
      how: how units are matched.
      data: a .npy or .npz file of inputs as the family's model takes them, images as [n, height, width, channels],
        for "activation" and "dual". A model that takes several inputs needs a .npz that names them.
      family, config: of both models, as for `load_model`, where the checkpoints do not tell.

    Raises:
      ValueError: an unknown method, data that is missing, unreadable or of another shape, models that do not fit each
        other, or an output that exists. CheckpointError, which is one: as for `load_model`.
    """
    space = space_of(how.method, how.alpha)
    folder = Path(out).expanduser()
    if os.path.lexists(folder):
        raise ValueError(f"{folder}: exists already")
    if space.data and data is None:
        raise ValueError(
            f"method {how.method!r} compares activations: give inputs (a .npz or .npy file)"
        )
    path_a, key_a = split_key(a)
    path_b, key_b = split_key(b)
    apply_fn, of_a, config_a = load_model(path_a, family=family, config=config, key=key_a)
    _, of_b, config_b = load_model(path_b, family=family, config=config, key=key_b)
    _check_alike(a, of_a, config_a.family, b, of_b, config_b.family)
    expected = config_a.table.inputs(config_a.model)
    inputs = read_inputs(data, expected) if space.data and data is not None else None
    spec = units_of(apply_fn, of_a, expected, how.heads)
    found, info = match_models(spec, apply_fn, of_a, of_b, inputs, how)
    record = {
        "a": a,
        "b": b,
        **described(how),
        "data": None if inputs is None else os.fspath(data or ""),
        **recorded(found, info),
    }
    _write(folder, permute(spec, found, of_b), config_b, Path(path_b), record)
    return Aligned(found, info, record)


def units_of(
    apply_fn: Callable[..., Any], params: Any, inputs: Any, heads: Heads = "joint"
) -> PermutationSpec:
    """Where the units of a model stand.

    Args:
      apply_fn: (params, inputs) -> one array.
      params: arrays, or their shapes.
      inputs: arrays, or their shapes.
      heads: as in `How`.

    Raises:
      ValueError: heads that cannot be split.
    """
    spec = symmetry(apply_fn, params, inputs)
    return split_trees(spec) if heads == "split" else spec


def match_models(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    a: Any,
    b: Any,
    inputs: Any,
    how: How,
) -> tuple[Permutations, MatchInfo]:
    """Finds the order of `b`'s units that fits them to `a`'s.

    Args:
      spec: where the units stand.
      apply_fn: the function of both.
      a, b: trees of parameters; `a` stays as it is.
      inputs: what `read_inputs` gives; None where the method compares weights alone.
      how: how units are matched.

    Raises:
      ValueError: as for `jaxmerge.align.match`.
    """
    space, key = space_of(how.method, how.alpha), jax.random.key(how.seed)
    x = None if inputs is None else _batches(inputs)
    if how.restarts == 1:
        return match(spec, a, b, space, x=x, apply_fn=apply_fn, key=key)
    return match_restarts(spec, a, b, space, how.restarts, x=x, apply_fn=apply_fn, key=key)


def described(how: How) -> dict[str, Any]:
    """How units are matched, as plain data.

    Example:
      >>> described(How("weight"))
      {'method': 'weight', 'alpha': None, 'seed': 0, 'restarts': 1, 'heads': 'joint'}
    """
    return {**how._asdict(), "alpha": how.alpha if how.method == "dual" else None}


def recorded(found: Permutations, info: MatchInfo) -> dict[str, Any]:
    """What a matching found, as plain data."""
    return {
        "score": float(info.score),
        "sweeps": int(info.sweeps),
        "settled": bool(info.settled),
        "similarity": {name: float(value) for name, value in info.similarity.items()},
        "permutations": {name: np.asarray(p).tolist() for name, p in found.items()},
    }


def space_of(method: str, alpha: float = 0.5) -> Space:
    """The space of a method's name.

    Raises:
      ValueError: an unknown method, or a share outside of [0, 1].

    Example:
      >>> space_of("weight").data, space_of("dual").data
      (False, True)
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}{nearest(method, METHODS)}; there are {', '.join(METHODS)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the weights' share, from 0 to 1; found {alpha:g}")
    if method == "weight":
        return weight_space()
    return activation_space() if method == "activation" else dual_space(alpha)


def read_inputs(path: str | os.PathLike[str], expected: Any) -> Any:
    """Reads inputs from a .npy or .npz file; nothing in it is executed.

    Args:
      path: the file.
      expected: the shape that the model takes with a batch of 1 (`jax.ShapeDtypeStruct`), or a mapping of such.

    Returns:
      One array, or a dict of arrays, as `expected`.

    Raises:
      ValueError: no such file, one that NumPy cannot read, arrays that are missing, unknown or of another shape.
    """
    file = os.fspath(path)
    try:
        with open(file, "rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: no .npy or .npz file of plain numbers: {error}") from None
    named = isinstance(expected, dict)
    wanted = expected if named else {"": expected}
    if len(wanted) == len(arrays) == 1:
        arrays = dict(zip(wanted, arrays.values(), strict=True))
    for name in arrays:
        if name not in wanted:
            raise ValueError(
                f"{file}: expected {_listed(wanted)}, found {_listed(arrays)}{nearest(name, wanted)}"
            )
    found = {}
    for name, struct in wanted.items():
        if name not in arrays:
            raise ValueError(f"{file}: expected {_listed(wanted)}, found {_listed(arrays)}")
        array, label = arrays[name], f" {name!r}" if name else ""
        discrete = jnp.issubdtype(struct.dtype, jnp.integer)
        fits = array.ndim == len(struct.shape) and array.shape[0] > 0
        # Sequences of tokens may have any length.
        fits = fits and (discrete or array.shape[1:] == struct.shape[1:])
        fits = fits and (np.issubdtype(array.dtype, np.integer) or not discrete)
        if not fits or array.dtype.kind not in "fiub":
            shape = ", ".join(["n", *("length" if discrete else str(n) for n in struct.shape[1:])])
            kind = "integers" if discrete else "numbers"
            raise ValueError(
                f"{file}: inputs{label}: expected {kind} [{shape}], found {array.dtype} {list(array.shape)}"
            )
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{file}: inputs{label}: NaN or infinity")
        found[name] = array if discrete else array.astype(struct.dtype)
    return found if named else found[""]


def _batches(inputs: Any) -> list[Any]:
    count = len(jax.tree.leaves(inputs)[0])
    return [
        jax.tree.map(lambda array, i=i: array[i : i + _BATCH], inputs)
        for i in range(0, count, _BATCH)
    ]


def _check_alike(a: str, of_a: Any, family_a: str, b: str, of_b: Any, family_b: str) -> None:
    if family_a != family_b:
        raise ValueError(f"{b}: of the family {family_b}, expected {family_a} as {a}")
    leaves_a, leaves_b = flatten(of_a)[0], flatten(of_b)[0]
    for path in (*leaves_a, *leaves_b):
        one, other = (
            list(leaves[path].shape) if path in leaves else None for leaves in (leaves_a, leaves_b)
        )
        if one != other:
            raise ValueError(f"{b}: {path!r}: expected {one} as in {a}, found {other}")


def _write(out: Path, params: Any, config: Any, source: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        if source.is_dir():
            for name in side_files(source, apart=out):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
        save_model(folder, params, config)
        text = json.dumps(record, indent=2, allow_nan=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        os.rename(folder, out)


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names if name) or "one array"
