"""Scores and metrics against float64 NumPy written from the formulas; batches, padding and populations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import evaluation

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 6)).astype(np.float32) * 3
LABELS = RNG.integers(0, 6, 40)
MASK = RNG.random(40) < 0.7


def probabilities(logits):
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def expected(logits, labels, bins=15):
    """All metrics, one prediction after the other."""
    right = loss = brier = 0.0
    members = [[] for _ in range(bins)]
    for p, y in zip(probabilities(logits), labels, strict=True):
        hit = float(np.argmax(p) == y)
        right, loss = right + hit, loss - np.log(p[y])
        brier += sum((p[k] - float(k == y)) ** 2 for k in range(len(p)))
        where = next(b for b in range(bins) if b / bins < p.max() <= (b + 1) / bins)
        members[where].append((hit, p.max()))
    n = len(labels)
    gaps = (abs(sum(h for h, _ in m) - sum(c for _, c in m)) for m in members)
    return {
        "accuracy": right / n,
        "cross_entropy": loss / n,
        "perplexity": np.exp(loss / n),
        "brier_score": brier / n,
        "calibration_error": sum(gaps) / n,
    }


def check(scores, wanted):
    for name, value in wanted.items():
        np.testing.assert_allclose(
            getattr(evaluation, name)(scores), value, rtol=2e-6, err_msg=name
        )


def test_metrics_are_those_of_the_formulas():
    check(evaluation.score(LOGITS, LABELS), expected(LOGITS, LABELS))


def test_what_the_mask_or_a_negative_label_leaves_out_does_not_count():
    broken = np.where(MASK[:, None], LOGITS, np.nan)
    wanted = expected(LOGITS[MASK], LABELS[MASK])
    check(evaluation.score(broken, LABELS, MASK), wanted)
    check(evaluation.score(broken, np.where(MASK, LABELS, -100)), wanted)


def test_nothing_that_counts_is_a_defined_result():
    scores = evaluation.score(LOGITS, LABELS, np.zeros(40, bool))
    wanted = dict.fromkeys(("accuracy", "cross_entropy", "brier_score", "calibration_error"), 0.0)
    check(scores, {**wanted, "perplexity": 1.0})


def test_large_logits_stay_finite_and_low_precision_is_widened():
    scores = evaluation.score(jnp.array([[1e4, -1e4]], jnp.bfloat16), jnp.array([1]))
    np.testing.assert_allclose(scores.loss, [2e4], rtol=0.01)
    assert {field.dtype for field in scores[:4]} == {jnp.dtype("float32")}


def test_next_tokens_are_predicted_from_those_before():
    tokens = RNG.integers(0, 6, (2, 5))
    logits = RNG.normal(size=(2, 5, 6)).astype(np.float32)
    mask = np.array([[True] * 5, [True, True, True, False, False]])
    pairs = [(i, t) for i in range(2) for t in range(4) if mask[i, t] and mask[i, t + 1]]
    found = evaluation.score_next_tokens(logits, tokens, mask)
    assert found.loss.shape == (2, 4)
    rows = np.stack([logits[i, t] for i, t in pairs])
    check(found, expected(rows, np.array([tokens[i, t + 1] for i, t in pairs])))


def linear(params, inputs):
    return inputs @ params


@pytest.mark.parametrize("batch_size", [7, 40, 100, None])
def test_batches_change_nothing(batch_size):
    params = RNG.normal(size=(3, 6)).astype(np.float32)
    inputs = RNG.normal(size=(40, 3)).astype(np.float32)
    scores = jm.evaluation.score_batches(
        linear, params, inputs, LABELS, MASK, batch_size=batch_size
    )
    whole = evaluation.score(inputs @ params, LABELS, MASK)
    chex.assert_trees_all_close(scores, whole, rtol=1e-5, atol=1e-6)


def test_a_model_is_traced_once_and_populations_are_one_program():
    @chex.assert_max_traces(n=1)
    def apply_fn(params, inputs):
        return inputs["x"] @ params

    population = RNG.normal(size=(5, 3, 6)).astype(np.float32)
    inputs = {"x": RNG.normal(size=(40, 3)).astype(np.float32)}

    @jax.jit
    def scored(params):
        scores = evaluation.score_batches(apply_fn, params, inputs, LABELS, batch_size=16)
        return evaluation.accuracy(scores), evaluation.calibration_error(scores)

    found = jax.vmap(scored)(population)
    for i, params in enumerate(population):
        wanted = expected(inputs["x"] @ params, LABELS)
        np.testing.assert_allclose(found[0][i], wanted["accuracy"], rtol=1e-6)
        np.testing.assert_allclose(found[1][i], wanted["calibration_error"], rtol=1e-4)


def test_a_decoder_is_scored_in_batches():
    tokens = RNG.integers(0, 6, (5, 4))
    table = RNG.normal(size=(6, 6)).astype(np.float32)
    found = evaluation.score_batches(
        lambda params, x: params[x], table, tokens, tokens, batch_size=2,
        score=evaluation.score_next_tokens,
    )  # fmt: skip
    wanted = expected(table[tokens[:, :-1].ravel()], tokens[:, 1:].ravel())
    np.testing.assert_allclose(evaluation.perplexity(found), wanted["perplexity"], rtol=1e-5)


@pytest.mark.parametrize(
    ("examples", "batch_size", "message"),
    [
        (
            {"a": np.ones(3), "b": np.ones(4)},
            2,
            r"one number of examples, .*found \[\(3,\), \(4,\)\]",
        ),
        (np.ones((0, 2)), 2, r"at least 1; found \[\(0,\)\]"),
        (np.ones(()), 2, r"found \[\(\)\]"),
        (np.ones(3), 0, "batch size of at least 1, found 0"),
    ],
)
def test_examples_that_fit_no_batch_are_refused(examples, batch_size, message):
    with pytest.raises(ValueError, match=message):
        evaluation.over_batches(lambda x: x, examples, batch_size=batch_size)
