"""BERT and RoBERTa: the functions of transformers' models, and exact round trips."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretrained import assert_pretrained, transformers

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
