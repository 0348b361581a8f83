"""Merges of models with different vocabularies: rows of embeddings and heads, tokenizer files, config."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint, open_checkpoint, save_checkpoint
from jaxmerge.recipes import PlanError, make_plan, parse, run
from jaxmerge.recipes.inputs import read_whole

EMBEDDING, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.up.weight"
TOKENS = {"a": "sxyz", "b": "sywx!", "c": "swzq"}
UNION = ["s", "x", "y", "z", "w", "!", "q"]
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def write_model(folder, tokens, seed, *, dtype=np.float32, tied=False, spare=0, **config):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    rows = len(tokens) + spare
    shapes = {EMBEDDING: (rows, 3), LAYER: (5, 3), HEAD: (rows, 3)}
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    if tied:
        tensors[HEAD] = tensors[EMBEDDING]
    save_checkpoint(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, **config}))
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    return tensors


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bos = {"a": 0, "b": 0, "c": 0}
    return {
        name: write_model(tmp_path / name, tokens, i, bos_token_id=bos[name], eos_token_id=[0, 2])
        for i, (name, tokens) in enumerate(TOKENS.items())
    }


def recipe(*lines, base="a", names="abc", method="linear", dtype=None):
    text = [f"merge_method: {method}", f"base_model: {base}", "models:"]
    text += [f"- {{model: {name}, parameters: {{weight: {WEIGHTS[name]}}}}}" for name in names]
    text += [*([f"dtype: {dtype}"] if dtype else []), *lines]
    return parse("\n".join(text), filename="r.yaml")


def opened(plan):
    return [open_checkpoint(source.path, key=source.key) for source in plan.sources]


def inputs_of(plan, name):
    """Returns what a tensor is merged from, by the models' names."""
    (tensor,) = (tensor for tensor in plan.tensors if tensor.name == name)
    checkpoints = opened(plan)
    return {
        plan.sources[one.source].name: read_whole(checkpoints, plan, one) for one in tensor.models
    }


def expected_rows(models, name, tokens, donors):
    """Rows by tokens: a model's own, else the row that `donors` names."""
    tables = {}
    for model in models:
        rows = []
        for token in tokens:
            owners = [model] if token in TOKENS[model] else donors[token]
            rows.append(
                np.mean([models[o][name][TOKENS[o].index(token)] for o in owners], axis=0)
                if owners
                else np.zeros(3)
            )
        tables[model] = np.stack(rows)
    return tables


# Missing rows: from the only owner, from the base a, or the mean.
DONORS = {"x": "a", "y": "a", "z": "a", "w": "bc", "!": "b", "q": "c"}


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_union_takes_missing_rows_from_other_models(models, name):
    plan = make_plan(recipe("tokenizer_source: union"))
    found = inputs_of(plan, name)
    expected = expected_rows(models, name, UNION, DONORS)
    for model in models:
        np.testing.assert_allclose(found[model], expected[model], rtol=1e-6, err_msg=model)
    np.testing.assert_array_equal(inputs_of(plan, LAYER)["b"], models["b"][LAYER])


def test_rows_beyond_the_tokens_are_the_mean_of_all(models):
    plan = make_plan(recipe("tokenizer: {source: union, pad_to_multiple_of: 8}"))
    rows = inputs_of(plan, EMBEDDING)["b"]
    assert rows.shape == (8, 3)
    assert (
        "the output has 7 tokens and 1 more rows: 3 missing in a, 2 missing in b, 3 missing in c"
        in plan.notes
    )
    np.testing.assert_allclose(rows[7], rows[:7].mean(axis=0), rtol=1e-5)
    assert plan.config["vocab_size"] == 8


