"""VGG in both layouts: logits of the torch network, and exact round trips."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_round_trip, images, layer_norm_2d, randomise

from jaxmerge.converters import CheckpointError, load_model, save_checkpoint
from jaxmerge.models import VGGConfig

STAGES = ((6,), (8, 8))


def network(torch: Any, norm: str, *, hidden: tuple[int, ...] = (), pool: int = 1) -> Any:
    """`features` as torchvision builds them, and a classifier in either layout."""
    nn, layers, channels = torch.nn, [], 3
    for widths in STAGES:
        for width in widths:
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if norm != "none":
                norms = {"batch": nn.BatchNorm2d, "layer": layer_norm_2d(torch)}
                layers.append(nn.GroupNorm(2, width) if norm == "group" else norms[norm](width))
            layers.append(nn.ReLU())
            channels = width
        layers.append(nn.MaxPool2d(2))
    classifier = nn.Linear(channels * pool**2, 5)
    if hidden:
        (width,) = hidden
        first = nn.Linear(channels * pool**2, width)
        classifier = nn.Sequential(first, nn.ReLU(), nn.Dropout(), nn.Linear(width, 5))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(*layers)
            self.pool = nn.AdaptiveAvgPool2d(pool)
            self.classifier = classifier

        def forward(self, x: Any) -> Any:
            return self.classifier(torch.flatten(self.pool(self.features(x)), 1))

    return randomise(Network())


@pytest.mark.torch
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_cifar_logits_are_torchs(norm: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    told = {"config": {"norm": norm, "groups": 2}} if norm in ("group", "layer") else {}
    config = assert_parity(network(torch, norm), images(8, 8), tmp_path, **told)
    assert config.family == "vgg_cifar"
    assert (config.model.stages, config.model.norm) == (STAGES, norm)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(12, 12), (20, 15), (8, 4)])
def test_torchvision_logits_are_torchs_for_images_of_any_size(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """The classifier sees a 3 x 3 map: as it is, averaged down to it, or spread out to it."""
    torch = pytest.importorskip("torch")
    module = network(torch, "none", hidden=(7,), pool=3)
    config = assert_parity(module, images(*size), tmp_path)
    assert config.family == "vgg"
    assert (config.model.hidden, config.model.pool) == ((7,), 3)


@settings(max_examples=12)
@given(
    stages=st.lists(
        st.lists(st.integers(1, 3).map(lambda n: 2 * n), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    ),
    hidden=st.lists(st.integers(1, 4), max_size=2),
    pool=st.integers(1, 2),
    norm=st.sampled_from(["batch", "group", "layer", "none"]),
    channels=st.integers(1, 3),
)
def test_round_trips_are_exact(
    stages: list[list[int]], hidden: list[int], pool: int, norm: str, channels: int
) -> None:
    config = VGGConfig(
        tuple(map(tuple, stages)), tuple(hidden), 3, pool, norm, groups=2, channels=channels
    )
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip("vgg", config, Path(folder))
        if not hidden:
            assert_round_trip("vgg_cifar", config, Path(folder) / "cifar")


def test_the_named_depths_count_their_layers() -> None:
    for depth in (11, 13, 16, 19):
        config = VGGConfig.imagenet(depth)
        assert sum(map(len, config.stages)) + len(config.hidden) + 1 == depth
    with pytest.raises(ValueError, match="not 12"):
        VGGConfig.cifar(12)


def test_a_gap_between_convolutions_is_named(tmp_path: Path) -> None:
    shapes = {"features.0": (4, 3, 3, 3), "features.6": (4, 4, 3, 3), "classifier": (2, 4)}
    tensors = {f"{name}.weight": np.zeros(shape, "f4") for name, shape in shapes.items()}
    save_checkpoint(tmp_path / "m.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"no convolution 'features.6' follows 'features.0'"):
        load_model(tmp_path / "m.safetensors", family="vgg_cifar")
