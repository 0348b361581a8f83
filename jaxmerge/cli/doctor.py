"""`jaxmerge doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import typer

from jaxmerge.cli.consoles import say, show
from jaxmerge.cli.failures import FAILED

# The distribution and the module that shows whether it works.
NEEDED = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "evosax": "evosax",
    "numpy": "numpy",
    "scipy": "scipy",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "typer": "typer",
    "rich": "rich",
    "matplotlib": "matplotlib",
}
# The extra, the distribution that it brings, and what it is for.
EXTRAS = {
    "torch": ("torch", "PyTorch files"),
    "hub": ("huggingface_hub", "models by their name on a hub"),
    "lora": ("peft", "adapters"),
    "gguf": ("gguf", "GGUF files"),
    "cuda12": ("jax-cuda12-plugin", "NVIDIA GPUs"),
    "cuda13": ("jax-cuda13-plugin", "NVIDIA GPUs"),
    "tpu": ("libtpu", "TPUs"),
}


def doctor() -> None:
    """Check the installation: versions, devices, memory, extras, a merge.

    Ends with exit code 1 if something that is needed does not work.
    """
    failures = [_show_versions(), _show_machine(), _show_extras(), _show_merge()]
    if any(failures):
        say("\nSomething that is needed does not work; see above.")
        raise typer.Exit(FAILED)
    say("\nAll that is needed works.")


def _show_versions() -> bool:
    from jaxmerge._version import __version__

    rows: list[tuple[str, str, str]] = [
        ("jaxmerge", __version__, "ok"),
        ("python", platform.python_version(), "ok"),
    ]
    for name, module in NEEDED.items():
        rows.append((name, _version(name) or "", _importing(module)))
    show(("package", "version", "state"), rows)
    return any(state != "ok" for _, _, state in rows)


def _show_machine() -> bool:
    import jax

    from jaxmerge.recipes.output import bytes_text
    from jaxmerge.sweeping import available_memory

    say(f"\nSystem: {platform.system()} {platform.machine()}, {_cores()} cores")
    try:
        devices = jax.devices()
        host = jax.devices("cpu")[0]
    except RuntimeError as error:
        say(f"Devices: failed: {error}")
        return True
    free = available_memory(host)
    say(f"Memory free: {'unknown' if free is None else bytes_text(free)}")
    rows = []
    for device in devices:
        memory = None if device.platform == "cpu" else available_memory(device)
        shown = "" if memory is None else bytes_text(memory)
        rows.append((device.id, device.platform, device.device_kind, shown))
    say("")
    show(("device", "platform", "kind", "memory free"), rows)
    if devices[0].platform == "cpu" and Path("/dev/nvidiactl").exists():
        say("There is an NVIDIA GPU that JAX does not use: pip install 'jaxmerge[cuda12]'")
    return False


def _show_extras() -> bool:
    rows = []
    for extra, (name, purpose) in EXTRAS.items():
        version = _version(name)
        rows.append((extra, purpose, version or f"missing: pip install 'jaxmerge[{extra}]'"))
    say("")
    show(("extra", "for", "version"), rows)
    return False


def _show_merge() -> bool:
    state = _guarded(_merge)
    say(f"\nA merge from a recipe: {state}")
    return state != "ok"


def _merge() -> None:
    """Merges two files by a recipe and compares with NumPy."""
    import numpy as np

    from jaxmerge.converters import load_checkpoint, save_checkpoint
    from jaxmerge.recipes import make_plan, parse, run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)
        for file, tensor in (("a.safetensors", a), ("b.safetensors", b)):
            save_checkpoint(folder / file, {"weight": tensor})
        recipe = parse(
            "merge_method: linear\n"
            f"models: [{{model: '{folder / 'a.safetensors'}', parameters: {{weight: 0.25}}}}, "
            f"{{model: '{folder / 'b.safetensors'}', parameters: {{weight: 0.75}}}}]\n"
        )
        output = run(make_plan(recipe, out=folder / "out.safetensors"))
        merged = load_checkpoint(output)["weight"]
        expected = 0.25 * a + 0.75 * b
        if not np.allclose(merged, expected, rtol=1e-6):
            raise RuntimeError(f"expected {expected.tolist()}, found {merged.tolist()}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importing(module: str) -> str:
    return _guarded(lambda: importlib.import_module(module))


def _guarded(work: Callable[[], object]) -> str:
    """Runs a check: "ok", or what went wrong."""
    try:
        work()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"failed: {type(error).__name__}: {lines[0]}"
    return "ok"


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
