"""Strict settings for every test: eight fake devices, rank promotion raises."""

import os
import re

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # Tests compile far more than they compute.
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests' matrices are tiny, and several processes share the cores: OpenBLAS's threads would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from typing import Any

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives tests that compile the same programs to one process: those of a method, the cases of a function."""
    from xdist.scheduler import LoadScopeScheduling

    class BySharedPrograms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            method = re.search(r"test_contract\.py::.*\[(.*?)\d*\]$", nodeid)
            return method[1] if method else nodeid.partition("[")[0]

    return BySharedPrograms(config, log)
