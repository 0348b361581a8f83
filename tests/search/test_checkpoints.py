"""Searches that are killed, and go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.search import continuous, evolve, space

SPACE = space({"x": continuous(-1.0, 3.0, shape=(3,))})


def sphere(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    return jnp.sum((point["x"] - 1.5) ** 2) + 0.1 * jax.random.normal(key)


def run(folder: Path | None, **options: Any) -> Any:
    given: dict[str, Any] = {
        "strategy": "snes",
        "population": 8,
        "generations": 12,
        "key": jax.random.key(1),
        "every": 3,
        "reevaluate": 2,
        "checkpoint": folder,
    }
    return evolve(sphere, SPACE, **{**given, **options})


class Killed(Exception):
    pass


def test_a_search_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")

    def kill(done: int, *_: Any) -> None:
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", progress=kill)
    seen: list[int] = []
    found = run(tmp_path / "killed", progress=lambda done, *_: seen.append(done))
    assert seen == [9, 12]
    jax.tree.map(np.testing.assert_array_equal, found.history, whole.history)
    np.testing.assert_array_equal(found.genome, whole.genome)
    assert (found.fitness, found.evaluations) == (whole.fitness, whole.evaluations)
    # One that has ended is read, not run; one with a larger budget goes on.
    assert run(tmp_path / "killed", progress=lambda *_: seen.append(0)).fitness == whole.fitness
    assert seen == [9, 12]
    assert run(tmp_path / "killed", generations=13).generations == 13
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["generation_00000013"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "random"}, "strategy was 'SNES', is 'RandomSearch'"),
        ({"key": jax.random.key(2)}, r"key was \[0, 1\], is \[0, 2\]"),
        ({"population": 10}, "population was 8, is 10"),
        ({"space": space({"x": continuous(-1.0, 2.0, shape=(3,))})}, "space was '"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {
        "space": SPACE,
        "strategy": "snes",
        "population": 8,
        "generations": 3,
        "key": jax.random.key(1),
        "every": 3,
        "checkpoint": tmp_path / "kept",
    }
    evolve(sphere, **given)
    with pytest.raises(ValueError, match=f"checkpoints of another search: {message}"):
        evolve(sphere, **{**given, **options})


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected checkpoints .* 'model\.safetensors'"):
        run(tmp_path)


def long_search(folder: str, progress: Any = None) -> str:
    result = evolve(
        sphere,
        SPACE,
        strategy="random",
        population=4,
        generations=40,
        every=2,
        key=jax.random.key(0),
        checkpoint=folder,
        progress=progress,
    )
    return f"end {result.genome.tobytes().hex()} {result.history['mean'].tobytes().hex()}"


def test_a_search_killed_twice_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    def started() -> subprocess.Popen[str]:
        command = [sys.executable, __file__, str(tmp_path / "killed")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    for kill_at in (6, 22):
        process = started()
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= kill_at:
                # Somewhere in the next generations, or while their checkpoint is written.
                time.sleep(0.003)
                os.kill(process.pid, signal.SIGKILL)
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    found = started().communicate()[0].splitlines()
    assert int(found[0]) > 22
    assert found[-1] == long_search(str(tmp_path / "whole"))


if __name__ == "__main__":

    def say(line: Any, *_: Any) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    say(long_search(sys.argv[1], say))
