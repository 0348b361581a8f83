"""Recipes as text: what is read, and what a broken one is told."""

import re
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmerge.recipes import source_map
from jaxmerge.recipes.errors import PlanError, RecipeError
from jaxmerge.recipes.reference import ModelReference, parse_reference
from jaxmerge.recipes.resolve import resolve
from jaxmerge.recipes.schema import dump, parse, read

GOOD = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: 0.5
      density: 1e-1
  - model: b
    parameters: {weight: 1}
parameters:
  normalize: true
  lambda: .7
dtype: torch.bfloat16
"""

TWO = "models: [{model: a}, {model: b}]\n"
STRICT_TIES = f"dialect: jaxmerge\nmerge_method: ties\nbase_model: c\n{TWO}"


DAMAGE = (
    *("", "- ", ": ", "{", "}", "[", "]", "&a ", "*a", "<<: ", "!!x ", "null", "~", "1e9", ".inf"),
    *("'", '"', "|\n", ">", "\t", "#", "%", "@", "? ", ",", "---\n", "yes", "=", "1:30", "\x85"),
)


def broken(name: str, text: str, line: int | None, *fragments: str) -> object:
    return pytest.param(textwrap.dedent(text), line, fragments, id=name)


BROKEN = [
    broken("empty", "", None, "the recipe is empty"),
    broken("list at the top", "- a\n", 1, "a recipe is a mapping, found a list"),
    broken("yaml syntax", "merge_method: linear\nmodels: [a\n", 3, "not valid YAML"),
    broken("tab", "merge_method:\n\tlinear\n", 2, "not valid YAML"),
    broken("control character", "merge_method: linear\nx: \x00\n", 2, "character", "not allowed"),
    broken("python tag", "models: !!python/object/apply:os.system [ls]\n", 1, "tag !!python"),
    broken("own tag", "merge_method: !secret linear\n", 1, "tag !secret is not allowed"),
    broken("set tag", "models: !!set {a}\n", 1, "tag !!set is not allowed"),
    broken(
        "key twice",
        "merge_method: linear\ndtype: float32\nmerge_method: ties\n",
        3,
        "given twice",
        "line 1",
    ),
    broken("alias in itself", "models: &m\n- *m\n", 1, "an alias contains itself"),
    broken("two documents", "merge_method: linear\n---\nname: b\n", 3, "second document"),
    broken("no models", "merge_method: linear\n", 1, "`models` is missing"),
    broken("no method", TWO, 1, "`merge_method` is missing"),
    broken(
        "empty model list", "merge_method: linear\nmodels: []\n", 2, "`models`: the list is empty"
    ),
    broken("models as mapping", "merge_method: linear\nmodels: {model: a}\n", 2, "expected a list"),
    broken("model as text", "merge_method: linear\nmodels:\n- a\n", 3, "with the key `model`"),
    broken(
        "model misspelt", "merge_method: linear\nmodels:\n- modle: a\n", 3, "'modle'", "'model'"
    ),
    broken(
        "model empty",
        "merge_method: linear\nmodels:\n- model:\n",
        3,
        "expected a path, found nothing",
    ),
    broken(
        "model a number",
        "merge_method: linear\nmodels:\n- model: 7\n",
        3,
        "expected a path, found 7",
    ),
    broken(
        "unknown key",
        f"merge_methd: linear\n{TWO}",
        1,
        "'merge_methd'; did you mean 'merge_method'?",
    ),
    broken(
        "parameter at top",
        f"merge_method: linear\nweight: 1\n{TWO}",
        2,
        "belongs under `parameters`",
    ),
    broken(
        "parameter beside model",
        "merge_method: linear\nmodels:\n- model: a\n  weight: 1\n",
        4,
        "belongs under `parameters`",
    ),
    broken(
        "unknown method",
        f"merge_method: tise\n{TWO}",
        1,
        "unknown method 'tise'; did you mean 'ties'?",
    ),
    broken(
        "unknown dialect",
        f"merge_method: linear\ndialect: mergekt\n{TWO}",
        2,
        "did you mean 'mergekit'?",
    ),
    broken(
        "unknown dtype",
        f"merge_method: linear\n{TWO}dtype: bfloat\n",
        3,
        "did you mean 'bfloat16'?",
    ),
    broken(
        "integer dtype",
        f"merge_method: linear\n{TWO}out_dtype: int64\n",
        3,
        "unknown dtype 'int64'",
    ),
    broken("slices", "merge_method: linear\nslices: [{}]\n", 2, "`slices[0].sources` is missing"),
    broken(
        "modules", "merge_method: linear\nmodules: {a: b}\n", 2, "expected a mapping", "found text"
    ),
    broken(
        "models and slices",
        f"merge_method: linear\n{TWO}slices: [{{sources: [{{model: a, layer_range: [0, 1]}}]}}]\n",
        3,
        "exactly one of `models`, `slices`, `modules`",
    ),
    broken(
        "two tokenizers",
        f"merge_method: linear\n{TWO}tokenizer_source: union\ntokenizer: {{source: base}}\n",
        3,
        "not both",
    ),
    broken(
        "tokenizer misspelt",
        f"merge_method: linear\n{TWO}tokenizer:\n  sorce: base\n",
        4,
        "did you mean 'source'?",
    ),
    broken(
        "half a token",
        f"merge_method: linear\n{TWO}tokenizer:\n  tokens:\n"
        "    x: {source: {kind: model_token, model: a}}\n",
        5,
        "takes `model` and one of `token` and `token_id`",
    ),
    broken(
        "chat template",
        f"merge_method: linear\n{TWO}chat_template: chatmll\n",
        3,
        "did you mean 'chatml'?",
    ),
    broken(
        "two adapters",
        "merge_method: linear\nmodels:\n- model: a+b+c\n",
        3,
        "at most one adapter",
    ),
    broken(
        "filter",
        f"""\
        merge_method: linear
        {TWO.strip()}
        parameters:
          weight:
          - {{filtr: mlp, value: 1}}
          - value: 2
        """,
        4,
        "`parameters.weight`: unknown key 'filtr'",
    ),
    broken(
        "gradient",
        f"merge_method: linear\n{TWO}parameters:\n  weight: [0, one]\n",
        4,
        "'one' is not a number",
    ),
    broken(
        "gradient of a model",
        "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: []\n",
        5,
        "the list is empty",
    ),
    broken(
        "unknown parameter",
        "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    wieght: 1\n",
        5,
        "linear has no parameter 'wieght'; did you mean 'weight'?",
    ),
    broken(
        "text for a number",
        f"merge_method: linear\n{TWO}parameters: {{weight: half}}\n",
        3,
        "not a number",
    ),
    broken(
        "no value", f"merge_method: linear\n{TWO}parameters:\n  weight:\n", 4, "no value is given"
    ),
    broken(
        "nan", f"merge_method: linear\n{TWO}parameters:\n  weight: .nan\n", 4, "not a finite number"
    ),
    broken(
        "infinity", f"merge_method: linear\n{TWO}parameters:\n  weight: -.inf\n", 4, "not a finite"
    ),
    broken(
        "overflow", f"merge_method: linear\n{TWO}parameters:\n  weight: 1e400\n", 4, "not a finite"
    ),
    broken(
        "density above 1",
        f"merge_method: ties\nbase_model: c\n{TWO}parameters:\n  weight: 1\n  density: 1.5\n",
        6,
        "'density' must lie in [0, 1], found 1.5",
    ),
    broken(
        "density of a model below 0",
        """\
        merge_method: ties
        base_model: c
        models:
        - model: a
          parameters:
            weight: 1
            density: -0.1
        """,
        7,
        "'density' must lie in [0, 1], found -0.1",
    ),
    broken(
        "half a flag",
        f"merge_method: linear\n{TWO}parameters: {{weight: 1, normalize: 0.5}}\n",
        3,
        "'normalize' is a flag",
    ),
    broken(
        "shared parameter of a model",
        "merge_method: slerp\nbase_model: c\nmodels:\n- model: a\n  parameters: {t: 0.5}\n",
        5,
        "'t' is shared by all models",
    ),
    broken(
        "weight missing",
        f"merge_method: linear\n{TWO}",
        2,
        "linear needs 'weight' for 'a'",
        "for 'b'",
    ),
    broken(
        "weight missing for one",
        "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1}\n- model: b\n",
        5,
        "linear needs 'weight' for 'b'",
    ),
    broken(
        "t missing",
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n",
        1,
        "slerp needs 't'",
    ),
    broken(
        "base missing",
        f"merge_method: ties\n{TWO}parameters: {{weight: 1}}\n",
        1,
        "ties needs `base_model`",
    ),
    broken(
        "slerp without base",
        f"merge_method: slerp\n{TWO}parameters: {{t: 0.5}}\n",
        1,
        "slerp needs `base_model`",
    ),
    broken(
        "slerp of three",
        f"merge_method: slerp\nbase_model: c\n{TWO}parameters: {{t: 0.5}}\n",
        3,
        "slerp takes 2 models, the base counted; found 3",
    ),
    broken(
        "only the base",
        "merge_method: ties\nbase_model: c\nmodels: [{model: c}]\n",
        3,
        "at least 1 model beside the base; found 0",
    ),
    broken(
        "linear with a base that has no weight",
        """\
        merge_method: linear
        base_model: c
        models:
        - model: a
          parameters: {weight: 1}
        """,
        2,
        "linear needs 'weight' for 'c'",
    ),
    broken(
        "options in the dialect",
        f"merge_method: linear\n{TWO}options: {{scope: tensor}}\n",
        3,
        "dialect: jaxmerge",
    ),
    broken(
        "library's name in the dialect",
        f"merge_method: ties\nbase_model: c\n{TWO}parameters: {{weight: 1, scale: 2}}\n",
        4,
        "mergekit calls 'scale' 'lambda'",
    ),
    broken(
        "unknown option",
        f"{STRICT_TIES}options:\n  scpe: tensor\n",
        6,
        "ties has no option 'scpe'; did you mean 'scope'?",
    ),
    broken(
        "wrong option",
        f"{STRICT_TIES}options:\n  scope: row\n",
        6,
        "option scope must be one of",
    ),
    broken(
        "too long a list",
        f"dialect: jaxmerge\nmerge_method: linear\n{TWO}parameters:\n  weight: [1, 2, 3]\n",
        5,
        "'weight' lists 3 values for 2 models",
    ),
    broken(
        "list of a shared one",
        f"dialect: jaxmerge\nmerge_method: linear\n{TWO}parameters:\n  normalize: [1, 0]\n",
        5,
        "'normalize' is one number shared by all models, found a list of 2",
    ),
    broken(
        "list of one model",
        "merge_method: linear\ndialect: jaxmerge\nmodels:\n- model: a\n"
        "  parameters: {weight: [1]}\n",
        5,
        "one model is one number",
    ),
    broken(
        "out of bounds in a list",
        f"{STRICT_TIES}parameters:\n  density: [0.5, 2]\n",
        6,
        "'density' must lie in [0, 1], found 2",
    ),
    broken(
        "both names",
        f"{STRICT_TIES}parameters: {{scale: 1, lambda: 1}}\n",
        5,
        "one parameter",
    ),
]


@pytest.mark.parametrize(("text", "line", "fragments"), BROKEN)
def test_broken_recipe_is_told_what_and_where(
    text: str, line: int | None, fragments: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(parse(text, filename="soup.yaml"))
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert caught.value.line == line
    assert caught.value.filename == "soup.yaml"
    assert str(caught.value).startswith("soup.yaml: " if line is None else f"soup.yaml:{line}: ")


def test_good_recipe_is_read_with_its_lines() -> None:
    recipe = parse(GOOD)
    assert recipe.merge_method == "ties"
    assert recipe.base_model == ModelReference("base")
    assert [str(source.model) for source in recipe.models] == ["a", "b"]
    # YAML 1.1 reads 1e-1 as text.
    assert recipe.models[0].parameters == {"weight": 0.5, "density": 0.1}
    assert recipe.parameters == {"normalize": 1.0, "lambda": 0.7}
    assert recipe.dtype == "bfloat16"
    assert recipe.line("models", 0, "parameters", "density") == 7
    assert recipe.line("models", 1) == 8
    assert recipe.line("models", 1, "parameters", "weight") == 9
    assert recipe.line("dtype") == 13


def test_all_problems_are_told_at_once_in_the_order_of_lines() -> None:
    text = "merge_method: linear\nmodels:\n- modle: a\n- model: 3\ndtype: f8\nslices: [1]\n"
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert [problem.line for problem in caught.value.problems] == [3, 4, 5, 6, 6]


def test_keys_without_effect_are_noted() -> None:
    recipe = parse(
        f"int8_mask: true\nmerge_method: linear\n{TWO}parameters: {{int8_mask: 1, weight: 1}}\n"
    )
    assert recipe.parameters == {"weight": 1.0}
    assert recipe.notes == (
        "<recipe>:1: `int8_mask` has no effect on the result",
        "<recipe>:4: `int8_mask` has no effect on the result",
    )


def test_empty_optional_keys_are_as_if_absent() -> None:
    recipe = parse(
        f"merge_method: linear\nbase_model:\nparameters:\ndtype: null\ntokenizer: null\n{TWO}"
    )
    assert recipe.base_model is None
    assert recipe.parameters == {}


def test_aliases_and_merge_keys_are_followed() -> None:
    text = """\
    merge_method: linear
    models:
    - model: a
      parameters: &common
        weight: 2
    - model: b
      parameters:
        <<: *common
    - model: c
      parameters: {<<: *common, weight: 3}
    """
    recipe = parse(textwrap.dedent(text))
    assert [source.parameters["weight"] for source in recipe.models] == [2.0, 2.0, 3.0]
    assert recipe.line("models", 1, "parameters", "weight") == 5


def test_growth_by_aliases_is_bounded() -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
    )
    with pytest.raises(RecipeError, match="values once aliases are followed"):
        parse(laughs)


@pytest.mark.parametrize("depth", [70, 5000])
def test_depth_is_bounded(depth: int) -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse("a: " + "[" * depth + "]" * depth)


def test_size_is_bounded() -> None:
    with pytest.raises(RecipeError, match="a recipe has at most"):
        parse("#" * 1_000_001)


def test_scalars_keep_their_types() -> None:
    data, _ = source_map.load("a: 1\nb: 1.5\nc: yes\nd: ~\ne: 2024-01-01\nf: '1'\n1: x\n")
    assert data == {"a": 1, "b": 1.5, "c": True, "d": None, "e": "2024-01-01", "f": "1", "1": "x"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("experts/a", ModelReference("experts/a")),
        ("a.pt#model.state_dict", ModelReference("a.pt", "model.state_dict")),
        ({"model": "a"}, ModelReference("a")),
        ({"model": {"path": "a", "revision": None}, "lora": None}, ModelReference("a")),
    ],
)
def test_reference_forms(value: object, expected: ModelReference) -> None:
    assert parse_reference(value) == expected


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        ("", "the path is empty"),
        ("a@b@c", "cannot read 'a@b@c'"),
        ("a+", "nothing stands beside"),
        ("a#", "expected a key"),
        ("a+b+c", "at most one adapter"),
        ({"model": "a", "lora": {"pth": "b"}}, "unknown key 'pth'"),
        ({"path": "a"}, "unknown key 'path'"),
        ({"model": {"file": "a"}}, "unknown key 'file'"),
        ({"model": "a", "override_architecture": "x"}, "unknown key 'override_architecture'"),
    ],
)
def test_unreadable_references(value: object, fragment: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fragment)):
        parse_reference(value)


def test_an_existing_path_wins_over_signs_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a+b@c#d"
    folder.mkdir()
    assert parse_reference(str(folder)) == ModelReference(str(folder))


def test_one_model_spelt_in_two_ways_is_the_same() -> None:
    assert ModelReference("./a/").same(ModelReference("a"))
    assert not ModelReference("a", "x").same(ModelReference("a"))
    assert not ModelReference("a").same(None)


def test_paths_are_looked_for_in_the_working_directory_then_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, beside = tmp_path / "work", tmp_path / "beside"
    (work / "both").mkdir(parents=True)
    (beside / "both").mkdir(parents=True)
    (beside / "only").mkdir()
    monkeypatch.chdir(work)
    assert ModelReference("both").locate(beside).samefile(work / "both")
    assert ModelReference("only").locate(beside) == beside / "only"
    with pytest.raises(FileNotFoundError) as caught:
        ModelReference("onyl").locate(beside)
    assert str(work) in str(caught.value)
    assert str(beside) in str(caught.value)
    assert "did you mean" in str(caught.value)


def test_read_remembers_the_file(tmp_path: Path) -> None:
    path = tmp_path / "soup.yaml"
    path.write_text(GOOD)
    recipe = read(path)
    assert recipe.folder == tmp_path
    assert recipe.filename == str(path)


def test_read_of_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "soup.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"no such file; did you mean .*soup.yaml"):
        read(tmp_path / "soup.yml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read(tmp_path / "bytes")


def test_a_dumped_recipe_is_read_back_equal() -> None:
    strict = STRICT_TIES + "parameters: {weight: [1.0e-5, 2]}\noptions: {scope: tensor}\n"
    for text in (
        GOOD,
        strict,
        "merge_method: linear\nmodels: [{model: 'x y#k'}]\nout_dtype: float16",
    ):
        recipe = parse(text)
        assert parse(dump(recipe)).model_dump() == recipe.model_dump()


@given(st.integers(0, len(GOOD)), st.integers(0, 9), st.sampled_from(DAMAGE))
def test_a_damaged_recipe_is_read_or_refused_never_worse(at: int, cut: int, put: str) -> None:
    with suppress(RecipeError):
        resolve(parse(GOOD[:at] + put + GOOD[at + cut :]))


def test_long_lists_of_problems_are_cut() -> None:
    error = PlanError([f"problem {i}" for i in range(100)])
    assert len(error.problems) == 100
    assert str(error).endswith("... and 60 more")
