"""Compact convolutional transformers: logits of the torch network, and exact round trips."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_round_trip, images, random_checkpoint, randomise

from jaxmerge.converters import CheckpointError, load_model, save_checkpoint
from jaxmerge.models import CCTConfig


def network(torch: Any, config: CCTConfig) -> Any:
    """The authors' network by its names."""
    nn, width, heads = torch.nn, config.width, config.heads

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.proj = nn.Linear(width, width)

        def forward(self, x: Any) -> Any:
            batch, n, _ = x.shape
            parts = self.qkv(x).reshape(batch, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*parts)
            return self.proj(mixed.transpose(1, 2).reshape(batch, n, width))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre_norm, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.self_attn = Attention()
            self.linear1 = nn.Linear(width, config.hidden)
            self.linear2 = nn.Linear(config.hidden, width)

        def forward(self, x: Any) -> Any:
            x = self.norm1(x + self.self_attn(self.pre_norm(x)))
            return x + self.linear2(nn.functional.gelu(self.linear1(x)))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (config.channels, *config.tokenizer)
            convolutions = [
                nn.Sequential(
                    nn.Conv2d(a, b, config.kernel, config.stride, config.kernel // 2, bias=False),
                    nn.ReLU(),
                    nn.MaxPool2d(3, 2, 1),
                )
                for a, b in itertools.pairwise(widths)
            ]
            self.tokenizer, self.classifier = nn.Module(), nn.Module()
            self.tokenizer.conv_layers = nn.Sequential(*convolutions)
            sides = [side // (2 * config.stride) ** len(convolutions) for side in config.image]
            table = torch.zeros(1, sides[0] * sides[1], width)
            self.classifier.positional_emb = nn.Parameter(table)
            self.classifier.blocks = nn.ModuleList([Block() for _ in range(config.layers)])
            self.classifier.norm = nn.LayerNorm(width)
            self.classifier.attention_pool = nn.Linear(width, 1)
            self.classifier.fc = nn.Linear(width, config.classes)

        def forward(self, x: Any) -> Any:
            part = self.classifier
            x = self.tokenizer.conv_layers(x).flatten(2).transpose(1, 2) + part.positional_emb
            for block in part.blocks:
                x = block(x)
            x = part.norm(x)
            weights = part.attention_pool(x).softmax(1).transpose(1, 2)
            return part.fc((weights @ x).squeeze(1))

    return randomise(Network())


@pytest.mark.torch
@pytest.mark.parametrize("tokenizer", [(64,), (8, 64)])
def test_logits_are_torchs(tokenizer: tuple[int, ...], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = CCTConfig((8, 8), tokenizer, layers=2, heads=4, hidden=24, classes=5)
    module = network(torch, config)
    found = assert_parity(module, images(8, 8), tmp_path, config={"heads": 4})
    assert (found.family, found.model) == ("cct", config)


@settings(max_examples=8)
@given(
    tokenizer=st.lists(st.integers(1, 3).map(lambda n: 4 * n), min_size=1, max_size=2).map(tuple),
    layers=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 4]),
    positions=st.booleans(),
    kernel=st.sampled_from([3, 7]),
)
def test_round_trips_are_exact(
    tokenizer: tuple[int, ...], layers: int, heads: int, positions: bool, kernel: int
) -> None:
    config = CCTConfig((8, 8), tokenizer, kernel, 1, layers, heads, 5, 3, positions)
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip("cct", config, Path(folder))


def test_heads_are_the_papers_or_asked_for(tmp_path: Path) -> None:
    for width, name in ((128, "wide"), (12, "narrow")):
        config = CCTConfig((8, 8), (width,), layers=1, heads=2, hidden=8)
        save_checkpoint(tmp_path / f"{name}.safetensors", random_checkpoint("cct", config))
    _, _, found = load_model(tmp_path / "wide.safetensors")
    assert (found.model.heads, found.model.image) == (2, (8, 8))
    with pytest.raises(CheckpointError, match=r"width of 12 .*config=.\"heads\": 4"):
        load_model(tmp_path / "narrow.safetensors", family="cct")
    with pytest.raises(CheckpointError, match="no such model: a width of 12 is no multiple of 5"):
        load_model(tmp_path / "narrow.safetensors", family="cct", config={"heads": 5})
