"""ResNets in both layouts: logits of the torch network, training, and exact round trips."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_round_trip, images, layer_norm_2d, randomise

from jaxmerge.converters import CheckpointError, load_model
from jaxmerge.models import ResNet, ResNetConfig


def network(torch: Any, config: ResNetConfig, names: tuple[str, str]) -> Any:
    """The usual code of a ResNet; `names` are those of the shortcut and of the head."""
    nn, (shortcut, head) = torch.nn, names
    expansion = 4 if config.block == "bottleneck" else 1

    def norm(width: int) -> Any:
        if config.norm == "group":
            return nn.GroupNorm(config.groups, width)
        return {"batch": nn.BatchNorm2d, "layer": layer_norm_2d(torch)}[config.norm](width)

    def conv(incoming: int, outgoing: int, side: int, stride: int = 1) -> Any:
        return nn.Conv2d(incoming, outgoing, side, stride, side // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, incoming: int, width: int, stride: int) -> None:
            super().__init__()
            outgoing = width * expansion
            if expansion == 1:
                layers = [(incoming, width, 3, stride), (width, width, 3, 1)]
            else:
                layers = [
                    (incoming, width, 1, 1),
                    (width, width, 3, stride),
                    (width, outgoing, 1, 1),
                ]
            self.depth, self.stride, self.extra = len(layers), stride, outgoing - incoming
            for n, (before, after, side, step) in enumerate(layers, start=1):
                setattr(self, f"conv{n}", conv(before, after, side, step))
                setattr(self, f"bn{n}", norm(after))
            changes = stride != 1 or incoming != outgoing
            self.padded = changes and config.shortcut == "padded"
            projection = [conv(incoming, outgoing, 1, stride), norm(outgoing)]
            made = nn.Sequential(*(projection if changes and not self.padded else []))
            setattr(self, shortcut, made)

        def forward(self, x: Any) -> Any:
            out = x
            for n in range(1, self.depth + 1):
                out = torch.relu(out) if n > 1 else out
                out = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(out))
            if self.padded:
                quarter = self.extra // 2
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            return torch.relu(out + getattr(self, shortcut)(x))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = config.stem == "large"
            side, stride = (7, 2) if self.large else (3, 1)
            self.conv1 = conv(config.channels, config.widths[0], side, stride)
            self.bn1 = norm(config.widths[0])
            channels = config.widths[0]
            for s, (count, width) in enumerate(zip(config.blocks, config.widths, strict=True)):
                blocks = []
                for i in range(count):
                    blocks.append(Block(channels, width, 2 if s and not i else 1))
                    channels = width * expansion
                setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
            setattr(self, head, nn.Linear(channels, config.classes))

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.bn1(self.conv1(x)))
            if self.large:
                x = nn.functional.max_pool2d(x, 3, 2, 1)
            for s in range(len(config.blocks)):
                x = getattr(self, f"layer{s + 1}")(x)
            return getattr(self, head)(x.mean((2, 3)))

    return randomise(Network())


TORCHVISION, CIFAR = ("downsample", "fc"), ("shortcut", "linear")


@pytest.mark.torch
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_cifar_logits_are_torchs(norm: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = ResNetConfig((1, 2), (8, 16), 5, norm=norm, groups=4 if norm == "group" else 8)
    told = {} if norm == "batch" else {"config": {"norm": norm, "groups": config.groups}}
    found = assert_parity(network(torch, config, CIFAR), images(9, 8), tmp_path, **told)
    assert (found.family, found.model) == ("resnet_cifar", config)


@pytest.mark.torch
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_torchvision_logits_are_torchs(block: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = ResNetConfig((1, 1), (4, 8), 5, block, "large")
    found = assert_parity(network(torch, config, TORCHVISION), images(33, 32), tmp_path)
    assert (found.family, found.model) == ("resnet", config)


@pytest.mark.torch
def test_padded_shortcuts_are_recognised(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = ResNetConfig((1, 1), (4, 8), 5, shortcut="padded")
    found = assert_parity(network(torch, config, CIFAR), images(8, 8), tmp_path)
    assert (found.family, found.model) == ("resnet_cifar", config)


@pytest.mark.torch
def test_a_training_step_moves_the_statistics_as_torchs_does(tmp_path: Path) -> None:
    """But for the variance of the batch, which PyTorch counts as unbiased there."""
    torch = pytest.importorskip("torch")
    config = ResNetConfig((1,), (4,), 3)
    module = network(torch, config, CIFAR)
    torch.save(module.state_dict(), tmp_path / "m.pth")
    _, variables, _ = load_model(tmp_path / "m.pth")
    inputs = images(8, 8, batch=4)
    logits, moved = jax.jit(
        lambda v, x: ResNet(config).apply(v, x, train=True, mutable=["batch_stats"])
    )(variables, inputs)
    expected = module.train()(torch.from_numpy(inputs).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    n = 4 * 8 * 8
    before, after = variables["batch_stats"]["norm1"], moved["batch_stats"]["norm1"]
    np.testing.assert_allclose(after["mean"], module.bn1.running_mean.numpy(), atol=1e-5)
    batch = (np.asarray(after["var"]) - 0.9 * np.asarray(before["var"])) / 0.1
    unbiased = 0.9 * np.asarray(before["var"]) + 0.1 * batch * n / (n - 1)
    np.testing.assert_allclose(unbiased, module.bn1.running_var.numpy(), rtol=1e-4)


@settings(max_examples=12)
@given(
    blocks=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
    width=st.sampled_from([2, 4, 6]),
    block=st.sampled_from(["basic", "bottleneck"]),
    stem=st.sampled_from(["small", "large"]),
    shortcut=st.sampled_from(["projection", "padded"]),
    norm=st.sampled_from(["batch", "group", "layer"]),
    family=st.sampled_from(["resnet", "resnet_cifar"]),
)
def test_round_trips_are_exact(
    blocks: tuple[int, ...],
    width: int,
    block: str,
    stem: str,
    shortcut: str,
    norm: str,
    family: str,
) -> None:
    widths = tuple(width * 2**i for i in range(len(blocks)))
    config = ResNetConfig(blocks, widths, 3, block, stem, shortcut, norm, groups=2)
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip(family, config, Path(folder))


def test_the_named_depths_count_their_layers() -> None:
    for depth in (20, 26, 50):
        config = ResNetConfig.cifar(depth)
        assert 2 * sum(config.blocks) + 2 == depth
    for depth in (18, 34, 50):
        config = ResNetConfig.imagenet(depth)
        layers = {"basic": 2, "bottleneck": 3}[config.block]
        assert layers * sum(config.blocks) + 2 == depth
    with pytest.raises(ValueError, match="6n"):
        ResNetConfig.cifar(18)


@pytest.mark.torch
def test_norms_that_the_tensors_do_not_tell_apart_are_asked_for(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = ResNetConfig((1,), (8,), 5, norm="group")
    torch.save(network(torch, config, CIFAR).state_dict(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"'bn1' has no running statistics.*config="):
        load_model(tmp_path / "m.pth", family="resnet_cifar")
    with pytest.raises(CheckpointError, match=r"ResNetConfig: norm: Input should be 'batch'"):
        load_model(tmp_path / "m.pth", family="resnet_cifar", config={"norm": "instance"})
    with pytest.raises(CheckpointError, match=r"missing 'bn1.running_mean'"):
        load_model(tmp_path / "m.pth", family="resnet_cifar", config={"norm": "batch"})


@pytest.mark.torch
def test_the_other_layout_says_what_it_misses(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = ResNetConfig((1, 1), (4, 8), 5)
    torch.save(network(torch, config, CIFAR).state_dict(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"not of family resnet: no tensor 'fc.weight'"):
        load_model(tmp_path / "m.pth", family="resnet")
