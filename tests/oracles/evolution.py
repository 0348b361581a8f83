"""Updates of evolution strategies in float64 NumPy, coordinate by coordinate, from the papers."""

import numpy as np
from scipy import stats


def cma_weights(population: int, n: int) -> dict[str, float | np.ndarray]:
    """Table 1 of the tutorial, arXiv:1604.00772."""
    raw = np.array([np.log((population + 1) / 2) - np.log(i) for i in range(1, population + 1)])
    plus, minus = raw[raw > 0], raw[raw <= 0]
    mu = plus.sum() ** 2 / (plus**2).sum()
    mu_minus = minus.sum() ** 2 / (minus**2).sum()
    c1 = 2 / ((n + 1.3) ** 2 + mu)
    cmu = min(1 - c1, 2 * (1 / 4 + mu + 1 / mu - 2) / ((n + 2) ** 2 + 2 * mu / 2))
    alpha = min(1 + c1 / cmu, 1 + 2 * mu_minus / (mu + 2), (1 - c1 - cmu) / (n * cmu))
    weights = [w / plus.sum() if w > 0 else alpha * w / abs(minus.sum()) for w in raw]
    cs = (mu + 2) / (n + mu + 5)
    return {
        "w": np.array(weights),
        "c1": c1,
        "cmu": cmu,
        "cs": cs,
        "ds": 1 + 2 * max(0, np.sqrt((mu - 1) / (n + 1)) - 1) + cs,
        "cc": (4 + mu / n) / (n + 4 + 2 * mu / n),
    }


def cma_update(
    state: dict[str, np.ndarray],
    x: np.ndarray,
    active: np.ndarray,
    fitness: np.ndarray,
    margin: np.ndarray,
) -> dict[str, np.ndarray]:
    """One generation with masks: every sum runs over what was active; all active is the tutorial's."""
    population, n = x.shape
    c = cma_weights(population, n)
    w = c["w"]
    order = np.argsort(fitness, kind="stable")
    x, active = x[order], active[order]
    m, sigma, C, H = (
        np.array(state[k], np.float64) for k in ("mean", "spread", "covariance", "held")
    )
    y = np.zeros((population, n))
    for k in range(population):
        for i in range(n):
            if active[k, i]:
                y[k, i] = (x[k, i] - m[i]) / (sigma * H[i] * margin[i])
    omega, moved, unit = np.zeros(n), np.zeros(n), np.zeros(n)
    for i in range(n):
        seen = [k for k in range(population) if active[k, i] and w[k] > 0]
        omega[i] = sum(w[k] for k in seen)
        moved[i] = sum(w[k] * y[k, i] for k in seen)
        if seen:
            unit[i] = moved[i] / np.sqrt(sum(w[k] ** 2 for k in seen))
    values, vectors = np.linalg.eigh(C)
    inverse_root = vectors @ np.diag(values**-0.5) @ vectors.T
    white = inverse_root @ unit
    ps, pc = np.array(state["step_path"], np.float64), np.array(state["path"], np.float64)
    for i in range(n):
        r = c["cs"] * omega[i]
        ps[i] = (1 - r) * ps[i] + np.sqrt(r * (2 - r)) * white[i]
    d = omega.sum()
    ratio, factor = 0.0, 1.0
    if d > 0:
        d1 = max(d, 1)
        ratio = np.sqrt((omega * ps**2).sum()) / (
            np.sqrt(d) * (1 - 1 / (4 * d1) + 1 / (21 * d1**2))
        )
        factor = np.exp(min(1, c["cs"] / c["ds"] * (ratio - 1)))
    g = int(state["generation"])
    h = ratio / np.sqrt(1 - (1 - c["cs"]) ** (2 * (g + 1))) < 1.4 + 2 / (n + 1)
    for i in range(n):
        r = c["cc"] * omega[i]
        pc[i] = (1 - r) * pc[i] + h * np.sqrt(r * (2 - r)) * unit[i]
    delta = (1 - h) * c["cc"] * (2 - c["cc"])
    keep = np.array(
        [
            1
            - c["c1"] * (1 - delta) * omega[i]
            - c["cmu"] * sum(w[k] for k in range(population) if active[k, i])
            for i in range(n)
        ]
    )
    new = np.sqrt(np.outer(keep, keep)) * C
    new += c["c1"] * np.outer(np.sqrt(omega) * pc, np.sqrt(omega) * pc)
    relative = keep / keep.max()
    for k in range(population):
        weight = w[k]
        if weight < 0:
            weight *= active[k].sum() / max(
                np.sum((inverse_root @ (y[k] / np.sqrt(relative))) ** 2), 1e-8
            )
        new += c["cmu"] * weight * np.outer(y[k], y[k])
    return {
        "mean": m + sigma * H * moved,
        "spread": sigma * factor,
        "covariance": new,
        "path": pc,
        "step_path": ps,
        "held": H * factor ** (omega - 1),
        "generation": g + 1,
    }


