"""BERT and RoBERTa: the functions of transformers' models, and exact round trips."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_round_trip, random_checkpoint, random_params
from pretrained import assert_pretrained, transformers

from jaxmerge.converters import (
    CheckpointError,
    ModelConfig,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from jaxmerge.models import Bert, BertConfig, pool

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 14,
}
IDS = np.random.default_rng(0).integers(3, 30, (3, 9))
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
PADDED = np.where(MASK == 1, IDS, 1)
INPUTS = {"input_ids": PADDED, "attention_mask": MASK, "token_type_ids": PADDED % 2}


def hidden(output: Any) -> Any:
    return output.last_hidden_state


def logits(output: Any) -> Any:
    return output.logits


@pytest.mark.torch
@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("BertModel", {}, {"pooler": True}),
        ("BertModel", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, {"pooler": True}),
        ("BertForMaskedLM", {"hidden_act": "relu"}, {"masked_lm": True}),
        ("BertForMaskedLM", {"tie_word_embeddings": False}, {"masked_lm": True, "tied": False}),
        (
            "BertForSequenceClassification",
            {"num_labels": 5},
            {"pooler": True, "classifier": "pooled", "num_labels": 5},
        ),
        (
            "BertForTokenClassification",
            {"num_labels": 3},
            {"classifier": "token", "num_labels": 3},
        ),
        ("RobertaModel", {}, {"pooler": True, "padding_id": 1}),
        ("RobertaForMaskedLM", {"hidden_act": "relu"}, {"masked_lm": True}),
        (
            "RobertaForSequenceClassification",
            {"num_labels": 3, "pad_token_id": 2},
            {"classifier": "hidden", "num_labels": 3, "padding_id": 2},
        ),
        ("XLMRobertaForTokenClassification", {}, {"classifier": "token", "num_labels": 2}),
    ],
)
def test_transformers_computes_the_same(
    tmp_path: Path, architecture: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    library = transformers()
    kind = getattr(library, architecture)
    model = kind(kind.config_class(**SIZES, **options))
    output = hidden if architecture.endswith("Model") else logits
    config = assert_pretrained(model, INPUTS, output, tmp_path)
    for name, value in expected.items():
        assert getattr(config.model, name) == value


@pytest.mark.torch
def test_a_pretraining_checkpoint_from_tensorflow_is_read(tmp_path: Path) -> None:
    """As bert-base-uncased is: the norms' vectors under TensorFlow's names, tied names and position ids beside."""
    library = transformers()
    model = library.BertForPreTraining(library.BertConfig(**SIZES))
    config = assert_pretrained(model, INPUTS, lambda output: output.prediction_logits, tmp_path)
    assert config.model.next_sentence
    tensors = load_checkpoint(tmp_path / "source")
    renamed = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in tensors.items()
    }
    head, table = "cls.predictions", "bert.embeddings.word_embeddings.weight"
    renamed[f"{head}.decoder.weight"] = tensors[table]
    renamed["bert.embeddings.position_ids"] = np.arange(14)[None]
    old, new = tmp_path / "old", tmp_path / "new"
    save_checkpoint(old, renamed)
    text = json.loads((tmp_path / "source/config.json").read_text())
    (old / "config.json").write_text(json.dumps(text))
    _, params, config = load_model(old)
    assert config.family == "bert_tensorflow"
    assert config.aliases == {f"{head}.decoder.weight": table}
    save_model(new, params, config)
    assert set(load_checkpoint(new)) == set(renamed) - {"bert.embeddings.position_ids"}
    written = library.BertForMaskedLM.from_pretrained(new)
    assert np.array_equal(
        written.bert.embeddings.LayerNorm.weight.detach(),
        renamed["bert.embeddings.LayerNorm.gamma"],
    )


@pytest.mark.torch
def test_a_model_that_was_made_in_jax_loads_in_transformers(tmp_path: Path) -> None:
    library = transformers()
    for number, (family, architecture, heads) in enumerate(
        [
            ("bert", "BertModel", {"pooler": True}),
            ("bert", "BertForMaskedLM", {"masked_lm": True, "activation": "gelu_tanh"}),
            (
                "roberta",
                "RobertaForSequenceClassification",
                {"classifier": "hidden", "num_labels": 3},
            ),
        ]
    ):
        padding = 1 if family == "roberta" else None
        flax = BertConfig(30, 8, 1, 2, 16, 14, padding_id=padding, **heads)
        params = random_params(Bert(flax), IDS)
        folder = tmp_path / str(number)
        save_model(folder, params, ModelConfig(family, flax))
        kind = getattr(library, architecture)
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        if heads.get("num_labels"):
            assert model.config.num_labels == 3
        assert load_model(folder)[2].model == flax


def test_an_encoder_without_heads_may_keep_its_prefix(tmp_path: Path) -> None:
    flax = BertConfig(30, 8, 1, 2, 16, 14, pooler=True)
    bare = random_checkpoint("bert", flax)
    tensors = {f"bert.{name}": tensor for name, tensor in bare.items()}
    save_checkpoint(tmp_path / "in", tensors)
    text = {**SIZES, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "hidden_act": "gelu", "model_type": "bert"}
    (tmp_path / "in/config.json").write_text(json.dumps(text))
    _, params, config = load_model(tmp_path / "in")
    assert (config.prefix, config.model) == ("bert.", flax)
    save_model(tmp_path / "out", params, config)
    assert set(load_checkpoint(tmp_path / "out")) == set(tensors)


@settings(max_examples=15)
@given(
    family=st.sampled_from(["bert", "bert_tensorflow", "roberta"]),
    layers=st.integers(0, 2),
    heads=st.integers(1, 3),
    head_size=st.integers(1, 3),
    inside=st.integers(1, 5),
    tokens=st.integers(1, 7),
    pooler=st.booleans(),
    head=st.sampled_from(["none", "masked_lm", "untied", "next_sentence", "sequence", "token"]),
)
def test_round_trips_are_exact(
    family: str,
    layers: int,
    heads: int,
    head_size: int,
    inside: int,
    tokens: int,
    pooler: bool,
    head: str,
) -> None:
    roberta, of_labels = family == "roberta", head in ("sequence", "token")
    classifier: Any = "token" if head == "token" else "hidden" if roberta else "pooled"
    model = BertConfig(
        vocab_size=tokens,
        hidden_size=heads * head_size,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inside,
        max_positions=9,
        padding_id=1 if roberta else None,
        pooler=pooler or head in ("next_sentence", "sequence"),
        masked_lm=head in ("masked_lm", "untied", "next_sentence"),
        tied=head != "untied",
        next_sentence=head == "next_sentence" and not roberta,
        classifier=classifier if of_labels else None,
        num_labels=tokens if of_labels else 0,
    )
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip(family, model, Path(folder))


def test_padding_changes_no_other_position() -> None:
    for padding in (None, 1):
        flax = BertConfig(30, 8, 2, 2, 16, 14, padding_id=padding)
        ids = np.concatenate([IDS[:1], np.full((1, 3), 1)], axis=1)
        params = random_params(Bert(flax), ids)
        alone = jax.jit(Bert(flax).apply)(params, IDS[:1])
        padded = jax.jit(Bert(flax).apply)(params, {"input_ids": ids, "attention_mask": ids != 1})
        np.testing.assert_allclose(padded[:, :9], alone, atol=1e-6)


def test_bfloat16_computes_near_float32() -> None:
    flax = BertConfig(30, 16, 2, 4, 24, 14, masked_lm=True)
    params = random_params(Bert(flax), IDS)
    half = Bert(BertConfig(30, 16, 2, 4, 24, 14, masked_lm=True, dtype="bfloat16"))
    found = jax.jit(half.apply)(params, IDS)
    assert found.dtype == "bfloat16"
    np.testing.assert_allclose(
        found.astype("float32"), jax.jit(Bert(flax).apply)(params, IDS), atol=0.1, rtol=0.05
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.zeros((1, 15), int)}, "15 tokens, but the model has positions for 14"),
        ({"ids": IDS}, "input 'input_ids' is missing: found 'ids'"),
        (
            {"input_ids": IDS, "attention": MASK},
            "'attention' is unknown; did you mean 'attention_mask'",
        ),
    ],
)
def test_inputs_that_do_not_fit_say_so(inputs: Any, message: str) -> None:
    flax = BertConfig(30, 8, 1, 2, 16, 14)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Bert(flax).init, jax.random.key(0), inputs)


CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"hidden_act": "geglu"}, {}, "hidden_act 'geglu' is not supported. Nearest: 'gelu'"),
    ({"hidden_act": None}, {}, "hidden_act None is not supported"),
    (
        {"position_embedding_type": "relative_key"},
        {},
        "position_embedding_type 'relative_key' is not supported, only 'absolute'",
    ),
    ({"is_decoder": True}, {}, "is_decoder True is not supported, only False"),
    ({"num_attention_heads": 3}, {}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
    ({"hidden_size": None}, {}, "config.json cannot be read: KeyError: 'hidden_size'"),
    ({"vocab_size": 31}, {}, r"word_embeddings.weight' expected \[31, 8\], found \[30, 8\]"),
    (
        {},
        {"encoder.layer.0.attention.self.query.bias": None},
        "missing 'encoder.layer.0.attention.self.query.bias'",
    ),
    ({}, {"qa_outputs.weight": np.zeros((2, 8), "f4")}, "unexpected 'qa_outputs.weight'"),
]


@pytest.mark.parametrize(("fields", "tensors", "message"), CHANGES)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    flax = BertConfig(30, 8, 1, 2, 16, 14, pooler=True)
    changed = {**random_checkpoint("bert", flax), **tensors}
    save_checkpoint(tmp_path, {name: one for name, one in changed.items() if one is not None})
    text = {**SIZES, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "hidden_act": "gelu", "model_type": "bert"} | fields
    kept = {key: value for key, value in text.items() if value is not None or key == "hidden_act"}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, family="bert")


def test_without_a_config_the_error_says_what_is_needed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_checkpoint("bert", BertConfig(30, 8, 1, 2, 16, 14)))
    with pytest.raises(CheckpointError, match=r"  bert, .*: needs config.json"):
        load_model(tmp_path)


def test_tied_names_with_other_values_are_refused(tmp_path: Path) -> None:
    flax = BertConfig(30, 8, 1, 2, 16, 14, masked_lm=True)
    tensors = dict(random_checkpoint("bert", flax))
    tensors["cls.predictions.decoder.weight"] = np.ones((30, 8), "f4")
    save_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"'cls.predictions.decoder.weight' tied to"):
        load_model(tmp_path, family="bert", config=flax)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling_follows_the_formulas(mode: Any) -> None:
    states = np.random.default_rng(1).normal(size=(3, 9, 5))
    empty = np.zeros((1, 9), int)
    masks = np.concatenate([MASK[:2], empty])
    expected = np.zeros((3, 5))
    for i, mask in enumerate(masks):
        kept = states[i][mask == 1]
        if mode == "cls":
            expected[i] = states[i, 0]
        elif len(kept):
            expected[i] = kept.mean(0) if mode == "mean" else kept.max(0)
    hidden = jnp.asarray(states, jnp.float32)
    found = pool(hidden, jnp.asarray(masks), mode=mode, normalize=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    norms = np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    found = pool(hidden, jnp.asarray(masks), mode=mode)
    np.testing.assert_allclose(found, expected / norms, atol=1e-6)
    assert pool(hidden.astype("bfloat16"), mode=mode).dtype == "bfloat16"


def test_pooling_refuses_other_modes_and_masks() -> None:
    with pytest.raises(ValueError, match="expected 'mean', 'cls' or 'max', found 'median'"):
        pool(jnp.ones((1, 2, 3)), mode="median")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"attention_mask: expected shape \(1, 2\), found \(1, 3\)"
    ):
        pool(jnp.ones((1, 2, 3)), jnp.ones((1, 3)))
