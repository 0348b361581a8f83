"""PEFT adapter folders: factors paired and scaled as peft does it; broken and hostile ones refused."""

import json
import re

import numpy as np
import pytest

from jaxmerge.converters import CheckpointError, open_checkpoint, save_checkpoint
from jaxmerge.converters.peft_adapter import (
    delta,
    find_target,
    fit,
    is_peft_adapter,
    read_peft_adapter,
)

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def write_adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config})
    (folder / "adapter_config.json").write_text(text)
    rng = np.random.default_rng(0)
    filled = {
        name: rng.standard_normal(value).astype(np.float32) if isinstance(value, tuple) else value
        for name, value in tensors.items()
    }
    save_checkpoint(folder / "adapter_model.safetensors", filled)
    return filled


def factors(module=LAYER, rank=2, inputs=5, outputs=3):
    return {
        f"{module}.lora_A.weight": (rank, inputs),
        f"{module}.lora_B.weight": (outputs, rank),
    }


def test_factors_are_paired_by_the_tensor_that_they_change(tmp_path):
    written = write_adapter(tmp_path / "a", factors())
    adapter = read_peft_adapter(tmp_path / "a")
    update = adapter.updates["model.layers.0.self_attn.q_proj.weight"]
    a, b = written[update.a], written[update.b]
    assert update.shape == (3, 5)
    np.testing.assert_allclose(delta(update, a, b), 4.0 * (b @ a), rtol=1e-6)
    np.testing.assert_array_equal(
        delta(update, a, b, np.array([2, 0])), delta(update, a, b)[[2, 0]]
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"use_rslora": True}, 8 / np.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 3}}, 1.5),
        ({"alpha_pattern": {"_proj": 3}}, 4.0),
        ({"alpha_pattern": {r"layers\.[0-3]\..*q_proj": 6, "q_proj": 3}}, 3.0),
        ({"r": 16, "rank_pattern": {"self_attn.q_proj": 2}}, 4.0),
    ],
)
def test_the_scale_follows_the_patterns_of_the_config(tmp_path, config, expected):
    write_adapter(tmp_path / "a", factors(), **config)
    (update,) = read_peft_adapter(tmp_path / "a").updates.values()
    assert update.scale == pytest.approx(expected)


def test_convolutions_and_layers_stored_the_other_way_round(tmp_path):
    conv, dense = "base_model.model.conv", "base_model.model.c_attn"
    tensors = {
        f"{conv}.lora_A.weight": (2, 4, 3, 3),
        f"{conv}.lora_B.weight": (5, 2, 1, 1),
        **factors(dense),
    }
    written = write_adapter(tmp_path / "a", tensors)
    adapter = read_peft_adapter(tmp_path / "a")
    update = adapter.updates["conv.weight"]
    a, b = written[update.a], written[update.b]
    expected = 4.0 * np.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    np.testing.assert_allclose(delta(update, a, b), expected, rtol=1e-5, atol=1e-5)
    turned = fit(adapter.updates["c_attn.weight"], (5, 3), where="adapter")
    a, b = written[turned.a], written[turned.b]
    np.testing.assert_allclose(delta(turned, a, b), 4.0 * (b @ a).T, rtol=1e-6)
    with pytest.raises(
        CheckpointError, match=r"\[3, 5\], but 'c_attn.weight' of the model has \[4"
    ):
        fit(adapter.updates["c_attn.weight"], (4, 4), where="adapter")


def test_whole_modules_replace_tensors(tmp_path):
    tensors = {
        **factors(),
        f"{LAYER}.base_layer.bias": (3,),
        "base_model.model.lm_head.weight": (7, 5),
        "base_model.model.score.modules_to_save.weight": (2, 5),
    }
    write_adapter(tmp_path / "a", tensors)
    assert read_peft_adapter(tmp_path / "a").replaced == {
        "model.layers.0.self_attn.q_proj.bias": f"{LAYER}.base_layer.bias",
        "lm_head.weight": "base_model.model.lm_head.weight",
        "score.weight": "base_model.model.score.modules_to_save.weight",
    }


def test_a_target_is_found_under_another_prefix():
    names = ["model.layers.0.q.weight", "other.layers.0.q.weight"]
    assert find_target("model.layers.0.q.weight", names) == names[0]
    assert find_target("layers.0.q.weight", names) is None
    assert find_target("base.model.layers.0.q.weight", names) == names[0]


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({f"{LAYER}.lora_A.weight": (2, 5)}, {}, "has no partner lora_B"),
        (factors(rank=3), {}, "rank 2 by adapter_config.json: expected A [2, in]"),
        (factors() | {f"{LAYER}.lora_A.x.weight": (2, 5)}, {}, "one part of one module"),
        (factors() | {f"{LAYER}.oft_r.weight": (2, 2)} | {"lora_x": (1,)}, {}, "no part of a LoRA"),
        (factors(), {"peft_type": "LOHA"}, "expected peft_type 'LORA', found 'LOHA'"),
        (factors(), {"use_qalora": True}, "'use_qalora' pools the inputs"),
        (factors(), {"layer_replication": [[0, 1]]}, "'layer_replication' repeats layers"),
        (factors(), {"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
        (factors(), {"use_dora": True}, "has no lora_magnitude_vector"),
        (factors(), {"r": 0}, "'r': expected a positive number, 0"),
        (factors(), {"alpha_pattern": {"(a+)+x": 2}}, "too complex"),
        (factors(), {"alpha_pattern": {"(": 2}}, "cannot be read"),
        (factors(), {"lora_alpha": "many"}, "'lora_alpha': expected a positive number"),
    ],
)
def test_adapters_that_cannot_be_applied_are_refused(tmp_path, tensors, config, message):
    write_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_peft_adapter(tmp_path / "a")


def test_folders_that_hold_no_adapter_are_refused(tmp_path):
    assert not is_peft_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        read_peft_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    assert is_peft_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_peft_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, found neither"):
        read_peft_adapter(tmp_path)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=["embedding", "patterns", "dora"],
)
def test_updates_equal_those_that_peft_merges(tmp_path, options):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **options))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path)
    expected = tuned.merge_and_unload().state_dict()
    adapter = read_peft_adapter(tmp_path)
    with open_checkpoint(adapter.weights) as checkpoint:
        for name, value in before.items():
            if name in adapter.replaced:
                value = checkpoint.read(adapter.replaced[name])
            if name in adapter.updates:
                update = fit(adapter.updates[name], value.shape, where="adapter")
                value = value + delta(update, checkpoint.read(update.a), checkpoint.read(update.b))
                if update.magnitude is not None:
                    norms = np.linalg.norm(value, axis=1)
                    value = value * (checkpoint.read(update.magnitude) / norms)[:, None]
            np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-6, err_msg=name)
