"""Trimmed merges written plainly in PyTorch: a full argsort, and masks scattered from it.

Models are mappings from names to tensors, all weights are 1. The formulas are those of the docstrings in
`jaxmerge.methods`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

Tensors = Mapping[str, torch.Tensor]


def ties(base: Tensors, models: Sequence[Tensors], *, scope: str, density: float) -> Tensors:
    masks = [_largest(_deltas(base, model), scope, density) for model in models]

    def merge(name: str, deltas: list[torch.Tensor]) -> torch.Tensor:
        return _elect([d * mask[name] for d, mask in zip(deltas, masks, strict=True)], True)

    return _each(base, models, merge)


def breadcrumbs(
    base: Tensors, models: Sequence[Tensors], *, density: float, gamma: float, elects: bool
) -> Tensors:
    def keep(delta: torch.Tensor) -> torch.Tensor:
        order = torch.argsort(delta.abs().flatten(), descending=True)
        kept = int(density * order.numel())
        first = min(int(gamma * order.numel()), order.numel() - kept)
        return delta * _scatter(order[first : first + kept], delta)

    def merge(name: str, deltas: list[torch.Tensor]) -> torch.Tensor:
        parts = [keep(delta) for delta in deltas]
        return _elect(parts, False) if elects else sum(parts)

    return _each(base, models, merge)


def della(
    base: Tensors,
    models: Sequence[Tensors],
    *,
    density: float,
    epsilon: float,
    elects: bool,
    uniforms: Sequence[Tensors] | None = None,
) -> Tensors:
    lean = min(epsilon, density, 1 - density)

    def keep(name: str, model: int, delta: torch.Tensor) -> torch.Tensor:
        rows = delta.abs().reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
        order = torch.argsort(rows, dim=1)
        places = torch.arange(rows.shape[1]).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places) / (rows.shape[1] - 1)
        share = (density - lean + 2 * lean * rank).reshape(delta.shape)
        draw = torch.rand(delta.shape) if uniforms is None else uniforms[model][name]
        return torch.where(draw < share, delta / share, 0.0)

    def merge(name: str, deltas: list[torch.Tensor]) -> torch.Tensor:
        parts = [keep(name, i, delta) for i, delta in enumerate(deltas)]
        return _elect(parts, True) if elects else sum(parts)

    return _each(base, models, merge)


def sce(base: Tensors, models: Sequence[Tensors], *, select_topk: float) -> Tensors:
    def merge(name: str, deltas: list[torch.Tensor]) -> torch.Tensor:
        variance = torch.stack([model[name] for model in models]).var(0, correction=0)
        order = torch.argsort(variance.flatten(), descending=True)
        mask = _scatter(order[: int(select_topk * order.numel())], variance)
        kept = [delta * mask for delta in deltas]
        energy = torch.stack([(delta * delta).sum() for delta in kept])
        share = energy / energy.sum()
        positive = sum(kept) >= 0
        agrees = [(delta != 0) & ((delta > 0) == positive) for delta in kept]
        total = sum(a * s * delta for a, s, delta in zip(agrees, share, kept, strict=True))
        divisor = sum(a * s for a, s in zip(agrees, share, strict=True))
        return total / torch.where(divisor > 0, divisor, 1.0)

    return _each(base, models, merge)


def _each(
    base: Tensors,
    models: Sequence[Tensors],
    merge: Callable[[str, list[torch.Tensor]], torch.Tensor],
) -> Tensors:
    return {
        name: tensor + merge(name, [model[name] - tensor for model in models])
        for name, tensor in base.items()
    }


def _deltas(base: Tensors, model: Tensors) -> dict[str, torch.Tensor]:
    return {name: model[name] - tensor for name, tensor in base.items()}


def _largest(deltas: Tensors, scope: str, density: float) -> dict[str, torch.Tensor]:
    """Masks of the largest magnitudes of each tensor, or of the model."""
    if scope == "tensor":
        masks = {}
        for name, delta in deltas.items():
            order = torch.argsort(delta.abs().flatten(), descending=True)
            masks[name] = _scatter(order[: int(density * order.numel())], delta)
        return masks
    whole = torch.cat([delta.flatten() for delta in deltas.values()])
    order = torch.argsort(whole.abs(), descending=True)
    mask = _scatter(order[: int(density * order.numel())], whole)
    parts = mask.split([delta.numel() for delta in deltas.values()])
    return {
        name: part.reshape(delta.shape)
        for (name, delta), part in zip(deltas.items(), parts, strict=True)
    }


def _scatter(kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[kept] = True
    return mask.reshape(like.shape)


def _elect(parts: list[torch.Tensor], normalize: bool) -> torch.Tensor:
    positive = functools.reduce(torch.add, parts) >= 0
    agrees = [(part != 0) & ((part > 0) == positive) for part in parts]
    total = sum(part * a for part, a in zip(parts, agrees, strict=True))
    return total / sum(agrees).clamp(min=1) if normalize else total
