"""What needs no optional package works without it; what does says which extra is missing."""

import subprocess
import sys

import numpy as np
import pytest

from jaxmerge.converters import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint


@pytest.fixture
def _no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.usefixtures("_no_torch")
def test_safetensors_work(tmp_path):
    save_checkpoint(tmp_path, {"w": np.ones(4), "v": np.ones(4)}, shard_size=32)
    assert list(load_checkpoint(tmp_path)) == ["w", "v"]


@pytest.mark.usefixtures("_no_torch")
def test_pytorch_files_name_the_extra(tmp_path):
    path = tmp_path / "m.pth"
    path.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"m.pth: PyTorch.*pip install 'jaxmerge\[torch\]'"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"pip install 'jaxmerge\[torch\]'"):
        save_checkpoint(tmp_path / "out.pth", {"w": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"pip install 'jaxmerge\[torch\]'"):
        save_checkpoint(tmp_path / "folder", {"w": np.ones(1)}, format="torch")
    assert [file.name for file in tmp_path.iterdir()] == ["m.pth"]


def test_importing_and_reading_safetensors_never_imports_torch(tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", {"w": np.ones(1)})
    script = (
        "import sys\n"
        "from jaxmerge.converters import load_checkpoint\n"
        "load_checkpoint(sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "m.safetensors")], check=True)


def test_gguf_files_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes(16))
    with pytest.raises(CheckpointError, match=r"m.gguf: GGUF.*pip install 'jaxmerge\[gguf\]'"):
        open_checkpoint(path)
