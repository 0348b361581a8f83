"""Data that the package carries: 1,797 real handwritten digits."""

from jaxmerge.data.digits import Digits, Split, load_digits, split_digits

__all__ = ["Digits", "Split", "load_digits", "split_digits"]
