"""Counting NaN and infinity in every storage type."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.converters import dtypes, non_finite


@pytest.mark.parametrize("name", dtypes.names())
def test_every_bit_pattern_is_judged_as_numpy_does(name):
    dtype = dtypes.storage_dtype(name)
    raw = np.random.default_rng(0).integers(0, 256, 1 << 14, dtype=np.uint8)
    raw[:4096] = 255
    values = (raw & 1 if name == "bool" else raw).view(dtype)
    expected = 0
    if dtype.kind not in "biu":
        with np.errstate(invalid="ignore"):
            wide = values if dtype.kind == "c" else values.astype(np.float64)
        expected = int(np.count_nonzero(~np.isfinite(wide)))
        assert expected > 0
    assert non_finite(values) == expected


def test_chunks_layouts_and_scalars(monkeypatch):
    monkeypatch.setattr("jaxmerge.converters.finite._CHUNK", 7)
    values = np.zeros((10, 10), np.float32)
    values[::3, ::4] = np.nan
    assert non_finite(values) == 12
    assert non_finite(values.T) == 12
    assert non_finite(values.astype(">f4")) == 12
    assert non_finite(jnp.asarray(values, jnp.bfloat16)) == 12
    assert non_finite(np.float32(np.inf)) == 1
    assert non_finite(np.zeros((0, 3))) == 0