def test_the_merged_model_has_its_tokenizer_and_its_config(models, tmp_path):
    plan = make_plan(
        recipe("tokenizer_source: union", "chat_template: chatml"), out=tmp_path / "out"
    )
    run(plan)
    merged = load_checkpoint(tmp_path / "out")
    rows = expected_rows(models, HEAD, UNION, DONORS)
    expected = sum(WEIGHTS[model] * rows[model] for model in models)
    np.testing.assert_allclose(merged[HEAD], expected, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"]) == (7, 0)
    document = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [entry["content"] for entry in document["added_tokens"]] == UNION[4:]
    assert "im_start" in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_another_models_tokenizer_moves_the_ids_of_the_config(models, tmp_path):
    (tmp_path / "b" / "special_tokens_map.json").write_text("{}")
    (tmp_path / "a" / "added_tokens.json").write_text("{}")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 5}')
    write_model(tmp_path / "only", "qxs", 9)
    (tmp_path / "only" / "model.safetensors").unlink()
    plan = make_plan(recipe("tokenizer_source: b"), out=tmp_path / "out")
    run(plan)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "special_tokens_map.json" in names
    assert "added_tokens.json" not in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (5, 0, [0, 1])
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 1, "top_k": 5}
    assert any("config.json: eos_token_id follow their tokens" in note for note in plan.notes)
    plan = make_plan(recipe("tokenizer_source: only"))
    rows = expected_rows(models, EMBEDDING, "qxs", {**DONORS, "s": "a"})
    np.testing.assert_allclose(inputs_of(plan, EMBEDDING)["c"], rows["c"], rtol=1e-6)
    assert plan.config["eos_token_id"] == [2, 2]


def test_tied_tables_stay_tied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, (name, tokens) in enumerate(TOKENS.items()):
        write_model(tmp_path / name, tokens, i, tied=True)
    run(make_plan(recipe("tokenizer_source: union"), out=tmp_path / "out"))
    merged = load_checkpoint(tmp_path / "out")
    assert merged[EMBEDDING].shape == (7, 3)
    assert merged[HEAD] is merged[EMBEDDING]


def test_averages_of_half_precision_are_kept_in_float32(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {
        name: write_model(tmp_path / name, tokens, i, dtype=ml_dtypes.bfloat16)
        for i, (name, tokens) in enumerate(TOKENS.items())
    }
    plan = make_plan(recipe("tokenizer_source: union"))
    found = inputs_of(plan, EMBEDDING)["a"]
    assert found.dtype == np.float32
    w = [models["b"][EMBEDDING][2], models["c"][EMBEDDING][1]]
    np.testing.assert_array_equal(found[4], np.mean(np.float32(w), axis=0))
    assert {tensor.dtype for tensor in plan.tensors} == {"bfloat16"}
    assert make_plan(recipe("tokenizer_source: base")).tensors[0].models[0].dtype == "bfloat16"


def test_the_fingerprint_tells_vocabularies_apart(models, tmp_path):
    plans = [make_plan(recipe("tokenizer_source: union"))]
    document = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {"y": 2, "w": 1}
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(document))
    plans.append(make_plan(recipe("tokenizer_source: union")))
    assert plans[0].fingerprint != plans[1].fingerprint


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "the vocabularies differ: say in the recipe which one the output gets"),
        (
            ("tokenizer: {tokens: {z: {source: b}}}",),
            "r.yaml:7: token 'z': its source b does not have it",
        ),
        (
            ("tokenizer: {tokens: {z: {source: other}}}",),
            "token 'z': its source other is none of the recipe's models",
        ),
        (
            ("tokenizer: {tokens: {z: {source: {kind: model_token, model: b, token: k}}}}",),
            "its source b has no token 'k'",
        ),
        (("tokenizer_source: nowhere",), "nowhere"),
        (("tokenizer_source: unoin",), "r.yaml:7: no file or folder 'unoin'"),
        (("tokenizer_source: unoin",), "; did you mean 'union'?"),
    ],
)
def test_what_cannot_be_done_is_found_before_any_work(models, lines, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(recipe(*lines))


def test_broken_tokenizers_are_found_before_any_work(models, tmp_path):
    (tmp_path / "b" / "tokenizer.json").write_text("[")
    with pytest.raises(PlanError, match=r"r.yaml:7: .*b.tokenizer.json: not valid JSON"):
        make_plan(recipe("tokenizer_source: union"))


def test_models_without_an_embedding_have_no_vocabulary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_model(tmp_path / name, TOKENS[name], 0)
        (tmp_path / name / "config.json").unlink()
        save_checkpoint(tmp_path / name / "model.safetensors", {"w": np.ones((4, 4), np.float32)})
    with pytest.raises(PlanError, match="its vocabulary is not known: no config"):
        make_plan(recipe("tokenizer_source: union", names="ab"))
