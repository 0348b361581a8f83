"""`jaxmerge doctor`."""

from typing import Any

import pytest

from jaxmerge.cli import doctor


def test_a_sound_installation_ends_well(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing every package takes seconds.
    monkeypatch.setattr(doctor, "NEEDED", {"jax": "jax", "numpy": "numpy"})
    result = call("doctor")
    assert result.exit_code == 0, result.output
    for text in ("jaxmerge ", "python ", "cores", "Memory free: ", "A merge from a recipe: ok"):
        assert text in result.stdout


def test_a_broken_package_is_named(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", {"jax": "jax", "not-there": "not_there_at_all"})
    result = call("doctor")
    assert result.exit_code == 1
    assert "failed: ModuleNotFoundError: No module named 'not_there_at_all'" in result.stdout


def test_a_merge_that_fails_is_told(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(doctor, "NEEDED", {})
    monkeypatch.setattr(doctor, "_merge", fails)
    result = call("doctor")
    assert result.exit_code == 1
    assert "A merge from a recipe: failed: RuntimeError: no luck" in result.stdout


def test_missing_extras_say_how_to_install_them(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", {})
    monkeypatch.setattr(doctor, "EXTRAS", {"gguf": ("surely-not-there", "GGUF files")})
    result = call("doctor")
    assert result.exit_code == 0
    assert "missing: pip install 'jaxmerge[gguf]'" in result.stdout