def margin_correction(
    mean: np.ndarray, width: np.ndarray, levels: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Section 4 of arXiv:2205.13482, with thresholds at l/L: the new mean and widths."""
    mean, width = np.array(mean, np.float64), np.array(width, np.float64)
    for i, count in enumerate(levels):
        if count == 0:
            continue
        thresholds = np.arange(1, count) / count
        m, s = mean[i], width[i]
        if m <= thresholds[0] or m > thresholds[-1]:
            nearest = thresholds[np.argmin(np.abs(thresholds - m))]
            reach = np.sqrt(stats.chi2.ppf(1 - 2 * alpha, 1)) * s
            mean[i] = nearest + np.sign(m - nearest) * min(abs(m - nearest), reach)
            continue
        low, up = thresholds[thresholds < m].max(), thresholds[thresholds >= m].min()
        p_low, p_up = stats.norm.cdf((low - m) / s), 1 - stats.norm.cdf((up - m) / s)
        p_mid = 1 - p_low - p_up
        q_low, q_up = max(alpha / 2, p_low), max(alpha / 2, p_up)
        total = q_low + q_up + p_mid
        given = (1 - total) / (total - 3 * alpha / 2)
        q_low, q_up = (q + given * (q - alpha / 2) for q in (q_low, q_up))
        z_low, z_up = (np.sqrt(stats.chi2.ppf(1 - 2 * q, 1)) for q in (q_low, q_up))
        mean[i] = (low * z_up + up * z_low) / (z_low + z_up)
        width[i] = (up - low) / (z_low + z_up)
    return mean, width


def asng_update(
    state: dict[str, np.ndarray],
    chosen: list[np.ndarray],
    weights: np.ndarray,
    active: np.ndarray,
    least: list[float],
) -> dict[str, list[np.ndarray] | np.ndarray | float]:
    """Section 3 of arXiv:2405.09962, variable by variable.

    `state["table"]` and `state["signal"]` are lists of arrays [levels]; chosen[i] int [population].
    """
    gradients, white = [], []
    for i, q in enumerate(state["table"]):
        g = np.zeros_like(q)
        for k, w in enumerate(weights):
            if active[k, i]:
                g += w * (np.eye(len(q))[chosen[i][k]] - q)
        gradients.append(g)
        white.append(g / np.sqrt(q))
    length = np.sqrt(sum((v**2).sum() for v in white))
    parameters = sum(len(q) - 1 for q in state["table"])
    delta = 1 / state["caution"]
    table = []
    for q, g, low in zip(state["table"], gradients, least, strict=True):
        q = np.maximum(q + delta / length * g, low)
        total = q.sum()
        q = q + (1 - total) / (total - low * len(q)) * (q - low)
        table.append(q / q.sum())
    beta = delta / np.sqrt(parameters)
    signal = [
        (1 - beta) * s + np.sqrt(beta * (2 - beta)) * v / length
        for s, v in zip(state["signal"], white, strict=True)
    ]
    gain = (1 - beta) ** 2 * state["gain"] + beta * (2 - beta)
    squared = sum((s**2).sum() for s in signal)
    return {
        "table": table,
        "signal": signal,
        "gain": gain,
        "caution": state["caution"] * np.exp(beta * (gain - squared / 1.5)),
    }


def nondominated_ranks(points: np.ndarray) -> np.ndarray:
    ranks = np.full(len(points), -1)
    front = 0
    while (ranks < 0).any():
        rest = np.flatnonzero(ranks < 0)
        free = [
            i
            for i in rest
            if not any(
                (points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in rest
            )
        ]
        ranks[free] = front
        front += 1
    return ranks


def crowding_distance(points: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    distance = np.zeros(len(points))
    for front in np.unique(ranks):
        members = np.flatnonzero(ranks == front)
        for j in range(points.shape[1]):
            order = members[np.argsort(points[members, j], kind="stable")]
            values = points[order, j]
            distance[order[[0, -1]]] = np.inf
            wide = values[-1] - values[0]
            if wide > 0:
                for at in range(1, len(order) - 1):
                    distance[order[at]] += (values[at + 1] - values[at - 1]) / wide
    return distance


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """By inclusion and exclusion."""
    sizes = [reference - p for p in points if (p <= reference).all()]
    total = 0.0
    for subset in range(1, 2 ** len(sizes)):
        chosen = [s for i, s in enumerate(sizes) if subset >> i & 1]
        total -= (-1) ** len(chosen) * np.prod(np.min(chosen, axis=0))
    return total
