"""MLPs: the functions of torch's modules, and exact round trips."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_round_trip, randomise

from jaxmerge.models import ACTIVATIONS, MLPConfig


@pytest.mark.torch
def test_a_sequential_is_recognised_and_computes_the_same(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layers = [torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 6), torch.nn.ReLU()]
    module = randomise(torch.nn.Sequential(*layers, torch.nn.Linear(6, 3)))
    inputs = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    config = assert_parity(module, inputs, tmp_path)
    assert (config.family, config.model) == ("mlp_sequential", MLPConfig((5, 7, 6, 3)))


@pytest.mark.torch
def test_every_activation_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    functions = {name: getattr(torch.nn.functional, name, None) for name in ACTIVATIONS}
    functions["gelu_tanh"] = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    functions["quick_gelu"] = lambda x: x * torch.sigmoid(1.702 * x)
    x = np.linspace(-9, 9, 181, dtype=np.float32)
    for name, function in functions.items():
        expected = function(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(ACTIVATIONS[name](x), expected, atol=2e-6, err_msg=name)


@settings(max_examples=15)
@given(
    family=st.sampled_from(["mlp_sequential", "mlp_layers", "mlp_fc"]),
    features=st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_round_trips_are_exact(family: str, features: tuple[int, ...], activation: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip(family, MLPConfig(features, activation), Path(folder))
