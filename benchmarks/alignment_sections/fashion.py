"""Fashion-MNIST from its four IDX files, as the Debian package dataset-fashion-mnist has them."""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Images(NamedTuple):
    """Images float32 [n, 28, 28, 1], mean 0 and variance 1 over the training images, with labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray


def load(folder: Path) -> tuple[Images, Images]:
    """The 60,000 training and 10,000 test images.

    Raises:
      FileNotFoundError: a file is not there; the message says where the data comes from.
    """
    splits = []
    for name in ("train", "t10k"):
        pixels, labels = (
            _read(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
        )
        splits.append((pixels.astype(np.float32) / 255, labels.astype(np.int32)))
    mean, spread = splits[0][0].mean(), splits[0][0].std()
    train, test = (Images(((x - mean) / spread)[..., None], y) for x, y in splits)
    return train, test


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
