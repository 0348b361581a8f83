"""Strict settings for every test: eight fake devices, rank promotion raises."""

import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # Tests compile far more than they compute. XLA ends the process at a flag that it does not know, and later ones do
    # not know the second.
    " --xla_llvm_disable_expensive_passes=true"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "")
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests' matrices are tiny, and several processes share the cores: OpenBLAS's threads would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# No test asks a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

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


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory() -> Iterator[None]:
    """Compiled programs would otherwise pile up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives tests that share programs or a fixture to one process.

    Those are the contract's tests of one method, the cases of one test, and files with a fixture of their own.
    """
    from xdist.scheduler import LoadScopeScheduling

    class BySharedWork(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, name = nodeid.partition("::")
            method = re.search(r"\[(.*?)\d*\]$", name)
            if path.endswith("test_contract.py") and method:
                return method[1]
            if "quickstart/" in path or path.endswith("test_packaging.py"):
                return path
            return nodeid.partition("[")[0]

    return BySharedWork(config, log)
