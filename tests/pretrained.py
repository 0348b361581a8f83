"""Comparison of a Flax model with the transformers model whose folder it was loaded from."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from parity import randomise

from jaxmerge.converters import ModelConfig, load_checkpoint, load_model, save_model


def transformers() -> Any:
    """The module transformers, offline and quiet; skips the test where it or PyTorch is not installed."""
    pytest.importorskip("torch")
    os.environ["HF_HUB_OFFLINE"] = "1"
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def assert_pretrained(
    model: Any,
    inputs: Mapping[str, np.ndarray],
    output: Callable[[Any], Any],
    folder: Path,
) -> ModelConfig:
    """Outputs within 1e-5 of the largest one, and a folder that transformers loads as the same model, bit for bit.

    Args:
      model: a transformers model; its parameters are filled with random values.
      inputs: as the Flax model takes them; "pixel_values" are [batch, height, width, channels].
      output: picks the array to compare out of what the model returns.
      folder: where files may be written.

    Returns:
      The loaded model's config.
    """
    source, target = folder / "source", folder / "target"
    randomise(model).save_pretrained(source)
    apply_fn, params, config = load_model(source)
    expected = torch_output(model, inputs, output)
    found = np.asarray(jax.jit(apply_fn)(params, dict(inputs)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1.0)

    save_model(target, params, config)
    before, written = load_checkpoint(source), load_checkpoint(target)
    assert set(written) == set(before)
    for name, tensor in before.items():
        assert written[name].tobytes() == tensor.tobytes(), name
    assert_loads_as(model, target, inputs, output)
    return config


def assert_loads_as(
    model: Any, folder: Path, inputs: Mapping[str, np.ndarray], output: Callable[[Any], Any]
) -> None:
    """transformers loads a folder without a tensor missing or left over, and computes what the model does."""
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = torch_output(model, inputs, output)
    np.testing.assert_array_equal(torch_output(again.eval(), inputs, output), expected)


def torch_output(
    model: Any, inputs: Mapping[str, np.ndarray], output: Callable[[Any], Any]
) -> np.ndarray:
    """What a transformers model computes of inputs as Flax takes them."""
    import torch

    given = {
        name: torch.from_numpy(np.moveaxis(array, -1, 1).copy() if array.ndim == 4 else array)
        for name, array in inputs.items()
    }
    with torch.no_grad():
        return output(model(**given)).numpy()
