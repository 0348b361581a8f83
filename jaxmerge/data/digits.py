"""The handwritten digits of the UCI repository (see DIGITS-LICENSE.txt), and their fixed split."""

from importlib.resources import files
from typing import NamedTuple

import numpy as np

TRAIN, VALIDATION, TEST = 1000, 397, 400


class Digits(NamedTuple):
    """Images and what they show.

    Attributes:
      images: float32 [n, 64], rows of 8 x 8 pixels, 0 for paper and 1 for ink.
      labels: int32 [n], 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray

    def of(self, digits: tuple[int, ...]) -> "Digits":
        """The images that show one of these digits."""
        kept = np.isin(self.labels, digits)
        return Digits(self.images[kept], self.labels[kept])


class Split(NamedTuple):
    """Disjoint parts of the digits: to train on, to choose by, and to report."""

    train: Digits
    validation: Digits
    test: Digits


def load_digits() -> Digits:
    """Loads all 1,797 digits, in the order of the UCI test set.

    Reference:
      Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
      Repository, 1998.

    Example:
      >>> digits = load_digits()
      >>> digits.images.shape, digits.labels[:5].tolist()
      ((1797, 64), [0, 1, 2, 3, 4])
    """
    images, labels, _ = _stored()
    return Digits(images.astype(np.float32) / np.float32(16), labels.astype(np.int32))


def split_digits() -> Split:
    """Splits the digits by a stored permutation: 1,000 to train, 397 to validate, 400 to test.

    Example:
      >>> [len(part.labels) for part in split_digits()]
      [1000, 397, 400]
    """
    digits, order = load_digits(), _stored()[2]
    parts = np.split(order, [TRAIN, TRAIN + VALIDATION])
    return Split(*(Digits(digits.images[part], digits.labels[part]) for part in parts))


def _stored() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with (
        files("jaxmerge.data").joinpath("digits.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        return arrays["images"], arrays["labels"], arrays["order"]
