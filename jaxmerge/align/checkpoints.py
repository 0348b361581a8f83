"""Alignment from checkpoint to checkpoint: one model's units in another's order, written as a model of its own."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.matching import MatchInfo, match
from jaxmerge.align.permuting import Permutations, permute
from jaxmerge.align.spaces import Space, activation_space, dual_space, weight_space
from jaxmerge.align.symmetry import symmetry
from jaxmerge.converters import load_model, save_model, split_key
from jaxmerge.converters.side_files import side_files
from jaxmerge.tree import flatten, nearest

RECORD = "alignment.json"
"""The file in the output that holds the permutations and how well the units match."""
METHODS = ("weight", "activation", "dual")
# Examples that are run at once.
_BATCH = 256


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
    *,
    method: Literal["weight", "activation", "dual"] = "dual",
    alpha: float = 0.5,
    data: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Aligned:
    """Aligns one checkpoint with another and writes it as a model of its own, of the same function.

    Args:
      a: the model that stays as it is: a path that `jaxmerge.converters.load_model` reads, ``FILE#KEY`` too.
      b: the model whose units are brought into the order of `a`'s; of the same family and sizes.
      out: the output's folder, which must not exist; it comes to be beside it and is renamed when it is whole. It
        gets the files that stand beside `b`'s weights, and alignment.json.
      method: what is compared: "weight", "activation", or "dual" for both.
      alpha: the share of the weights, for "dual".
      data: a .npy or .npz file of inputs as the family's model takes them, images as [n, height, width, channels],
        for "activation" and "dual". A model that takes several inputs needs a .npz that names them.
      seed: of the orders in which layers are visited.

    Raises:
      ValueError: an unknown method, data that is missing, unreadable or of another shape, models that do not fit each
        other, or an output that exists. CheckpointError, which is one: as for `load_model`.
    """
    space = space_of(method, alpha)
    folder = Path(out).expanduser()
    if os.path.lexists(folder):
        raise ValueError(f"{folder}: exists already")
    if space.data and data is None:
        raise ValueError(
            f"method {method!r} compares activations: give inputs (a .npz or .npy file)"
        )
    path_a, key_a = split_key(a)
    path_b, key_b = split_key(b)
    apply_fn, of_a, config_a = load_model(path_a, key=key_a)
    _, of_b, config_b = load_model(path_b, key=key_b)
    _check_alike(a, of_a, config_a.family, b, of_b, config_b.family)
    expected = config_a.table.inputs(config_a.model)
    inputs = read_inputs(data, expected) if space.data and data is not None else None
    spec = symmetry(apply_fn, of_a, expected)
    found, info = match(
        spec,
        of_a,
        of_b,
        space,
        x=None if inputs is None else _batches(inputs),
        apply_fn=apply_fn,
        key=jax.random.key(seed),
    )
    record = {
        "a": a,
        "b": b,
        "method": method,
        "alpha": alpha if method == "dual" else None,
        "data": None if inputs is None else os.fspath(data or ""),
        "seed": seed,
        "score": float(info.score),
        "sweeps": int(info.sweeps),
        "settled": bool(info.settled),
        "similarity": {name: float(value) for name, value in info.similarity.items()},
        "permutations": {name: np.asarray(p).tolist() for name, p in found.items()},
    }
    _write(folder, permute(spec, found, of_b), config_b, Path(path_b), record)
    return Aligned(found, info, record)


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
