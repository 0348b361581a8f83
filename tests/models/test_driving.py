"""Driving networks: commands of the torch networks, and exact round trips."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_round_trip, images, random_checkpoint, randomise

from jaxmerge.converters import CheckpointError, load_model, save_checkpoint
from jaxmerge.models import DrivingTransformerConfig, PilotNetConfig
from jaxmerge.models.pilotnet import Convolution


def pilotnet(torch: Any, config: PilotNetConfig) -> Any:
    """Convolutions and dense layers, numbered from 1."""
    nn = torch.nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = config.channels
            for i, (width, kernel, stride) in enumerate(config.convolutions, start=1):
                setattr(self, f"conv{i}", nn.Conv2d(channels, width, kernel, stride))
                channels = width
            height, columns = config.feature_map
            widths = [channels * height * columns, *config.hidden, config.outputs]
            for i, (a, b) in enumerate(itertools.pairwise(widths), start=1):
                setattr(self, f"fc{i}", nn.Linear(a, b))

        def forward(self, x: Any) -> Any:
            for i in range(len(config.convolutions)):
                x = nn.functional.elu(getattr(self, f"conv{i + 1}")(x))
            x = x.flatten(1)
            for i in range(len(config.hidden)):
                x = nn.functional.elu(getattr(self, f"fc{i + 1}")(x))
            return getattr(self, f"fc{len(config.hidden) + 1}")(x)

    return randomise(Network())


def transformer(torch: Any, config: DrivingTransformerConfig) -> Any:
    """Strided convolutions, then pre-norm encoder blocks."""
    nn, width, heads = torch.nn, config.width, config.heads

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: Any) -> Any:
            batch, n, _ = x.shape
            parts = self.qkv(x).reshape(batch, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*parts)
            return self.proj(mixed.transpose(1, 2).reshape(batch, n, width))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention, self.mlp = Attention(), nn.Module()
            self.mlp.fc1 = nn.Linear(width, config.hidden)
            self.mlp.fc2 = nn.Linear(config.hidden, width)

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, channels = nn.ModuleList(), config.channels
            for after in config.stem:
                part = nn.Module()
                part.conv = nn.Conv2d(channels, after, 3, 2, 1)
                part.norm = (
                    nn.BatchNorm2d(after)
                    if config.norm == "batch"
                    else nn.GroupNorm(config.groups, after)
                )
                self.stem.append(part)
                channels = after
            scale = 2 ** len(config.stem)
            tokens = -(-config.image[0] // scale) * -(-config.image[1] // scale)
            self.positions = nn.Parameter(torch.zeros(1, tokens, width))
            self.blocks = nn.ModuleList([Block() for _ in range(config.layers)])
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, config.outputs)

        def forward(self, x: Any) -> Any:
            for part in self.stem:
                x = torch.relu(part.norm(part.conv(x)))
            x = x.flatten(2).transpose(1, 2) + self.positions
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    return randomise(Network())


@pytest.mark.torch
def test_pilotnets_commands_are_torchs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layers = (Convolution(4, 5, 2), Convolution(6, 3, 1))
    config = PilotNetConfig((15, 20), layers, (7, 5), 2)
    module = pilotnet(torch, config)
    found = assert_parity(module, images(15, 20), tmp_path, config={"image": [15, 20]})
    assert (found.family, found.model) == ("pilotnet", config)


def test_the_papers_pilotnet_is_recognised(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m.safetensors", random_checkpoint("pilotnet", PilotNetConfig()))
    _, params, found = load_model(tmp_path / "m.safetensors")
    assert (found.family, found.model) == ("pilotnet", PilotNetConfig())
    assert params["params"]["dense_0"]["kernel"].shape == (1, 18, 64, 100)


@pytest.mark.torch
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_transformers_commands_are_torchs(norm: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = DrivingTransformerConfig((12, 9), (4, 8), norm, 2, 2, heads=2, hidden=12, outputs=2)
    told = {"image": [12, 9], "heads": 2, "norm": norm, "groups": 2}
    module = transformer(torch, config)
    found = assert_parity(module, images(12, 9), tmp_path, config=told)
    assert (found.family, found.model) == ("driving_transformer", config)


@settings(max_examples=8)
@given(
    convolutions=st.lists(
        st.builds(Convolution, st.integers(1, 4), st.sampled_from([3, 5]), st.integers(1, 2)),
        min_size=1,
        max_size=2,
    ).map(tuple),
    hidden=st.lists(st.integers(1, 4), max_size=2).map(tuple),
    channels=st.integers(1, 3),
)
def test_round_trips_of_pilotnet_are_exact(
    convolutions: tuple[Convolution, ...], hidden: tuple[int, ...], channels: int
) -> None:
    config = PilotNetConfig((15, 17), convolutions, hidden, channels=channels)
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip("pilotnet", config, Path(folder))


@settings(max_examples=8)
@given(
    stem=st.lists(st.sampled_from([4, 8]), min_size=1, max_size=2).map(tuple),
    norm=st.sampled_from(["batch", "group", "layer", "none"]),
    layers=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 4]),
)
def test_round_trips_of_the_transformer_are_exact(
    stem: tuple[int, ...], norm: str, layers: int, heads: int
) -> None:
    config = DrivingTransformerConfig((9, 8), stem, norm, 2, layers, heads, 5)
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip("driving_transformer", config, Path(folder))


def test_what_the_tensors_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    small = PilotNetConfig((15, 20), (Convolution(4, 5, 2),), (7,))
    save_checkpoint(tmp_path / "p.safetensors", random_checkpoint("pilotnet", small))
    with pytest.raises(
        CheckpointError, match=r"'fc1.weight' takes 192; say the size of the images"
    ):
        load_model(tmp_path / "p.safetensors", family="pilotnet")
    config = DrivingTransformerConfig((8, 8), (8,), layers=1, heads=2)
    save_checkpoint(tmp_path / "t.safetensors", random_checkpoint("driving_transformer", config))
    with pytest.raises(CheckpointError, match=r"'heads' is not in the tensors"):
        load_model(
            tmp_path / "t.safetensors", family="driving_transformer", config={"image": [8, 8]}
        )
