"""Strict settings for every test: eight fake devices, rank promotion raises."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # Tests compile far more than they compute.
    " --xla_llvm_disable_expensive_passes=true"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")


import chex
import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The first example of a property compiles.
hypothesis.settings.register_profile("compiling", deadline=None)
hypothesis.settings.load_profile("compiling")


@pytest.fixture(autouse=True)
def _fresh_trace_counts() -> None:
    chex.clear_trace_counter()
