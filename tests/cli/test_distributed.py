"""`jaxmerge merge --distributed`: two processes on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.converters import load_checkpoint, save_checkpoint


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def both(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs `jaxmerge merge` in two processes that know each other."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for index in range(2):
        where = ["--coordinator", address, "--process-id", str(index), "--num-processes", "2"]
        command = [sys.executable, "-m", "jaxmerge", "merge", *arguments, "--distributed", *where]
        processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    done = [process.communicate(timeout=120) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(processes, done, strict=True)
    ]


def test_two_processes_write_what_one_writes(folder: Path, call: Any) -> None:
    assert call("merge", "ties.yaml", "one", "--shard-size", "0.1K").exit_code == 0
    first, second = both("ties.yaml", "two", "--shard-size", "0.1K")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith("two: 3 tensors merged by ties, 1 carried over")
    assert (second.stdout, second.stderr) == ("", "")
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))
    for file in Path("one").iterdir():
        # The card has the folder's name as its title.
        same = file.read_bytes() == Path("two", file.name).read_bytes()
        assert same or file.name == "README.md"


def test_one_failure_ends_all(folder: Path) -> None:
    tensors = load_checkpoint("b")
    # With one tensor to a file, the second process merges the second tensor.
    tensors["fc.bias"] = np.full_like(tensors["fc.bias"], np.nan)
    save_checkpoint("b", tensors)
    first, second = both("ties.yaml", "out", "--shard-size", "0.001K")
    assert second.returncode == 2
    assert "b: tensor 'fc.bias' holds 6 value(s) that are NaN" in second.stderr
    assert first.returncode == 1
    assert "process 1 of 2 has failed; see its output" in first.stderr
    assert "should not happen" not in first.stderr
    assert not Path("out/model.safetensors.index.json").exists()
