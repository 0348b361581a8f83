"""The output's vocabulary: its tokens and ids, each model's rows for them, its files."""

import json
import re

import pytest

from jaxmerge.converters import CheckpointError
from jaxmerge.recipes.tokenizers import (
    TokenRule,
    VocabularyModel,
    chosen_template,
    plan_vocabulary,
    read_tokenizer,
    rows_for,
    tokenizer_files,
)
from jaxmerge.recipes.tokenizers.chat_templates import NAMED


def added(content, place, **flags):
    fields = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": place, "content": content, **fields, **flags}


def bpe(tokens, merges=(), extra=()):
    model = {
        "type": "BPE",
        "vocab": {t: i for i, t in enumerate(tokens)},
        "merges": list(merges),
    }
    return {"version": "1.0", "added_tokens": list(extra), "pre_tokenizer": None, "model": model}


def write(folder, document=None, **files):
    folder.mkdir(exist_ok=True)
    for name, data in {"tokenizer": document, **files}.items():
        if data is not None:
            (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def models(tmp_path):
    """Three tokenizers over single letters; rows: one more than tokens in the second."""
    a = write(tmp_path / "a", bpe("sxyz", extra=[added("s", 0, special=True)]))
    b = write(tmp_path / "b", bpe("sywx", extra=[added("!", 4, special=True)]))
    c = write(tmp_path / "c", bpe("swzq"), tokenizer_config={"pad_token": "!"})
    sizes = {"a": 4, "b": 6, "c": 5}
    return [VocabularyModel(x.name, str(x), sizes[x.name]) for x in (a, b, c)]


def row_of(vocabulary, token, present=(0, 1, 2), base=0):
    """Returns for each model what a token's row is: (model, row), pairs that are averaged, or None."""
    place = vocabulary.tokens.index(token)
    found = []
    for rows in rows_for(vocabulary, present, base).values():
        if place in rows.averages:
            found.append(rows.averages[place])
        else:
            table = int(rows.table[place])
            found.append(None if table < 0 else (table, int(rows.row[place])))
    return found


def test_a_union_keeps_the_bases_ids_and_appends_what_the_others_have(models):
    vocabulary = plan_vocabulary(models, "union", base=True)
    assert vocabulary.tokens == ("s", "x", "y", "z", "w", "q", "!")
    assert [p.tolist() for p in vocabulary.places] == [
        [0, 1, 2, 3, -1, -1, -1],
        [0, 3, 1, -1, 2, -1, 4],
        [0, -1, -1, 2, 1, 3, 4],
    ]
    assert vocabulary.changed
    assert {t.content for t in vocabulary.tokenizer.table.added.values() if t.special} == {"s", "!"}


def test_the_base_or_another_model_gives_its_tokens_as_they_are(models):
    vocabulary = plan_vocabulary(models, "base", base=True)
    assert vocabulary.tokens == ("s", "x", "y", "z")
    assert vocabulary.size == 4
    assert not vocabulary.changed
    vocabulary = plan_vocabulary(models, models[1].folder, base=True)
    assert vocabulary.tokens == ("s", "y", "w", "x", "!")
    assert not vocabulary.changed


def test_a_missing_row_is_the_only_owners_the_bases_or_the_mean(models):
    vocabulary = plan_vocabulary(models, "union", base=True)
    assert row_of(vocabulary, "q") == [(2, 3)] * 3
    assert row_of(vocabulary, "x") == [(0, 1), (1, 3), (0, 1)]
    assert row_of(vocabulary, "w") == [((1, 2), (2, 1)), (1, 2), (2, 1)]
    assert row_of(vocabulary, "x", base=None)[2] == ((0, 1), (1, 3))
    assert row_of(vocabulary, "x", present=(0, 2)) == [(0, 1), (0, 1)]
    assert row_of(vocabulary, "w", present=(0,)) == [None]


def test_rules_of_single_tokens(models):
    rules = {
        "x": TokenRule("model", 1),
        "y": TokenRule("model", 1, force=True),
        "z": TokenRule("zero", force=True),
        "w": TokenRule("model_token", 1, token="!"),
        "new": TokenRule("model_token", 2, token_id=3),
        "nothing": TokenRule(),
    }
    vocabulary = plan_vocabulary(models, "union", base=True, rules=rules, pad_to_multiple_of=8)
    assert vocabulary.tokens[-2:] == ("new", "nothing")
    assert (vocabulary.size, vocabulary.padding) == (16, 7)
    assert row_of(vocabulary, "x") == [(0, 1), (1, 3), (1, 3)]
    assert row_of(vocabulary, "y") == [(1, 1)] * 3
    assert row_of(vocabulary, "z") == [None] * 3
    assert row_of(vocabulary, "w") == [(1, 4), (1, 2), (2, 1)]
    assert row_of(vocabulary, "new") == [(2, 3)] * 3
    assert row_of(vocabulary, "nothing") == [None] * 3


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (TokenRule("model", 1), "token 'z': its source b does not have it"),
        (TokenRule("model_token", 1, token="k"), "its source b has no token 'k'"),
        (TokenRule("model_token", 1, token_id=6), "b has 6 rows and no row 6"),
        (TokenRule(force=True), "`force` needs a `source`"),
    ],
)
def test_rules_that_cannot_be_kept(models, rule, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        plan_vocabulary(models, "union", base=True, rules={"z": rule})


def test_tokens_beyond_the_rows_of_their_model_are_left_out(models, tmp_path):
    merges = ["x y", ["y", "z"]]
    document = bpe(["x", "y", "z", "xy", "yz"], merges, [added("!", 5), added("x", 0)])
    cut = VocabularyModel("cut", str(write(tmp_path / "cut", document)), 4)
    vocabulary = plan_vocabulary([cut, models[0]], "base", base=True)
    assert vocabulary.tokens == ("x", "y", "z", "xy")
    assert vocabulary.changed
    assert vocabulary.tokenizer.document["model"]["merges"] == ["x y"]
    vocabulary = plan_vocabulary([models[0], cut], cut.folder, base=True)
    assert vocabulary.tokens == ("x", "y", "z", "xy", "yz", "!")
    assert vocabulary.places[1].tolist() == [0, 1, 2, 3, -1, -1]
    assert "cut: 2 tokens ('yz', '!') have ids beyond its 4 rows" in vocabulary.notes[0]


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(models, tmp_path):
    (tmp_path / "bare").mkdir()
    bare = VocabularyModel("bare", str(tmp_path / "bare"), 4)
    vocabulary = plan_vocabulary([models[0], bare], "union", base=True)
    assert vocabulary.places[1].tolist() == [0, 1, 2, 3]
    assert vocabulary.notes == ("bare has no tokenizer: a's is taken to be its own",)
    with pytest.raises(CheckpointError, match="no tokenizer: expected"):
        plan_vocabulary([bare, models[0]], "union", base=True)


def test_ids_that_no_token_has_keep_the_rows_of_the_model_that_gives_the_tokenizer(
    tmp_path, models
):
    document = bpe(()) | {"model": {"type": "BPE", "vocab": {"x": 0, "y": 3}, "merges": []}}
    holed = VocabularyModel("holed", str(write(tmp_path / "holed", document)), 4)
    vocabulary = plan_vocabulary([holed, models[0]], "base", base=True)
    assert vocabulary.tokens == ("x", None, None, "y")
    rows = rows_for(vocabulary, (0, 1), 0)[1]
    assert rows.table.tolist() == [1, 0, 0, 1]
    assert rows.row.tolist() == [1, 1, 2, 2]


def test_older_formats(tmp_path):
    gpt = write(tmp_path / "gpt", vocab={"a": 0, "b": 1}, added_tokens={"<x>": 2})
    assert read_tokenizer(gpt).table.vocabulary() == {"a": 0, "b": 1, "<x>": 2}
    bert = write(tmp_path / "bert", special_tokens_map={"unk_token": "[U]", "pad_token": "[P]"})
    (bert / "vocab.txt").write_text("[U]\na\n##b\n")
    table = read_tokenizer(bert).table
    assert table.vocabulary() == {"[U]": 0, "a": 1, "##b": 2, "[P]": 3}
    assert table.added[0].special
    pieces = b"".join(b"\x0a" + bytes([len(p) + 7]) + piece(p) for p in (b"<s>", b"\xe2\x96\x81a"))
    llama = write(tmp_path / "llama")
    (llama / "tokenizer.model").write_bytes(pieces + b"\x12\x02\x08\x01")
    assert read_tokenizer(llama).table.vocabulary() == {"<s>": 0, "▁a": 1}
    (llama / "tokenizer.model").write_bytes(pieces[:-3])
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        read_tokenizer(llama)


def test_tokens_that_classes_of_transformers_have_are_there(tmp_path):
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": None, "eos_token": "z"}
    llama = write(tmp_path / "llama", bpe("xz"), tokenizer_config=config)
    assert list(read_tokenizer(llama).table.vocabulary()) == ["x", "z", "<unk>"]
    byte_level = bpe("xz") | {"decoder": {"type": "ByteLevel"}}
    llama = write(tmp_path / "llama", byte_level, tokenizer_config=config)
    assert list(read_tokenizer(llama).table.vocabulary()) == ["x", "z"]
    qwen = write(tmp_path / "qwen", bpe("x"), config={"model_type": "qwen2"})
    assert list(read_tokenizer(qwen).table.vocabulary()) == ["x", "<|endoftext|>"]


def piece(text):
    """A piece's text, its score, and no more."""
    return b"\x0a" + bytes([len(text)]) + text + b"\x15" + bytes(4)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "expected a mapping, found list"),
        ({"model": {}}, "expected a model with a 'vocab'"),
        (bpe("ab") | {"model": {"vocab": {"a": -1}}}, "token 'a' has id -1"),
        (bpe("ab") | {"model": {"vocab": {"a": 1 << 40}}}, "token 'a' has id 1099511627776"),
        (bpe("ab") | {"model": {"vocab": {"a": 0, "b": 0}}}, "id 0 belongs to 'b' and another"),
        (bpe("ab") | {"added_tokens": [{"id": 2}]}, "expected a token with its content"),
        (bpe("ab", extra=[{"id": "z", "content": "z"}]), "an added token has id 'z'"),
    ],
)
def test_broken_tokenizers_are_refused(tmp_path, document, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_tokenizer(write(tmp_path / "bad", document))


def test_files_hold_what_was_added(models, tmp_path):
    base = models[0].folder
    config = {"added_tokens_decoder": {"0": added("s", 0, special=True)}, "chat_template": "old"}
    write(tmp_path / "a", tokenizer_config=config, added_tokens={})
    (tmp_path / "a" / "merges.txt").write_text("x y")
    vocabulary = plan_vocabulary(models, "union", base=True)
    files = tokenizer_files(base, vocabulary.tokenizer, "new {{ messages }}")
    entries = json.loads(files.written["tokenizer.json"])["added_tokens"]
    assert [(e["id"], e["content"], e["special"]) for e in entries] == [
        (0, "s", True),
        (4, "w", False),
        (5, "q", False),
        (6, "!", True),
    ]
    config = json.loads(files.written["tokenizer_config.json"])
    assert list(config["added_tokens_decoder"]) == ["0", "4", "5", "6"]
    assert config["chat_template"] == files.written["chat_template.jinja"] == "new {{ messages }}"
    assert json.loads(files.written["added_tokens.json"]) == {"w": 4, "q": 5, "!": 6}
    assert list(files.copied) == ["merges.txt"]
    assert tokenizer_files(base).written == {}


def test_the_template_of_most_models_is_taken(models, tmp_path):
    folders = [model.folder for model in models]
    assert chosen_template("auto", folders) is None
    write(tmp_path / "a", chat_template={"chat_template": "one {{ x }}"})
    write(
        tmp_path / "b", tokenizer_config={"chat_template": [{"name": "default", "template": "two"}]}
    )
    (tmp_path / "c" / "chat_template.jinja").write_text("two\n")
    assert chosen_template("auto", folders) == "two"
    assert chosen_template("auto", folders[:2]) == "one {{ x }}"
    assert chosen_template("chatml", folders) == NAMED["chatml"]
    assert chosen_template("{{ own }}", folders) == "{{ own }}"


def rendered(name, messages, **options):
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(NAMED[name])
    return template.render(messages=messages, bos_token="<s>", eos_token="</s>", **options)


TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>",
        ),
        ("mistral", "<s> [INST] Be kind.\n\nHi [/INST] Hello</s>"),
        (
            "exaone",
            "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n",
        ),
    ],
)
def test_named_templates(name, expected):
    assert rendered(name, TALK) == expected


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_transformers_loads_the_union_with_the_same_ids(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    texts = {"a": "the cat sat on the mat and the dog ran", "b": "numbers one two three four five"}
    for name, text in texts.items():
        special = ["<unk>", "<s>"] if name == "a" else ["<unk>", "<s>", "<|b|>"]
        trained = {
            "bpe": (tokenizers.models.BPE(unk_token="<unk>"), "BpeTrainer", {}),
            "unigram": (tokenizers.models.Unigram(), "UnigramTrainer", {"unk_token": "<unk>"}),
            "wordpiece": (tokenizers.models.WordPiece(unk_token="<unk>"), "WordPieceTrainer", {}),
        }
        model, trainer, options = trained[kind]
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = getattr(tokenizers.trainers, trainer)(
            vocab_size=40, special_tokens=special, show_progress=False, **options
        )
        tokenizer.train_from_iterator([text] * 3, trainer)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", pad_token=f"<pad{name}>"
        )
        fast.save_pretrained(tmp_path / name)
        assert read_tokenizer(tmp_path / name).table.vocabulary() == fast.get_vocab()
    models = [VocabularyModel(name, str(tmp_path / name), 100) for name in texts]
    vocabulary = plan_vocabulary(models, "union", base=True)
    files = tokenizer_files(models[0].folder, vocabulary.tokenizer)
    (tmp_path / "out").mkdir()
    for name, text in files.written.items():
        (tmp_path / "out" / name).write_text(text)
    for name, path in files.copied.items():
        (tmp_path / "out" / name).write_bytes(path.read_bytes())
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == {t: i for i, t in enumerate(vocabulary.tokens)}
    tokens = loaded.convert_ids_to_tokens(loaded("cat <|b|>")["input_ids"])
    assert "<|b|>" in tokens
