"""Whole trimmed merges, `jm.merge` as it stands, beside the same merges in PyTorch with argsort."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from clock import in_turn
from report import Table
from workload import LAYERS, nbytes, trees, width_of

import jaxmerge as jm
from jaxmerge.methods import LeafMethod, MergeMethod
from sections import Options

RUNS = 3
SMALLER = 2
"""How many times smaller the models are: PyTorch takes its time."""
LIMIT = 10.0
TOLERANCE = 1e-4
"""The share of entries that may differ: of equal magnitudes torch takes any, and sums in another order move a few."""


class Case(NamedTuple):
    """A merge of both libraries: the hyperparameters are the same, `peer` names the function in `torch_merges`."""

    method: str
    options: dict[str, Any]
    hyperparams: dict[str, float]
    peer: str
    arguments: dict[str, Any]


CASES = (
    Case("ties", {"scope": "model"}, {"density": 0.2}, "ties", {"scope": "model"}),
    Case("ties", {"scope": "tensor"}, {"density": 0.2}, "ties", {"scope": "tensor"}),
    Case("breadcrumbs", {}, {"density": 0.2, "gamma": 0.01}, "breadcrumbs", {"elects": False}),
    Case("breadcrumbs_ties", {}, {"density": 0.2, "gamma": 0.01}, "breadcrumbs", {"elects": True}),
    Case("sce", {}, {"select_topk": 0.2}, "sce", {}),
    Case("della_linear", {}, {"density": 0.5, "epsilon": 0.15}, "della", {"elects": False}),
    Case("della", {}, {"density": 0.5, "epsilon": 0.15}, "della", {"elects": True}),
)


def run(options: Options) -> Iterator[Table]:
    if importlib.util.find_spec("torch") is None:
        print("\nTrimmed merges beside PyTorch: left out, torch is not installed")
        return
    if jax.default_backend() != "cpu":
        print("\nTrimmed merges beside PyTorch: left out, the comparison is made on CPUs")
        return
    import torch

    base, *tuned = trees(LAYERS, width_of(options.elements // SMALLER), 3, options.seed)
    key = jax.random.key(options.seed)
    table = Table(
        "Trimmed merges beside PyTorch with argsort",
        {
            "method": "",
            "jaxmerge ms": ".1f",
            "torch ms": ".1f",
            "times faster": ".1f",
            "limit": ".0f",
            "entries that differ": ".1e",
            "holds": "",
        },
        [
            f"Two models and a base of {nbytes(base) / 2**20:.0f} MiB, a whole jm.merge (compiled before);"
            f" torch with {torch.get_num_threads()} threads, its default.",
            "For DELLA the results are compared with the library's draws; torch then draws its own.",
        ],
    )
    table.start()
    plain = [_tensors(tree) for tree in (base, *tuned)]
    for case in CASES:
        if case.method in options.methods:
            method = jm.methods.get(case.method)(**case.options)
            label = " ".join([case.method, *case.options.values()])
            ours = functools.partial(
                jm.merge, method, tuned, base=base, key=_key(method, key), **case.hyperparams
            )
            differ = _differing(ours(), _peer(case, plain, _draws(method, tuned, base, key))())
            times = in_turn({"jaxmerge": ours, "torch": _peer(case, plain)}, options.runs or RUNS)
            faster = times["torch"].median / times["jaxmerge"].median
            holds = "yes" if faster >= LIMIT else f"no: {faster:.1f}x"
            if differ > TOLERANCE:
                holds = "no: the results differ"
            table.add(
                **{
                    "method": label,
                    "jaxmerge ms": times["jaxmerge"].milliseconds(),
                    "torch ms": times["torch"].milliseconds(),
                    "times faster": faster,
                    "limit": LIMIT,
                    "entries that differ": differ,
                    "holds": holds,
                }
            )
    yield table


def _peer(case: Case, plain: list[Any], draws: list[Any] | None = None) -> Callable[[], Any]:
    import torch_merges

    arguments = {**case.hyperparams, **case.arguments}
    if draws is not None:
        arguments["uniforms"] = draws
    return functools.partial(getattr(torch_merges, case.peer), plain[0], plain[1:], **arguments)


def _tensors(tree: Any) -> dict[str, Any]:
    import torch

    leaves = jm.tree.flatten(tree)[0]
    # JAX's arrays are read-only; torch warns of that unless it gets a copy.
    return {path: torch.from_numpy(np.array(leaf)) for path, leaf in leaves.items()}


def _key(method: MergeMethod, key: jax.Array) -> jax.Array | None:
    return key if method.random else None


def _draws(method: MergeMethod, tuned: Any, base: Any, key: jax.Array) -> list[Any] | None:
    """The library's uniform draws under this key, one tree per model."""
    if not method.random:
        return None
    found = []
    for i in range(len(tuned)):
        leaf = LeafMethod(
            f"draws of model {i}",
            lambda chunk, values, found, i=i: chunk.uniform()[i],
            MappingProxyType({}),
            random=True,
        )
        draws = jm.methods.from_leaf(leaf, summary="what a random method draws")
        found.append(_tensors(jm.merge(draws, tuned, base=base, key=key)))
    return found


def _differing(ours: Any, theirs: Any) -> float:
    """The share of entries that differ by more than rounding."""
    different = total = 0
    for path, leaf in jm.tree.flatten(ours)[0].items():
        mine, peer = np.asarray(leaf), theirs[path].numpy()
        different += int(np.sum(~np.isclose(mine, peer, rtol=1e-4, atol=1e-6)))
        total += mine.size
    return different / total
