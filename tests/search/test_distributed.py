"""A search over two processes on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxmerge.search import continuous, evolve, space

SPACE = space({"x": continuous(-1.0, 4.0, shape=(4,))})


def objective(point: dict[str, jax.Array], key: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.sum((point["x"] - target) ** 2) + 0.1 * jax.random.normal(key)


def search(folder: str) -> str:
    """On four devices, of this process or of several; the models' axis lies within a process."""
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("population", "models"), axis_types=(AxisType.Auto,) * 2)
    values = np.arange(4.0, dtype=np.float32)
    rows = jax.NamedSharding(mesh, jax.P("models"))
    target = jax.make_array_from_callback((4,), rows, lambda where: values[where])
    for generations in (4, 8):
        result = evolve(
            objective,
            SPACE,
            strategy="snes",
            population=6,
            generations=generations,
            every=2,
            chunk=2,
            key=jax.random.key(0),
            args=(target,),
            mesh=mesh,
            checkpoint=folder,
        )
    return f"{result.generations} {result.genome.tobytes().hex()} {result.history['mean'].tobytes().hex()}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_processes_find_what_one_finds_and_go_on(tmp_path: Path) -> None:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(i), str(tmp_path / "two")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags},
        )
        for i in range(2)
    ]
    alone = search(str(tmp_path / "one"))
    done = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], done[0][1] + done[1][1]
    assert [out.splitlines()[-1] for out, _ in done] == [alone, alone]
    assert alone.startswith("8 ")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["generation_00000008"]


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    sys.stdout.write(search(sys.argv[3]))
