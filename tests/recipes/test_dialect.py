"""What a recipe means in each dialect."""

import textwrap

import pytest

from jaxmerge import methods
from jaxmerge.recipes.dialect import MERGEKIT
from jaxmerge.recipes.resolve import Resolved, resolve
from jaxmerge.recipes.schema import parse

VECTORS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def resolved(text: str) -> Resolved:
    return resolve(parse(textwrap.dedent(text)))


def names(result: Resolved) -> list[str]:
    return [str(model) for model in result.models]


def test_dialect_covers_mergekits_twenty_methods() -> None:
    assert len(MERGEKIT) == 20


@pytest.mark.parametrize("name", sorted(set(MERGEKIT) & set(methods.names())))
def test_dialect_options_fit_the_registry(name: str) -> None:
    method = methods.get(name)(**MERGEKIT[name].options)
    assert method.name == name


@pytest.mark.parametrize(
    ("name", "options", "hyperparameters"),
    [
        ("task_arithmetic", {}, {"scale": 1.0, "normalize": 0.0}),
        (
            "ties",
            {"scope": "tensor", "divisor": "signed", "minimum": 1},
            {"density": 1.0, "scale": 1.0, "normalize": 1.0, "rescale": 0.0},
        ),
        (
            "dare_linear",
            {"rescale_norm": "l1"},
            {"density": 1.0, "scale": 1.0, "normalize": 0.0, "rescale": 1.0},
        ),
        (
            "dare_ties",
            {"rescale_norm": "l1", "divisor": "signed"},
            {"density": 1.0, "scale": 1.0, "normalize": 0.0, "rescale": 1.0},
        ),
    ],
)
def test_mergekit_defaults(name: str, options: dict, hyperparameters: dict) -> None:
    result = resolved(
        f"merge_method: {name}\nbase_model: c\nmodels: [{{model: a}}]\nparameters: {{weight: 0.3}}"
    )
    assert result.options == options
    assert result.hyperparameters == {"weight": 0.3, **hyperparameters}
    assert str(result.base) == str(result.donor) == "c"


@pytest.mark.parametrize("name", VECTORS)
def test_library_defaults_are_the_registrys(name: str) -> None:
    result = resolved(
        f"dialect: jaxmerge\nmerge_method: {name}\nbase_model: c\nmodels: [{{model: a}}]"
    )
    method = methods.get(name)()
    assert result.method is method
    assert result.hyperparameters == {key: spec.default for key, spec in method.hyperparams.items()}


def test_numbers_keep_double_precision() -> None:
    result = resolved("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 0.1}")
    assert result.hyperparameters["weight"] == 0.1
    assert isinstance(result.hyperparameters["weight"], float)


def test_a_models_value_wins_over_the_global_one() -> None:
    result = resolved(
        """\
        merge_method: ties
        base_model: c
        models:
        - model: a
        - {model: b, parameters: {weight: 0.25, density: 0.5}}
        parameters: {weight: 2, lambda: 3}
        """
    )
    assert result.hyperparameters["weight"] == [2.0, 0.25]
    assert result.hyperparameters["density"] == [1.0, 0.5]
    assert result.hyperparameters["scale"] == 3.0


def test_a_global_value_stays_one_number() -> None:
    result = resolved(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}"
    )
    assert result.hyperparameters == {"weight": 1.0, "normalize": 1.0}


@pytest.mark.parametrize("name", VECTORS)
def test_the_base_among_the_models_is_no_task_vector(name: str) -> None:
    result = resolved(
        f"""\
        merge_method: {name}
        base_model: base
        models:
        - model: ./base
        - {{model: a, parameters: {{weight: 1}}}}
        """
    )
    assert names(result) == ["a"]
    assert result.hyperparameters["weight"] == [1.0]
    assert result.notes == (
        "<recipe>:4: the base is listed among the models and is not merged as one",
    )


def test_parameters_of_the_base_among_the_models_are_noted() -> None:
    result = resolved(
        """\
        merge_method: ties
        base_model: c
        models:
        - {model: a, parameters: {weight: 1}}
        - {model: c, parameters: {weight: 9}}
        """
    )
    assert result.hyperparameters["weight"] == [1.0]
    assert "its parameters have no effect" in result.notes[0]


