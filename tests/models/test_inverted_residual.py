"""MobileNetV2 and EfficientNet-Lite: logits of the torch networks, and exact round trips."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_round_trip, images, random_checkpoint, randomise

from jaxmerge.converters import CheckpointError, load_model, save_checkpoint
from jaxmerge.models import InvertedResidualConfig
from jaxmerge.models.inverted_residual import Block

BLOCKS = (Block(6, 4, 1, 3), Block(12, 4, 1, 3), Block(16, 8, 2, 5))


def mobilenet(torch: Any, config: InvertedResidualConfig) -> Any:
    """MobileNetV2 as torchvision names it."""
    nn = torch.nn

    def layer(before: int, after: int, side: int = 1, stride: int = 1, groups: int = 1) -> Any:
        conv = nn.Conv2d(before, after, side, stride, side // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU6())

    class Residual(nn.Module):
        def __init__(self, incoming: int, block: Block) -> None:
            super().__init__()
            self.skips = block.stride == 1 and incoming == block.width
            expand = [layer(incoming, block.hidden)] if block.hidden != incoming else []
            self.conv = nn.Sequential(
                *expand,
                layer(block.hidden, block.hidden, block.kernel, block.stride, block.hidden),
                nn.Conv2d(block.hidden, block.width, 1, bias=False),
                nn.BatchNorm2d(block.width),
            )

        def forward(self, x: Any) -> Any:
            return x + self.conv(x) if self.skips else self.conv(x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [Residual(config.incoming(i), block) for i, block in enumerate(config.blocks)]
            last = layer(config.blocks[-1].width, config.last)
            self.features = nn.Sequential(layer(3, config.stem, 3, 2), *blocks, last)
            self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(config.last, config.classes))

        def forward(self, x: Any) -> Any:
            return self.classifier(self.features(x).mean((2, 3)))

    return randomise(Network())


def efficientnet(torch: Any, config: InvertedResidualConfig) -> Any:
    """EfficientNet-Lite as its PyTorch package names it, padded as TensorFlow pads."""
    nn = torch.nn

    class Same(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            pads = []
            for size in x.shape[:1:-1]:
                side, step = self.kernel_size[0], self.stride[0]
                pad = max((math.ceil(size / step) - 1) * step + side - size, 0)
                pads += [pad // 2, pad - pad // 2]
            return super().forward(nn.functional.pad(x, pads))

    def conv(before: int, after: int, side: int = 1, stride: int = 1, groups: int = 1) -> Any:
        return Same(before, after, side, stride, groups=groups, bias=False)

    def norm(width: int) -> Any:
        return nn.BatchNorm2d(width, eps=1e-3)

    class Residual(nn.Module):
        def __init__(self, incoming: int, block: Block) -> None:
            super().__init__()
            hidden, width, stride, side = block
            self.skips = stride == 1 and incoming == width
            self.expands = hidden != incoming
            if self.expands:
                self._expand_conv, self._bn0 = conv(incoming, hidden), norm(hidden)
            self._depthwise_conv = conv(hidden, hidden, side, stride, hidden)
            self._bn1 = norm(hidden)
            self._project_conv, self._bn2 = conv(hidden, width), norm(width)

        def forward(self, x: Any) -> Any:
            relu6 = nn.functional.relu6
            out = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
            out = relu6(self._bn1(self._depthwise_conv(out)))
            out = self._bn2(self._project_conv(out))
            return x + out if self.skips else out

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._conv_stem, self._bn0 = conv(3, config.stem, 3, 2), norm(config.stem)
            self._blocks = nn.ModuleList(
                [Residual(config.incoming(i), block) for i, block in enumerate(config.blocks)]
            )
            self._conv_head = conv(config.blocks[-1].width, config.last)
            self._bn1 = norm(config.last)
            self._fc = nn.Linear(config.last, config.classes)

        def forward(self, x: Any) -> Any:
            x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
            for block in self._blocks:
                x = block(x)
            x = nn.functional.relu6(self._bn1(self._conv_head(x)))
            return self._fc(x.mean((2, 3)))

    return randomise(Network())


@pytest.mark.torch
@pytest.mark.parametrize("family", ["mobilenet_v2", "efficientnet_lite"])
def test_logits_are_torchs(family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = InvertedResidualConfig(6, BLOCKS, 10, classes=5)
    if family == "efficientnet_lite":
        config = InvertedResidualConfig(6, BLOCKS, 10, 5, "same", 1e-3)
    network = {"mobilenet_v2": mobilenet, "efficientnet_lite": efficientnet}[family]
    # Strides leave no trace in the tensors.
    told = {"blocks": [list(block) for block in BLOCKS]}
    found = assert_parity(network(torch, config), images(17, 16), tmp_path, config=told)
    assert (found.family, found.model) == (family, config)


def test_the_strides_of_a_narrow_network_are_the_papers(tmp_path: Path) -> None:
    config = InvertedResidualConfig.mobilenet_v2(width=0.25, classes=3)
    save_checkpoint(tmp_path / "m.safetensors", random_checkpoint("mobilenet_v2", config))
    _, _, found = load_model(tmp_path / "m.safetensors")
    assert (found.family, found.model) == ("mobilenet_v2", config)


def test_widths_are_the_papers() -> None:
    """MobileNetV2 at 1.0 and 1.4; EfficientNet-Lite0's last blocks."""
    assert [b.width for b in InvertedResidualConfig.mobilenet_v2().blocks[::4]] == [
        16,
        32,
        64,
        96,
        320,
    ]
    wide = InvertedResidualConfig.mobilenet_v2(width=1.4)
    assert (wide.stem, wide.last, wide.blocks[-1].width) == (48, 1792, 448)
    assert InvertedResidualConfig.efficientnet_lite0().blocks[-1] == (1152, 320, 1, 3)


@settings(max_examples=10)
@given(
    stem=st.integers(1, 4),
    blocks=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.sampled_from([3, 5])),
        min_size=1,
        max_size=3,
    ),
    family=st.sampled_from(["mobilenet_v2", "efficientnet_lite"]),
)
def test_round_trips_are_exact(stem: int, blocks: list[tuple[int, ...]], family: str) -> None:
    config = InvertedResidualConfig(stem, tuple(Block(*block) for block in blocks), 5, 3)
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip(family, config, Path(folder))


def test_strides_that_nobody_knows_are_asked_for(tmp_path: Path) -> None:
    config = InvertedResidualConfig(6, BLOCKS, 10, 5)
    save_checkpoint(tmp_path / "m.safetensors", random_checkpoint("mobilenet_v2", config))
    with pytest.raises(
        CheckpointError, match=r"expected 17 blocks, found 3: their strides.*config="
    ):
        load_model(tmp_path / "m.safetensors", family="mobilenet_v2")
