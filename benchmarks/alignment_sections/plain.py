"""Matching as a plain loop of NumPy and SciPy: the descent that jaxmerge compiles, for nodes that lie in no other."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

import jaxmerge as jm


def match(
    spec: jm.align.PermutationSpec,
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    data: Mapping[str, np.ndarray],
    alpha: float,
    order: Sequence[Sequence[str]],
    patience: int = 5,
) -> tuple[dict[str, np.ndarray], int]:
    """Descends from the match of the activations until a sweep changes nothing or `patience` bring nothing.

    Args:
      spec, a, b: where the units stand, and the leaves of both models by path.
      data: per node the similarity of the activations.
      alpha: the share of the weights.
      order: per sweep the nodes in the order of visits.

    Returns:
      The permutations of the best sweep, and how many sweeps were made.
    """
    names = [node.name for node in spec.free()]
    axes = {
        path: {i: axis.nodes()[0] for i, axis in binding.moving()} for path, binding in spec.leaves
    }
    uses = {
        name: [(path, i) for path, i, axis in spec.uses(name) if axis.role != "stat"]
        for name in names
    }
    of_a = {
        name: np.concatenate([_rows(a[path], i) for path, i in uses[name]], 1) for name in names
    }
    found = {name: linear_sum_assignment(data[name], maximize=True)[1] for name in names}
    scores = dict.fromkeys(names, 0.0)
    best, best_score, idle, sweeps = found, -np.inf, 0, 0
    for visits in order:
        before = dict(found)
        for name in visits:
            parts = []
            for path, i in uses[name]:
                leaf = b[path]
                for j, other in axes[path].items():
                    leaf = leaf if j == i else np.take(leaf, found[other], j)
                parts.append(_rows(leaf, i))
            of_b = np.concatenate(parts, 1)
            similar = alpha * _correlations(of_a[name], of_b) + (1 - alpha) * data[name]
            rows, found[name] = linear_sum_assignment(similar, maximize=True)
            scores[name] = float(np.mean(similar[rows, found[name]]))
        sweeps += 1
        score = float(np.mean(list(scores.values())))
        idle = idle + 1 if score <= best_score else 0
        if score > best_score:
            best, best_score = dict(found), score
        settled = all(np.array_equal(found[name], before[name]) for name in names)
        if settled or idle >= patience:
            break
    return best, sweeps


def _rows(leaf: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1)


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    return a @ b.T / np.maximum(norms, 1e-7)
