"""The layouts of checkpoints that jaxmerge has Flax models for."""

from __future__ import annotations

from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.families import (
    bert,
    cct,
    clip,
    decoder,
    driving,
    gpt2,
    inverted_residual,
    mlp,
    resnet,
    t5,
    vgg,
    vit,
)
from jaxmerge.converters.families.family import ApplyFn, Family
from jaxmerge.converters.families.rules import Rule, Transform, as_is, convolution, linear

__all__ = [
    "FAMILIES",
    "ApplyFn",
    "Family",
    "Rule",
    "Transform",
    "as_is",
    "convolution",
    "get",
    "linear",
    "names",
    "register",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        mlp.MLP_SEQUENTIAL,
        mlp.MLP_LAYERS,
        mlp.MLP_FC,
        bert.BERT,
        bert.BERT_TENSORFLOW,
        bert.ROBERTA,
        vit.VIT,
        vit.VIT_TIMM,
        clip.CLIP_TOWERS,
        t5.T5_STACKS,
        vgg.VGG_TORCHVISION,
        vgg.VGG_CIFAR,
        resnet.RESNET,
        resnet.RESNET_CIFAR,
        inverted_residual.MOBILENET,
        inverted_residual.EFFICIENTNET_LITE,
        cct.CCT_FAMILY,
        driving.PILOTNET,
        driving.DRIVING_TRANSFORMER,
        *decoder.DECODERS,
        gpt2.GPT2_LM,
        gpt2.GPT2_BODY,
    )
}


def register(family: Family) -> None:
    """Makes a layout of your own known to `load_model` and `save_model`; docs/models.md has an example.

    Raises:
      CheckpointError: another family has the name.
    """
    if FAMILIES.get(family.name, family) != family:
        raise CheckpointError(f"a family {family.name!r} is registered already")
    FAMILIES[family.name] = family


def names() -> list[str]:
    """The names of all families."""
    return list(FAMILIES)


def get(name: str) -> Family:
    """Returns a family by its name.

    Raises:
      CheckpointError: no such family; the message has the nearest name.

    Example:
      >>> get("mlp_fc").name
      'mlp_fc'
    """
    try:
        return FAMILIES[name]
    except KeyError:
        raise CheckpointError(
            f"no family {name!r}.{nearest(name, FAMILIES)} Families: {', '.join(FAMILIES)}"
        ) from None