@pytest.mark.parametrize(
    "models", ["[{model: a}, {model: b}]", "[{model: b}, {model: a}]", "[{model: b}]"]
)
def test_slerp_starts_at_the_base_wherever_it_is_listed(models: str) -> None:
    result = resolved(
        f"merge_method: slerp\nbase_model: a\nmodels: {models}\nparameters: {{t: 0.25}}"
    )
    assert (str(result.base), names(result)) == ("a", ["b"])
    assert result.hyperparameters == {"t": 0.25}


def test_linear_merges_a_listed_base_with_its_own_weight() -> None:
    result = resolved(
        """\
        merge_method: linear
        base_model: c
        models:
        - {model: c, parameters: {weight: 1}}
        - {model: a, parameters: {weight: 3}}
        """
    )
    assert names(result) == ["c", "a"]
    assert result.hyperparameters["weight"] == [1.0, 3.0]
    assert str(result.donor) == "c"


def test_linear_merges_an_unlisted_base_with_the_global_weight() -> None:
    result = resolved(
        """\
        merge_method: linear
        base_model: c
        models:
        - {model: a, parameters: {weight: 3}}
        parameters: {weight: 2}
        """
    )
    assert names(result) == ["a", "c"]
    assert result.hyperparameters["weight"] == [3.0, 2.0]
    assert result.notes == ("<recipe>:2: linear merges the base as one more model",)


def test_parameters_that_only_other_methods_have_are_noted() -> None:
    result = resolved(
        """\
        merge_method: task_arithmetic
        base_model: c
        models:
        - {model: a, parameters: {weight: 1, density: 0.5}}
        parameters: {epsilon: 0.1}
        """
    )
    assert result.notes == (
        "<recipe>:5: 'epsilon' has no effect on task_arithmetic",
        "<recipe>:4: 'density' has no effect on task_arithmetic",
    )


def test_a_model_may_be_listed_twice() -> None:
    result = resolved(
        "merge_method: linear\nmodels: [{model: a}, {model: a}]\nparameters: {weight: 1}"
    )
    assert names(result) == ["a", "a"]
    assert result.notes == ("<recipe>:2: 'a' is merged more than once; mergekit refuses that",)


def test_half_precision_arithmetic_of_mergekit_is_noted() -> None:
    result = resolved(
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n"
        "dtype: float16\nout_dtype: float32"
    )
    assert (result.dtype, result.out_dtype, result.written_dtype) == (
        "float16",
        "float32",
        "float32",
    )
    assert "float32 arithmetic" in result.notes[0]


def test_jaxmerge_lists_are_one_value_per_model() -> None:
    result = resolved(
        """\
        dialect: jaxmerge
        merge_method: ties
        base_model: c
        models: [{model: a}, {model: b, parameters: {weight: 9}}]
        parameters: {weight: [0.5, 0.7], lambda: 2}
        options: {scope: tensor}
        """
    )
    assert result.hyperparameters["weight"] == [0.5, 9.0]
    assert result.hyperparameters["density"] == methods.ties().hyperparams["density"].default
    assert result.hyperparameters["scale"] == 2.0
    assert result.options["scope"] == "tensor"


def test_jaxmerge_linear_does_not_use_the_base() -> None:
    result = resolved(
        "dialect: jaxmerge\nmerge_method: linear\nbase_model: c\nmodels: [{model: a}]"
    )
    assert (names(result), str(result.donor)) == (["a"], "c")
    assert result.notes == ("<recipe>:3: linear does not use the base",)


def test_a_method_that_mergekit_lacks_is_the_librarys() -> None:
    name = "dialect_test_method"

    def constructor() -> methods.MergeMethod:
        return methods.linear()

    constructor.__name__ = name
    methods.register(constructor)
    try:
        result = resolved(f"merge_method: {name}\nmodels: [{{model: a}}]")
        assert result.hyperparameters["weight"] == 1.0
        assert f"mergekit has no method {name!r}" in result.notes[0]
    finally:
        methods.registry._CONSTRUCTORS.pop(name)


def test_what_decides_the_result_is_plain_data() -> None:
    result = resolved(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}\n"
        "dtype: float32"
    )
    assert result.to_dict() == {
        "dialect": "mergekit",
        "method": "slerp",
        "options": {"zero_norm": "arc"},
        "models": ["b"],
        "base": "a",
        "hyperparameters": {"t": 0.5},
        "dtype": "float32",
    }
