"""Networks of the literature: their published numbers of parameters, and their configs read off names and shapes."""

import math
from typing import Any

import pytest

from jaxmerge.converters import TensorInfo, families
from jaxmerge.converters.families.matching import recognise
from jaxmerge.models import InvertedResidualConfig, PilotNetConfig, ResNetConfig, VGGConfig

PUBLISHED = {
    "VGG-11": ("vgg", VGGConfig.imagenet(11), 132_863_336),
    "VGG-16 with batch norms": ("vgg", VGGConfig.imagenet(16, norm="batch"), 138_365_992),
    "ResNet-18": ("resnet", ResNetConfig.imagenet(18), 11_689_512),
    "ResNet-34": ("resnet", ResNetConfig.imagenet(34), 21_797_672),
    "ResNet-50": ("resnet", ResNetConfig.imagenet(50), 25_557_032),
    "ResNet-20": ("resnet_cifar", ResNetConfig.cifar(20, shortcut="padded"), 269_722),
    "ResNet-56": ("resnet_cifar", ResNetConfig.cifar(56, shortcut="padded"), 853_018),
    "MobileNetV2": ("mobilenet_v2", InvertedResidualConfig.mobilenet_v2(), 3_504_872),
    "EfficientNet-Lite0": (
        "efficientnet_lite",
        InvertedResidualConfig.efficientnet_lite0(),
        4_652_008,
    ),
    "PilotNet": ("pilotnet", PilotNetConfig(), 252_219),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_its_size_and_is_recognised(name: str) -> None:
    family, config, parameters = PUBLISHED[name]
    shapes = families.get(family).shapes(config)
    counted = {path: math.prod(s) for path, s in shapes.items() if path.startswith("params/")}
    assert sum(counted.values()) == parameters
    assert recognise(infos(family, config))[:2] == (families.get(family), config)


def infos(family: str, config: Any) -> dict[str, TensorInfo]:
    """The checkpoint's headers; no tensor is made."""
    table = families.get(family)
    layout = table.layout(config)
    return {
        layout[path].names[0]: TensorInfo.of(
            layout[path].names[0], layout[path].checkpoint_shape(shape), "float32"
        )
        for path, shape in table.shapes(config).items()
    }
