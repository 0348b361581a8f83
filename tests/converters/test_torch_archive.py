"""PyTorch files written piece by piece: what is not announced, whole and in order is refused."""

import os
from pathlib import Path

import numpy as np
import pytest

from jaxmerge.converters import CheckpointError, TensorInfo
from jaxmerge.converters.torch_archive import TorchArchiveWriter

INFOS = [TensorInfo.of("a", (4,), "float32"), TensorInfo.of("b", (2,), "int64")]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        ([("c", 0, np.zeros(4, np.float32))], "no tensor 'c' was announced"),
        ([("a", 0, np.zeros(4))], r"'a': expected 1-D values of float32, found float64\[4\]"),
        ([("a", 0, np.zeros((2, 2), np.float32))], r"'a': expected 1-D values of float32"),
        ([("a", 1, np.zeros(3, np.float32))], r"'a': expected its ranges in order .* found 1:4"),
        (
            [("a", 0, np.zeros(2, np.float32)), ("b", 0, np.zeros(2, np.int64))],
            r"'b': expected its ranges in order and whole",
        ),
        ([("b", 0, np.zeros(2, np.int64))] * 2, r"'b': expected its ranges in order"),
        ([("a", 0, np.zeros(4, np.float32))], r"1 of 2 tensors were not written: b"),
    ],
)
def test_other_writes_are_refused_and_leave_nothing(
    tmp_path: Path, write: list, message: str
) -> None:
    def run() -> None:
        with TorchArchiveWriter(tmp_path / "m.pt", INFOS) as writer:
            for name, start, values in write:
                writer.write_flat(name, start, values)

    with pytest.raises(CheckpointError, match=message):
        run()
    assert os.listdir(tmp_path) == []


def test_names_must_differ_and_ties_must_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' is announced twice"):
        TorchArchiveWriter(tmp_path / "m.pt", [INFOS[0], INFOS[0]])
    with pytest.raises(CheckpointError, match="'b' is tied to 'a'"):
        TorchArchiveWriter(tmp_path / "m.pt", INFOS, ties=[("a", "b")])
    with pytest.raises(CheckpointError, match="cannot write: No such file"):
        TorchArchiveWriter(tmp_path / "no" / "m.pt", INFOS)
    assert os.listdir(tmp_path) == []
