"""Orbax checkpoints: exact, onto a mesh of eight devices, and each host reading its part."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from parity import random_checkpoint

from jaxmerge.converters import (
    CheckpointError,
    ModelConfig,
    load_checkpoint,
    load_model,
    load_orbax,
    save_checkpoint,
    save_model,
    save_orbax,
)
from jaxmerge.models import (
    DecoderConfig,
    InvertedResidualConfig,
    LayerKind,
    MLPConfig,
    ResNetConfig,
    Rotary,
    YarnScaling,
)
from jaxmerge.models.inverted_residual import Block


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_a_model_goes_over_eight_devices_and_back_to_its_own_layout(
    tmp_path: Path, mesh: jax.sharding.Mesh
) -> None:
    tensors = random_checkpoint("resnet_cifar", ResNetConfig((1, 1), (8, 16), 4))
    save_checkpoint(tmp_path / "source.safetensors", tensors)
    _, params, config = load_model(tmp_path / "source.safetensors")
    save_orbax(tmp_path / "one", params, config)

    specs = {"params/**/kernel": jax.P(None), "batch_stats/**": jax.P("model")}
    specs = {"params/**/conv*/kernel": jax.P(None, None, None, "model")} | specs
    spread, found = load_orbax(tmp_path / "one", mesh=mesh, sharding=specs)
    assert found == config
    kernel = spread["params"]["stage1_0"]["conv1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 8, 2)}
    assert spread["params"]["norm1"]["scale"].sharding.is_fully_replicated

    save_orbax(tmp_path / "eight", spread, found)
    again, last = load_orbax(tmp_path / "eight")
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(again)} == {1}
    assert last is not None
    save_model(tmp_path / "target", again, last)
    written = load_checkpoint(tmp_path / "target")
    assert set(written) == set(tensors)
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)


class Pair(NamedTuple):
    first: Any
    second: Any


def test_every_dtype_and_container_comes_back(tmp_path: Path) -> None:
    tree = {
        "bf16": np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "pair": Pair(jnp.arange(3), [np.float16(1.5), np.array(True)]),
        "numbered": {i: np.full((1, 2), i, np.float32) for i in (2, 10)},
    }
    save_orbax(tmp_path / "tree", tree)
    found, config = load_orbax(tmp_path / "tree", like=tree)
    assert config is None
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    cast, _ = load_orbax(tmp_path / "tree", dtype="float32")
    assert cast["bf16"].dtype == cast["pair"]["second"][0].dtype == "float32"
    assert cast["pair"]["first"].dtype == "int32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": {"w": jax.P("data")}}, "a sharding needs a mesh"),
        ({"mesh": True, "sharding": {"v*": jax.P()}}, r"pattern 'v\*' matches no leaf"),
        ({"mesh": True, "sharding": {"w": jax.P("model")}}, r"leaf 'w' \[6, 2\]: .*evenly divide"),
        ({"like": {"w": np.zeros(1), "u": np.zeros(1)}}, "only one has 'u'"),
    ],
)
def test_what_cannot_be_restored_says_why(
    tmp_path: Path, mesh: jax.sharding.Mesh, options: dict[str, Any], message: str
) -> None:
    save_orbax(tmp_path / "tree", {"w": np.zeros((6, 2), np.float32)})
    if "mesh" in options:
        options = options | {"mesh": mesh}
    with pytest.raises(CheckpointError, match=message):
        load_orbax(tmp_path / "tree", **options)


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="leaf 'a/b': expected an array, found str"):
        save_orbax(tmp_path / "tree", {"a": {"b": "text"}})
    with pytest.raises(CheckpointError, match=r"leaf 'e' \[0, 2\]: orbax holds no arrays"):
        save_orbax(tmp_path / "tree", {"e": np.zeros((0, 2), np.float32)})
    config = ModelConfig("mlp_fc", MLPConfig((2, 3)))
    with pytest.raises(CheckpointError, match="missing 'params/dense_0/kernel'"):
        save_orbax(tmp_path / "tree", {"params": {"dense_0": {"bias": np.zeros(3)}}}, config)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="exists already"):
        save_orbax(tmp_path, {"w": np.zeros(3)})
    with pytest.raises(CheckpointError, match="not an orbax checkpoint"):
        load_orbax(tmp_path)
    with pytest.raises(CheckpointError, match="not an orbax checkpoint"):
        load_orbax(tmp_path / "nothing")


def test_the_readers_of_other_formats_send_an_orbax_folder_on(tmp_path: Path) -> None:
    save_orbax(tmp_path / "tree", {"w": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"an orbax checkpoint: .*load_orbax"):
        load_model(tmp_path / "tree")


def test_doubles_are_not_rounded_in_silence(tmp_path: Path) -> None:
    save_orbax(tmp_path / "tree", {"w": np.zeros(3)})
    with pytest.raises(CheckpointError, match="'w' is float64, which JAX holds only with"):
        load_orbax(tmp_path / "tree")
    assert load_orbax(tmp_path / "tree", dtype="float32")[0]["w"].dtype == "float32"


def test_a_description_of_something_else_is_refused(tmp_path: Path) -> None:
    config = ModelConfig("mlp_fc", MLPConfig((2, 3)))
    text = config.to_json()
    for change, message in (
        ({"family": "mlp_cf"}, "no family 'mlp_cf'"),
        ({"layout": 3}, "not a model's description"),
        ({"model": {"type": "MLPConfig", "width": 3}}, "MLPConfig in a config: .*'width'"),
        (
            {"model": {"type": "MLPConfg"}},
            "unknown type 'MLPConfg' in a config. Nearest: 'MLPConfig'",
        ),
        ({"model": {"type": "Rotary"}}, "expected a MLPConfig, found Rotary"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ModelConfig.from_json(text | change)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig("mobilenet_v2", InvertedResidualConfig(4, (Block(8, 4, 1, 3),), 8, 3)),
        ModelConfig(
            "llama",
            DecoderConfig(
                *(11, 8, (LayerKind(4, Rotary(1e4, YarnScaling(4.0, 100))), LayerKind())),
                *(2, 1, 4, 16),
            ),
        ),
    ],
    ids=lambda config: config.family,
)
def test_descriptions_with_values_inside_values_come_back(config: ModelConfig) -> None:
    again = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert [type(one) for one in vars(again.model).values()] == [
        type(one) for one in vars(config.model).values()
    ]


HOST = """
import sys
import jax
import numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, process, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, process)
from orbax.checkpoint import v1
from jaxmerge.converters import load_orbax

def read_so_far():
    with open("/proc/self/io") as counters:
        return int(counters.readline().split()[1])

mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
before = read_so_far()
tree, _ = load_orbax(path, mesh=mesh, sharding={"w": jax.P("x")})
nbytes = read_so_far() - before
expected = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
shards = tree["w"].addressable_shards
assert len(shards) == 4
assert all(np.array_equal(shard.data, expected[shard.index]) for shard in shards)
print(nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_each_of_two_hosts_reads_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxmerge.converters.orbax_folder._CHUNK", 1 << 20)
    array = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
    save_orbax(tmp_path / "tree", {"w": array})
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", HOST, address]
    hosts = [
        subprocess.Popen(
            [*command, str(process), str(tmp_path / "tree")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    for output, _ in outputs:
        assert 0.4 * array.nbytes < int(output) < 0.7 * array.nbytes
