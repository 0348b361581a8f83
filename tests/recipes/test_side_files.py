"""What goes with a merged model beside its weights, and whether transformers loads the whole."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint, open_checkpoint, save_checkpoint
from jaxmerge.recipes import make_plan, parse, run
from jaxmerge.recipes.side_files import side_files

LINEAR = """
merge_method: linear
models:
- {model: a, parameters: {weight: 0.5}}
- {model: b, parameters: {weight: 0.5}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(2)
    for name in "ab":
        tensors = {"w": rng.normal(size=(4, 4)).astype("f4"), "steps": np.array([1])}
        save_checkpoint(name, tensors, metadata={"format": "pt"})
    return tmp_path


def write(name: str, text: str = "text") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def merge(text: str, out: str = "out") -> None:
    run(make_plan(parse(text), out=out))


def test_every_file_but_weights_is_copied_and_none_is_run(folder: Path) -> None:
    copied = ["tokenizer.json", "generation_config.json", "modeling.py", "1_Pooling/config.json"]
    for name in copied:
        write(f"a/{name}", f"of {name}")
    for name in ("pytorch_model.bin", "training_args.bin", "model.gguf", ".git/HEAD", "x.onnx"):
        write(f"a/{name}")
    write("secret", "elsewhere")
    os.symlink(folder / "secret", "a/linked.txt")
    os.symlink(folder / "b", "a/other", target_is_directory=True)
    merge(LINEAR)
    found = {str(name) for name in side_files(Path("out"))}
    assert found == {*copied, "linked.txt"}
    for name in copied:
        assert Path("out", name).read_text() == f"of {name}"
    assert not Path("out/linked.txt").is_symlink()


def test_an_output_within_the_donors_folder_is_not_copied_into_itself(folder: Path) -> None:
    write("a/tokenizer.json")
    merge(LINEAR, "a/merged/here")
    found = {str(name) for name in side_files(Path("a/merged/here"))}
    assert found == {"tokenizer.json"}


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({"a": 1}, "", {"a": 1}),
        ({"a": 1}, "dtype: bfloat16", {"a": 1, "torch_dtype": "bfloat16"}),
        ({"dtype": "float16"}, "dtype: bfloat16", {"dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, "out_dtype: float16", {"torch_dtype": "float16"}),
        ({"dtype": "bfloat16"}, "", {"dtype": "float32"}),
        (
            {"torch_dtype": "float32", "text_config": {"dtype": "float32", "n": None}},
            "dtype: bfloat16",
            {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": None}},
        ),
    ],
)
def test_the_config_says_the_dtype_of_the_weights(
    folder: Path, config: Any, dtype: str, expected: Any
) -> None:
    write("a/config.json", json.dumps(config))
    merge(LINEAR + dtype)
    assert json.loads(Path("out/config.json").read_text()) == expected


def test_the_card_does_not_replace_a_copied_one(folder: Path) -> None:
    merge(LINEAR, "first")
    card = Path("first/README.md").read_text()
    assert card.startswith("---\nbase_model:\n- a\n- b\ntags:\n- jaxmerge\n- merge\n---\n# first\n")
    assert "merge_method: linear" in card
    write("a/README.md", "mine")
    merge(LINEAR, "second")
    assert Path("second/README.md").read_text() == "mine"
    assert "# second" in Path("second/README-merge.md").read_text()


def test_the_card_of_an_earlier_merge_is_not_that_of_the_next(folder: Path) -> None:
    merge(LINEAR, "first")
    merge(LINEAR.replace("model: a", "model: first"), "second")
    assert "# second" in Path("second/README.md").read_text()
    assert not Path("second/README-merge.md").exists()


@pytest.mark.torch
def test_transformers_loads_shards_in_the_dtype_asked_for_and_tied(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        model.generation_config.eos_token_id = 7
        model.save_pretrained(f"llama-{name}")
    text = LINEAR.replace("model: a", "model: llama-a").replace("model: b", "model: llama-b")
    run(make_plan(parse(text + "dtype: bfloat16"), out="out"), shard_size=2000)
    assert len(list(Path("out").glob("*.safetensors"))) > 2
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert loaded.generation_config.eos_token_id == 7
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = (load_checkpoint(f"llama-{which}")[name] for which in "ab")
    written = loaded.state_dict()[name].float().numpy()
    np.testing.assert_allclose(written, (a + b) / 2, rtol=1e-2, atol=1e-4)


def test_tied_tensors_in_different_shards_stay_tied(folder: Path) -> None:
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        tied, other = (rng.normal(size=(8, 4)).astype("f4") for _ in range(2))
        save_checkpoint(f"tied-{name}", {"embed": tied, "between": other, "head": tied})
    text = LINEAR.replace("model: a", "model: tied-a").replace("model: b", "model: tied-b")
    run(make_plan(parse(text), out="out"), shard_size=130)
    assert len(list(Path("out").glob("*.safetensors"))) == 3
    with open_checkpoint("out") as checkpoint:
        assert checkpoint.ties == [("embed", "head")]
    merged = load_checkpoint("out")
    assert merged["embed"] is merged["head"]
