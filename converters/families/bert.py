"""BERT, RoBERTa and what has their layouts (MiniLM, XLM-RoBERTa, CamemBERT), with the heads that checkpoints carry.

Which heads a checkpoint has is read off its tensors. A head that the tables do not know is an unexpected tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.family import Family
from jaxmerge.converters.families.hugging_face import (
    activation_of,
    activation_to,
    heads_of,
    require,
    require_config,
)
from jaxmerge.converters.families.layers import dense, embedding, norm
from jaxmerge.converters.families.rules import Rule, as_is
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.bert import Bert, BertConfig


def _has_heads(config: BertConfig) -> bool:
    return config.masked_lm or config.next_sentence or config.classifier is not None


def _encoder_rules(
    base: str, config: BertConfig, norm: Callable[[str, str], list[Rule]]
) -> list[Rule]:
    rules = [
        embedding(f"{base}embeddings.{kind}_embeddings", f"params/{path}_embedding")
        for kind, path in (("word", "token"), ("position", "position"), ("token_type", "type"))
    ]
    rules += norm(f"{base}embeddings.LayerNorm", "params/embedding_norm")
    layer, path = f"{base}encoder.layer.{{i}}", "params/layers_{i}"
    if config.num_layers:
        for part in ("query", "key", "value"):
            rules += dense(f"{layer}.attention.self.{part}", f"{path}/attention/{part}")
        rules += dense(f"{layer}.attention.output.dense", f"{path}/attention/output")
        rules += norm(f"{layer}.attention.output.LayerNorm", f"{path}/attention_norm")
        rules += dense(f"{layer}.intermediate.dense", f"{path}/feed_forward/up")
        rules += dense(f"{layer}.output.dense", f"{path}/feed_forward/down")
        rules += norm(f"{layer}.output.LayerNorm", f"{path}/feed_forward_norm")
    if config.pooler:
        rules += dense(f"{base}pooler.dense", "params/pooler")
    return rules


def _bert_rules(norm: Callable[[str, str], list[Rule]], config: BertConfig) -> list[Rule]:
    rules = _encoder_rules("bert." if _has_heads(config) else "", config, norm)
    if config.masked_lm:
        head = "cls.predictions"
        rules += dense(f"{head}.transform.dense", "params/masked_lm/dense")
        rules += norm(f"{head}.transform.LayerNorm", "params/masked_lm/norm")
        rules += _vocabulary(head, config)
    if config.next_sentence:
        rules += dense("cls.seq_relationship", "params/next_sentence")
    if config.classifier:
        rules += dense("classifier", "params/classifier")
    return rules


def _roberta_rules(config: BertConfig) -> list[Rule]:
    rules = _encoder_rules("roberta." if _has_heads(config) else "", config, norm)
    if config.masked_lm:
        rules += dense("lm_head.dense", "params/masked_lm/dense")
        rules += norm("lm_head.layer_norm", "params/masked_lm/norm")
        rules += _vocabulary("lm_head", config)
    if config.classifier == "hidden":
        rules += dense("classifier.dense", "params/classifier_hidden")
        rules += dense("classifier.out_proj", "params/classifier")
    elif config.classifier:
        rules += dense("classifier", "params/classifier")
    return rules


def _vocabulary(head: str, config: BertConfig) -> list[Rule]:
    if config.tied:
        return [Rule(f"{head}.bias", "params/masked_lm/bias", as_is())]
    return dense(f"{head}.decoder", "params/masked_lm/decoder")


def _aliases(base: str, head: str, config: BertConfig) -> dict[str, str]:
    if not (config.masked_lm and config.tied):
        return {}
    return {
        f"{head}.decoder.weight": f"{base}embeddings.word_embeddings.weight",
        f"{head}.decoder.bias": f"{head}.bias",
    }


def _buffers(head: str, config: BertConfig, names: Sequence[str]) -> dict[str, np.ndarray]:
    # transformers keeps a second bias beside that of an untied head, and does not use it.
    if not config.masked_lm or config.tied:
        return {}
    return {f"{head}.bias": np.zeros(config.vocab_size, np.float32)}


def _config_of(
    base: str, weight: str, json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> BertConfig:
    first = f"embeddings.LayerNorm.{weight}"
    if first not in tensors and base + first not in tensors:
        raise CheckpointError(f"no tensor {first!r}")
    require_config(json)
    require(json, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    is_roberta = base == "roberta."
    head = "lm_head." if is_roberta else "cls.predictions."
    pooler = any(f"{prefix}pooler.dense.weight" in tensors for prefix in ("", base))
    classifier, num_labels = _classifier(json, tensors, pooler)
    return BertConfig(
        vocab_size=json["vocab_size"],
        hidden_size=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=heads_of(json, "num_attention_heads", "hidden_size"),
        intermediate_size=json["intermediate_size"],
        max_positions=json["max_position_embeddings"],
        type_vocab_size=json.get("type_vocab_size", 2),
        activation=activation_of(json["hidden_act"]),
        norm_eps=json.get("layer_norm_eps", 1e-12),
        padding_id=_padding_id(json) if is_roberta else None,
        pooler=pooler,
        masked_lm=any(name.startswith(head) for name in tensors),
        tied=json.get("tie_word_embeddings", True),
        next_sentence="cls.seq_relationship.weight" in tensors,
        classifier=classifier,
        num_labels=num_labels,
    )


def _padding_id(json: Mapping[str, Any]) -> int:
    padding = json.get("pad_token_id", 1)
    if not isinstance(padding, int):
        raise CheckpointError(
            f"config.json: pad_token_id: expected the token from which positions count, found {padding!r}"
        )
    return padding


def _classifier(
    json: Mapping[str, Any], tensors: Mapping[str, TensorInfo], pooler: bool
) -> tuple[Literal["pooled", "hidden", "token"] | None, int]:
    if "classifier.out_proj.weight" in tensors:
        return "hidden", tensors["classifier.out_proj.weight"].shape[0]
    if "classifier.weight" not in tensors:
        return None, 0
    # Old classifiers of tokens have a pooler that they do not use.
    of_tokens = any("TokenClassification" in name for name in json.get("architectures") or ())
    labels = tensors["classifier.weight"].shape[0]
    return ("pooled" if pooler and not of_tokens else "token"), labels


def _config_to(kind: str, name: str, config: BertConfig) -> dict[str, Any]:
    labels = {"num_labels": config.num_labels} if config.classifier else {}
    padding = {} if config.padding_id is None else {"pad_token_id": config.padding_id}
    return {
        "model_type": kind,
        "architectures": [f"{name}{_task(config)}"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "hidden_act": activation_to(config.activation),
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **labels,
        **padding,
    }


def _task(config: BertConfig) -> str:
    if config.classifier:
        return (
            "ForTokenClassification"
            if config.classifier == "token"
            else "ForSequenceClassification"
        )
    if config.masked_lm:
        return "ForPreTraining" if config.next_sentence else "ForMaskedLM"
    return "Model"


def _inputs(config: BertConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, 1), jnp.int32)


def _bert(name: str, weight: str, bias: str) -> Family:
    return Family(
        name=name,
        config_type=BertConfig,
        module=Bert,
        inputs=_inputs,
        rules=partial(_bert_rules, partial(norm, weight=weight, bias=bias)),
        config_of=partial(_config_of, "bert.", weight),
        config_to=partial(_config_to, "bert", "Bert"),
        model_types=("bert",),
        prefixes=("bert.",),
        aliases=partial(_aliases, "bert.", "cls.predictions"),
        buffers=partial(_buffers, "cls.predictions"),
        ignored=("embeddings.position_ids", "bert.embeddings.position_ids"),
    )


BERT = _bert("bert", "weight", "bias")
# Checkpoints that came from TensorFlow, such as bert-base-uncased, name the norms' vectors as it does.
BERT_TENSORFLOW = _bert("bert_tensorflow", "gamma", "beta")

ROBERTA = Family(
    name="roberta",
    config_type=BertConfig,
    module=Bert,
    inputs=_inputs,
    rules=_roberta_rules,
    config_of=partial(_config_of, "roberta.", "weight"),
    config_to=partial(_config_to, "roberta", "Roberta"),
    model_types=("xlm-roberta", "camembert"),
    prefixes=("roberta.",),
    aliases=partial(_aliases, "roberta.", "lm_head"),
    buffers=partial(_buffers, "lm_head"),
    ignored=("embeddings.position_ids", "roberta.embeddings.position_ids"),
)
