"""The Flax module and its PyTorch-named form are one network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.data import split_digits
from jaxmerge.quickstart import evaluate
from jaxmerge.quickstart.evaluation import score_all, score_ensemble
from jaxmerge.quickstart.network import NETWORK, from_checkpoint, to_checkpoint


@pytest.fixture(scope="module")
def variables() -> Any:
    return NETWORK.init(jax.random.key(3), jnp.zeros((1, 64)))


def _by_hand(tensors: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """The network as PyTorch would compute it, in float64."""
    hidden = images.astype(np.float64)
    for layer in ("fc1", "fc2", "fc3"):
        weight = np.asarray(tensors[f"{layer}.weight"], np.float64)
        hidden = hidden @ weight.T + np.asarray(tensors[f"{layer}.bias"], np.float64)
        hidden = hidden if layer == "fc3" else np.maximum(hidden, 0)
    return hidden


def test_the_checkpoint_computes_what_the_module_computes(variables: Any) -> None:
    images = split_digits().validation.images
    expected = _by_hand(to_checkpoint(variables), images)
    np.testing.assert_allclose(NETWORK.apply(variables, images), expected, atol=1e-5)


def test_the_checkpoint_comes_back_exactly(variables: Any) -> None:
    again = from_checkpoint(to_checkpoint(variables))
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_evaluate_is_the_share_of_validation_digits_classified_rightly(variables: Any) -> None:
    tensors, digits = to_checkpoint(variables), split_digits().validation
    right = _by_hand(tensors, digits.images).argmax(-1) == digits.labels
    assert float(evaluate(tensors)) == pytest.approx(right.mean(), abs=1e-6)


def test_evaluate_works_under_jit_and_vmap(variables: Any) -> None:
    tensors = to_checkpoint(variables)
    scales = jnp.array([0.0, 1.0])
    stacked = jax.tree.map(lambda x: jnp.tensordot(scales, x, axes=0), tensors)
    scores = jax.jit(jax.vmap(evaluate))(stacked)
    assert float(scores[1]) == pytest.approx(float(evaluate(tensors)), abs=1e-6)


def test_a_foreign_checkpoint_is_named(variables: Any) -> None:
    tensors = to_checkpoint(variables)
    renamed = {name.replace("fc1.weight", "fc1.wieght"): x for name, x in tensors.items()}
    with pytest.raises(ValueError, match=r"needs tensor 'fc1.weight'.*'fc1.wieght'"):
        evaluate(renamed)
    with pytest.raises(ValueError, match=r"'fc3.bias'.* has shape \[10\], found \[9\]"):
        evaluate({**tensors, "fc3.bias": jnp.zeros(9)})


def test_scores_by_group_add_up_to_the_joint_score(variables: Any) -> None:
    digits = split_digits().test
    (score,) = score_all([variables], digits)
    sizes = [len(digits.of(group).labels) for group in ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))]
    together = np.dot(score.groups, sizes) / sum(sizes)
    assert score.joint == pytest.approx(together)


def test_an_ensemble_of_one_is_that_model(variables: Any) -> None:
    digits = split_digits().test
    assert score_ensemble([variables, variables], digits) == score_all([variables], digits)[0]
