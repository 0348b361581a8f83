"""The digits in the package: complete, scaled, and split once and for all."""

import sys

import numpy as np
import pytest

from jaxmerge.data import load_digits, split_digits

# How often each digit occurs, as the UCI repository states it.
COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_all_digits_are_there() -> None:
    digits = load_digits()
    assert digits.images.shape == (1797, 64)
    assert digits.images.dtype == np.float32
    assert digits.labels.dtype == np.int32
    assert np.bincount(digits.labels).tolist() == COUNTS
    assert digits.images.min() == 0
    assert digits.images.max() == 1


def test_they_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs, ours = datasets.load_digits(), load_digits()
    np.testing.assert_array_equal(ours.images, theirs.data / 16)
    np.testing.assert_array_equal(ours.labels, theirs.target)


def test_the_split_uses_every_image_once() -> None:
    whole = load_digits()
    parts = split_digits()
    rows = np.concatenate([np.column_stack([part.images, part.labels]) for part in parts])
    expected = np.column_stack([whole.images, whole.labels])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


def test_a_part_can_be_restricted_to_some_digits() -> None:
    test = split_digits().test
    assert set(test.of((4, 5, 6)).labels.tolist()) == {4, 5, 6}
    assert sum(len(test.of((digit,)).labels) for digit in range(10)) == len(test.labels)


def test_loading_needs_no_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert len(load_digits().labels) == 1797
