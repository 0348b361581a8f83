"""Strict settings for every test: eight fake devices, rank promotion raises."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 - the flags above are read when jax is first imported

jax.config.update("jax_numpy_rank_promotion", "raise")
