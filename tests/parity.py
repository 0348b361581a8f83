"""Comparison of a Flax model with the torch module whose state dict it was loaded from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmerge.converters import (
    ModelConfig,
    families,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)


def randomise(module: Any, seed: int = 0) -> Any:
    """Fills a torch module's parameters and buffers, so that no zero or one hides a mistake; sets it to eval."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            fan_in = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 4
            offset = 1.0 if tensor.dim() == 1 and name.endswith("weight") else 0.0
            tensor.copy_(noise / fan_in**0.5 + offset)
    return module.eval()


def assert_parity(
    module: Any, inputs: np.ndarray, folder: Path, *, family: str | None = None, **options: Any
) -> ModelConfig:
    """Logits within 1e-5 of the largest one, and a bit-exact return that `load_state_dict(strict=True)` takes.

    Args:
      module: a torch module.
      inputs: as the Flax model takes them; images [batch, height, width, channels].
      folder: where files may be written.
      family: as for `load_model`, as are the options.

    Returns:
      The loaded model's config.
    """
    import torch

    source, target = folder / "source.pth", folder / "target.pth"
    torch.save(module.state_dict(), source)
    apply_fn, params, config = load_model(source, family=family, **options)
    with torch.no_grad():
        given = torch.from_numpy(inputs)
        expected = module(given.permute(0, 3, 1, 2) if inputs.ndim == 4 else given).numpy()
    found = np.asarray(jax.jit(apply_fn)(params, inputs))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1.0)

    save_model(target, params, config)
    written = torch.load(target, weights_only=True)
    module.load_state_dict(written, strict=True)
    before = torch.load(source, weights_only=True)
    assert set(written) == set(before)
    for name, tensor in before.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    return config


def assert_round_trip(family: str, model: Any, folder: Path, seed: int = 0) -> None:
    """Random bits in a family's layout come back as they were, by name alone and with the config derived."""
    tensors = random_checkpoint(family, model, seed)
    folder.mkdir(exist_ok=True)
    source, target = folder / "source.safetensors", folder / "target"
    save_checkpoint(source, tensors)
    _, params, config = load_model(source, family=family, config=model)
    save_model(target, params, config)
    written = load_checkpoint(target)
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].tobytes() == tensor.tobytes(), name
    _, _, again = load_model(target)
    assert (again.family, again.model, again.layout) == (family, model, config.layout)


def random_checkpoint(family: str, model: Any, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Tensors of random values, float32, with the names and shapes of a family and config; buffers hold integers."""
    table = families.get(family)
    layout, shapes = table.layout(model), table.shapes(model)
    rng = np.random.default_rng(seed)
    tensors = {
        layout[path].names[0]: rng.normal(size=layout[path].checkpoint_shape(shape)).astype("f4")
        for path, shape in shapes.items()
    }
    for name, buffer in table.buffers(model, list(tensors)).items():
        values = rng.integers(1000, size=buffer.shape)
        tensors[name] = values.astype(buffer.dtype)
    return tensors


def random_params(module: Any, inputs: Any, seed: int = 0) -> Any:
    """Random variables of a Flax module, float32; `init` would compile its operations one by one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype("f4"),
        jax.eval_shape(module.init, jax.random.key(0), inputs),
    )


def images(height: int, width: int, *, batch: int = 2, seed: int = 0) -> np.ndarray:
    """Random images [batch, height, width, 3]."""
    shape = (batch, height, width, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer_norm_2d(torch: Any) -> type:
    """A LayerNorm over the channels of each pixel of [batch, channels, height, width]."""

    class LayerNorm2d(torch.nn.LayerNorm):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return LayerNorm2d
