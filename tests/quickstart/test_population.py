"""The population: what is sampled, what is best, and that each candidate is what it says."""

from typing import Any

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.data import split_digits
from jaxmerge.quickstart import evaluate
from jaxmerge.quickstart.network import LAYOUT, to_checkpoint
from jaxmerge.quickstart.population import METHODS, Population, search_population
from jaxmerge.quickstart.recipes import default_recipe, exact_recipe, fitting_methods
from jaxmerge.quickstart.training import Sources, train_sources
from jaxmerge.recipes import dump, parse, resolve


@pytest.fixture(scope="module")
def sources() -> Sources:
    return train_sources(split_digits().train, seed=1, base_steps=30, expert_steps=20)


@pytest.fixture(scope="module")
def population(sources: Sources) -> Population:
    return search_population(sources, split_digits().validation, candidates=40, seed=7)


def test_the_first_candidates_are_the_methods_at_their_defaults(population: Population) -> None:
    assert population.methods[: len(METHODS)] == METHODS
    for name, given in zip(METHODS, population.hyperparams, strict=False):
        for key, spec in jm.methods.get(name)().hyperparams.items():
            assert np.all(np.float32(given[key]) == np.float32(spec.default))


def test_sampled_numbers_lie_in_the_search_ranges_and_are_short(population: Population) -> None:
    for name, given in list(zip(population.methods, population.hyperparams, strict=True))[5:]:
        specs = jm.methods.get(name)().hyperparams
        assert set(given) == set(specs)
        for key, value in given.items():
            low, high = specs[key].search or (specs[key].low, specs[key].high)
            values = np.asarray(value)
            assert values.shape == ((3,) if specs[key].scope == "model" else ())
            assert np.all((values >= low) & (values <= high))
            assert np.all(values * 128 == np.round(values * 128))


def test_every_candidate_scores_as_it_does_merged_alone(
    sources: Sources, population: Population
) -> None:
    one_image = 1.01 / len(split_digits().validation.labels)
    # One of each method beyond the defaults.
    for index in range(len(METHODS), 2 * len(METHODS)):
        merged = jm.merge(
            population.methods[index],
            sources.experts,
            base=sources.base,
            layout=LAYOUT,
            key=jax.random.key(7),
            **population.hyperparams[index],
        )
        alone = float(evaluate(to_checkpoint(merged)))
        assert alone == pytest.approx(float(population.accuracy[index]), abs=one_image)


def test_the_best_has_the_highest_accuracy_then_the_least_loss() -> None:
    accuracy = np.array([0.5, 0.9, 0.9, 0.1], np.float32)
    loss = np.array([0.0, 0.7, 0.3, 0.0], np.float32)
    assert Population(("ties",) * 4, ({},) * 4, accuracy, loss).best == 2


def test_a_candidates_recipe_holds_its_exact_numbers(population: Population) -> None:
    for name, given in zip(population.methods[:15], population.hyperparams[:15], strict=True):
        recipe = parse(dump(exact_recipe(name, "base", ["a", "b", "c"], given)))
        resolved = resolve(recipe)
        assert resolved.method is jm.methods.get(name)()
        expected: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in given.items()
        }
        assert dict(resolved.hyperparameters) == expected


def test_default_recipes_set_no_number() -> None:
    recipe = default_recipe("ties", "base", ["a", "b", "c"])
    assert recipe.dialect == "jaxmerge"
    assert not recipe.parameters
    assert str(recipe.base_model) == "base"
    assert default_recipe("linear", "base", ["a"]).base_model is None


def test_methods_take_as_many_experts_as_they_can() -> None:
    assert fitting_methods(3)["linear"] == 3
    assert fitting_methods(3)["slerp"] == 2
    assert "slerp" not in fitting_methods(1)
