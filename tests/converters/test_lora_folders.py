"""Adapters on disk: extracted from checkpoints, written, read again; and what peft makes of them."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.converters import CheckpointError, lora, save_checkpoint

SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    "model.layers.0.q_proj.weight": (8, 8),
    "model.layers.0.up_proj.weight": (12, 8),
    "model.layers.0.up_proj.bias": (12,),
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def tuned(rank: int = 2) -> dict[str, np.ndarray]:
    """The base with changes of a low rank in its matrices, and small ones elsewhere."""
    rng, changed = np.random.default_rng(7), tensors(0)
    for name, shape in SHAPES.items():
        if name.endswith("proj.weight"):
            change = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
        else:
            change = 0.1 * rng.normal(size=shape)
        changed[name] = changed[name] + change.astype(np.float32)
    return changed


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    save_checkpoint(tmp_path / "tuned", tuned(), shard_size=600)
    save_checkpoint(tmp_path / "base", tensors(0))
    config = {"architectures": ["LlamaForCausalLM"], "_name_or_path": "some/base"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "tuned", tmp_path / "base"


def test_what_training_changed_is_extracted_and_comes_back(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    found = lora.extract_lora(*models, rank=2)
    assert found.kept["model.layers.0.q_proj.weight"][0] == 2
    assert set(found.kept) == {name for name in SHAPES if name.endswith("proj.weight")}
    assert set(found.left_out) == set(SHAPES) - set(found.kept)
    assert 0.9 < found.energy < 1
    assert found.adapter.base_model == "some/base"
    lora.save_lora(tmp_path / "adapter", found.adapter)
    shapes = dict(SHAPES)
    again = lora.load_lora(tmp_path / "adapter", shapes)
    assert (again.base_model, again.task_type) == ("some/base", "CAUSAL_LM")
    merged = lora.apply_lora(tensors(0), again)
    for name, expected in tuned().items():
        if name in found.kept:
            np.testing.assert_allclose(merged[name], expected, atol=2e-5)
        else:
            np.testing.assert_array_equal(merged[name], tensors(0)[name])


def test_energy_is_what_the_report_says(models: tuple[Path, Path]) -> None:
    found = lora.extract_lora(*models, energy=0.5)
    for name, (rank, share) in found.kept.items():
        delta = tuned()[name].astype(np.float64) - tensors(0)[name]
        s = np.linalg.svd(delta, compute_uv=False)
        assert rank == int(np.argmax(np.cumsum(s**2) >= 0.5 * np.sum(s**2))) + 1
        np.testing.assert_allclose(share, np.sum(s[:rank] ** 2) / np.sum(s**2), rtol=1e-4)
    deltas = {n: tuned()[n].astype(np.float64) - tensors(0)[n] for n in SHAPES}
    held = sum(found.kept[n][1] * np.sum(deltas[n] ** 2) for n in found.kept)
    total = sum(np.sum(delta**2) for delta in deltas.values())
    np.testing.assert_allclose(found.energy, held / total, rtol=1e-4)


def test_everything_else_is_kept_whole_if_asked(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = lora.extract_lora(*models, rank=2, whole=True)
    assert (found.left_out, round(found.energy, 4)) == ((), 1.0)
    lora.save_lora(tmp_path / "adapter", found.adapter, dtype="bfloat16")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens", "model.norm"]
    assert config["bias"] == "all"
    again = lora.load_lora(tmp_path / "adapter")
    merged = lora.apply_lora(tensors(0), again)
    for name, expected in tuned().items():
        np.testing.assert_allclose(merged[name], expected, atol=0.1 if name in found.kept else 0)


def test_ranks_that_differ_stand_in_the_config(tmp_path: Path) -> None:
    updates = {
        f"{name}.weight": lora.LowRank(jnp.ones((4, rank)), jnp.ones((rank, 3)), (4, 3))
        for name, rank in {"a": 1, "b": 2, "c": 2}.items()
    }
    lora.save_lora(tmp_path / "adapter", lora.LoraAdapter(updates))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"a": 1}
    again = lora.load_lora(tmp_path / "adapter").updates
    assert {name: update.rank for name, update in again.items()} == {
        "a.weight": 1,
        "b.weight": 2,
        "c.weight": 2,
    }
    np.testing.assert_array_equal(again["a.weight"].dense(), np.ones((4, 3)))


@pytest.mark.parametrize(
    ("model", "base", "message"),
    [
        ({"w.weight": np.ones((3, 3))}, {"v.weight": np.ones((3, 3))}, r"no tensor 'w.weight'"),
        ({"w.weight": np.ones((3, 3))}, {"w.weight": np.ones((3, 4))}, r"shape \[3, 4\] as in"),
        ({"w.weight": np.ones((3, 3))}, {"w.weight": np.ones((3, 3))}, "equal to the base"),
        ({"w.bias": np.ones(3)}, {"w.bias": np.zeros(3)}, r"only w\.bias differ"),
        ({"w.weight": np.full((3, 3), np.inf)}, {"w.weight": np.ones((3, 3))}, "not finite"),
    ],
)
def test_models_that_do_not_fit_are_refused(model: dict, base: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        lora.extract_lora(model, base, rank=1)


def test_what_peft_cannot_load_is_not_written(tmp_path: Path) -> None:
    update = lora.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), (4, 3))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("mine")
    for folder, adapter, message in (
        ("full", lora.LoraAdapter({"a.weight": update}), "is not empty"),
        ("out", lora.LoraAdapter({"a": update}), r"'a': PEFT adapts the weights of modules"),
        ("out", lora.LoraAdapter({}), "changes nothing"),
        ("out", lora.LoraAdapter({"a.weight": update}, {}, {"a.weight": jnp.ones(4)}), "DoRA"),
    ):
        with pytest.raises(CheckpointError, match=message):
            lora.save_lora(tmp_path / folder, adapter)
    assert sorted(os.listdir(tmp_path)) == ["full"]


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    update = lora.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), (4, 3))
    lora.save_lora(tmp_path / "a", lora.LoraAdapter({"q.weight": update}))
    with pytest.raises(CheckpointError, match=r"'q.weight', which is not in the model"):
        lora.load_lora(tmp_path / "a", {"k.weight": (4, 3)})
    found = lora.load_lora(tmp_path / "a", {"layers.q.weight": (3, 4)}).updates
    assert found["layers.q.weight"].kind == "transposed"


# What peft makes of them -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("peft", reason="needs the `lora` extra")
    return pytest.importorskip("torch")


def network(torch: Any, seed: int, gpt2: bool = False) -> Any:
    """A module with an embedding, linear layers with and without bias, a convolution and a norm."""
    torch.manual_seed(seed)
    if gpt2:
        from transformers.pytorch_utils import Conv1D

        middle = {"c_fc": Conv1D(12, 8), "c_proj": Conv1D(8, 12)}
    else:
        middle = {"up": torch.nn.Linear(8, 12), "down": torch.nn.Linear(12, 8, bias=False)}
    parts = {"embed_tokens": torch.nn.Embedding(11, 8), **middle, "norm": torch.nn.LayerNorm(8)}
    parts["conv"] = torch.nn.Conv2d(2, 4, 3)
    return torch.nn.ModuleDict(parts)


def arrays_of(module: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.torch
@pytest.mark.parametrize("gpt2", [False, True])
def test_peft_merges_an_extracted_adapter_to_the_fine_tuned_model(
    torch: Any, tmp_path: Path, gpt2: bool
) -> None:
    from peft import PeftModel

    base, fine = network(torch, 0, gpt2), network(torch, 1, gpt2)
    config = {"model_type": "gpt2"} if gpt2 else {}
    for name, module in (("base", base), ("fine", fine)):
        save_checkpoint(tmp_path / name, arrays_of(module))
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = lora.extract_lora(tmp_path / "fine", tmp_path / "base", rank=12, whole=True)
    lora.save_lora(tmp_path / "adapter", found.adapter)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    wanted = arrays_of(fine)
    for name, tensor in arrays_of(merged).items():
        np.testing.assert_allclose(tensor, wanted[name], atol=1e-5, err_msg=name)


@pytest.mark.torch
def test_an_adapter_of_peft_is_applied_as_peft_applies_it(torch: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = network(torch, 0)
    arrays = {name: array.copy() for name, array in arrays_of(base).items()}
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["embed_tokens", "up", "conv"],
        use_rslora=True, init_lora_weights=False, modules_to_save=["norm"],
    )  # fmt: skip
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 10
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = lora.load_lora(tmp_path / "adapter", {n: a.shape for n, a in arrays.items()})
    found = lora.apply_lora(arrays, adapter)
    wanted = arrays_of(model.merge_and_unload())
    assert set(wanted) == set(found)
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-5, err_msg=name)
    # And written again it is the same adapter.
    lora.save_lora(tmp_path / "again", adapter)
    again = lora.load_lora(tmp_path / "again")
    for name, update in adapter.updates.items():
        np.testing.assert_allclose(again.updates[name].dense(), update.dense(), atol=1e-6)


@pytest.mark.torch
def test_a_sum_of_adapters_is_peft_s_concatenation(torch: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        network(torch, 0),
        LoraConfig(r=2, target_modules=["up"], init_lora_weights=False),
        adapter_name="one",
    )
    two = LoraConfig(r=3, lora_alpha=2, target_modules=["up"], init_lora_weights=False)
    model.add_adapter("two", two)
    model.add_weighted_adapter(["one", "two"], [0.3, 0.8], "sum", combination_type="cat")
    model.save_pretrained(tmp_path)
    loaded = {name: lora.load_lora(tmp_path / name) for name in ("one", "two", "sum")}
    found = lora.add_loras([loaded["one"], loaded["two"]], [0.3, 0.8])
    wanted = loaded["sum"].updates["up.weight"].dense()
    np.testing.assert_allclose(found.updates["up.weight"].dense(), wanted, atol=1e-5)
