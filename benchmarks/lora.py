"""Factors of task vectors: the randomised SVD beside PyTorch's and beside a full SVD, in time and in what is lost.

    python benchmarks/lora.py [--sizes 1024,2048] [--rank 32] [--runs 5] [--json OUT]

The matrices have the spectrum that training leaves: a few strong directions, then a slow decay.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from clock import in_turn
from machine import describe, headline
from report import Report, Table

from jaxmerge.converters.lora import randomised_svd

# The loss of the best factors; the randomised ones may lose so much more of the squared norm.
MOST_LOSS = 1.05
STRONG, DECAY = 8, 0.5


def matrix(size: int, seed: int) -> np.ndarray:
    """[size, 2 size], singular values that fall as a power of their number, the first ones lifted."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(size, size)))[0]
    right = np.linalg.qr(rng.normal(size=(2 * size, size)))[0]
    values = np.arange(1, size + 1) ** -DECAY
    values[:STRONG] *= 10
    return ((left * values) @ right.T).astype(np.float32)


def loss(a: np.ndarray, u: Any, s: Any, v: Any) -> float:
    """The share of the squared norm that the factors lose."""
    u, s, v = (np.asarray(one, np.float64) for one in (u, s, v))
    return float(np.sum((a - (u * s) @ v) ** 2) / np.sum(np.square(a, dtype=np.float64)))


def measure(size: int, rank: int, runs: int, table: Table) -> None:
    a = matrix(size, seed=size)
    on_jax, on_torch, key = jnp.asarray(a), torch.from_numpy(a), jax.random.key(0)

    def by_torch() -> Any:
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(on_torch, q=rank + 8, niter=2)
        return u[:, :rank].numpy(), s[:rank].numpy(), v[:, :rank].T.numpy()

    def full() -> Any:
        u, s, v = np.linalg.svd(a, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]

    routes: dict[str, Callable[[], Any]] = {
        "jaxmerge, randomised": lambda: tuple(randomised_svd(on_jax, key, rank=rank)),
        "torch.svd_lowrank": by_torch,
        "NumPy, full": full,
    }
    losses = {name: loss(a, *route()) for name, route in routes.items()}
    times = in_turn(routes, runs)
    for name in routes:
        row: dict[str, Any] = {"size": f"{size} x {2 * size}", "route": name}
        row |= {"ms": times[name].milliseconds(), "lost": losses[name]}
        if name.startswith("jaxmerge"):
            share = losses[name] / losses["NumPy, full"]
            row["holds"] = "yes" if share <= MOST_LOSS else f"no: loses {share:.2f} times the best"
        table.add(**row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024,2048")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("lora", __doc__.splitlines()[0], describe(), 0)
    print(f"{headline(report.machine)}; seed 0")
    table = Table(
        f"Factors of rank {arguments.rank}",
        {"size": "", "route": "", "ms": ".0f", "lost": ".4f", "holds": ""},
        [
            "Both randomised routes take 8 more directions and 2 power iterations. Lost: share of the squared norm.",
            f"Limit: {MOST_LOSS:g} times what the best factors, those of a full SVD, lose.",
        ],
    )
    table.start()
    report.tables.append(table)
    for size in map(int, arguments.sizes.split(",")):
        measure(size, arguments.rank, arguments.runs, table)
    report.write(arguments.json)


if __name__ == "__main__":
    main()
