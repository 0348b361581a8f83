"""`jaxmerge inspect`."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.converters import lora, save_checkpoint


def words(result: Any) -> list[list[str]]:
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines()]


def decoder() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"model.embed.weight": (5, 4)}
    for layer in range(3):
        shapes[f"model.layers.{layer}.mlp.up.weight"] = (6, 4)
        shapes[f"model.layers.{layer}.mlp.down.weight"] = (4, 6)
        shapes[f"model.layers.{layer}.norm.weight"] = (4,)
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def test_blocks_dtypes_and_ties_come_from_headers(folder: Path, call: Any) -> None:
    tensors = decoder()
    tensors["head.weight"] = tensors["model.embed.weight"]
    tensors["steps"] = np.array(3)
    save_checkpoint("model", tensors, shard_size=200)
    found = words(call("inspect", "model"))
    assert ["model:", "safetensors,", "3", "files,", "400", "B"] in found
    assert ["177", "parameters", "in", "12", "tensors"] in found
    assert ["float16", "11", "196"] in found
    assert ["int64", "1", "1"] in found
    assert ["model.layers.*.mlp", "3", "6", "144", "73.1", "%", "288", "B"] in found
    assert ["model.layers.*.norm", "3", "3", "12", "6.1", "%", "24", "B"] in found
    assert ["head", "1", "20", "10.2", "%", "40", "B"] in found
    assert ["Tied:", "model.embed.weight,", "head.weight"] in found
    assert ["Values", "were", "not", "read", "(--values)"] in found
    assert any(line[:3] == ["Family:", "none", "of"] for line in found)


def test_values_are_read_if_asked(folder: Path, call: Any) -> None:
    tensors = decoder()
    tensors["model.layers.1.mlp.up.weight"][0, :2] = np.nan, np.inf
    tensors["copy.weight"] = tensors["model.layers.0.mlp.up.weight"].copy()
    save_checkpoint("model.safetensors", tensors)
    found = words(call("inspect", "model.safetensors", "--values"))
    assert ["NaN", "or", "infinite:", "model.layers.1.mlp.up.weight", "(2)"] in found
    assert [
        "Equal,",
        "and",
        "not",
        "tied:",
        "model.layers.0.mlp.up.weight,",
        "copy.weight",
    ] in found
    assert ["All", "values", "are", "finite"] in words(call("inspect", "a", "--values"))


def test_json_is_all_of_stdout(folder: Path, call: Any) -> None:
    save_checkpoint(
        "m.safetensors",
        {"fc1.weight": np.ones((3, 4)), "fc1.bias": np.ones(3)},
        metadata={"k": "v"},
    )
    found = json.loads(call("inspect", "m.safetensors", "--json", "--values").stdout)
    assert found["metadata"] == {"k": "v"}
    assert found["blocks"] == [
        {"name": "fc1", "layers": 0, "tensors": 2, "parameters": 15, "nbytes": 120}
    ]
    assert (found["families"], found["non_finite"]) == (["mlp_fc"], {})


def test_quantised_models_and_unknown_types_are_named(folder: Path, call: Any) -> None:
    save_checkpoint("q", {"w.qweight": np.zeros((2, 2), np.int32)})
    Path("q/config.json").write_text('{"model_type": "future"}')
    output = call("inspect", "q").stdout
    assert "Cannot be merged as it is: quantised (AWQ" in output
    assert "no family reads the model_type 'future'" in output


def test_an_adapter_is_described(folder: Path, call: Any) -> None:
    update = lora.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), (4, 3))
    adapter = lora.LoraAdapter(
        {"q.weight": update}, {"n.weight": jnp.ones(3)}, base_model="some/base"
    )
    lora.save_lora("adapter", adapter)
    output = call("inspect", "adapter").stdout
    line = "LoRA adapter: 1 tensors, rank 2, scale 1; 1 tensors whole; base some/base"
    assert line in output.splitlines()


@pytest.mark.torch
def test_entries_that_are_no_tensors_are_named(folder: Path, call: Any) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"model": {"w": torch.ones(2), "version": 3}, "epoch": 1}, "m.pt")
    output = call("inspect", "m.pt").stdout
    assert output.startswith("m.pt#model: torch, 1 file, 8 B\n")
    assert "No tensors: version (int)" in output


def test_gguf_types_are_counted(folder: Path, call: Any) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the `gguf` extra")
    writer = gguf.GGUFWriter("m.gguf", "other")
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(np.ones((2, 32), np.float32), kind)
    writer.add_tensor("w", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "Dequantised as they are read: Q8_0 (1)" in call("inspect", "m.gguf").stdout


def test_what_is_no_checkpoint_is_one_message(folder: Path, call: Any) -> None:
    result = call("inspect", "ties.yaml")
    assert result.exit_code == 2
    assert "ties.yaml: not a checkpoint" in result.stderr
