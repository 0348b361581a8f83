"""Retrieval metrics against a ranking by Python's own stable sort."""

import jax
import numpy as np
import pytest

from jaxmerge import evaluation

RNG = np.random.default_rng(1)
# Whole numbers, so that there are ties.
SIMILARITY = RNG.integers(0, 5, (9, 12)).astype(np.float32)
RELEVANT = RNG.random((9, 12)) < 0.2
RELEVANT[3] = False
QUERIES = RNG.random(9) < 0.8
DOCUMENTS = RNG.random(12) < 0.8


def by_hand(similarity, relevant, k, queries=None, documents=None):
    """Recall at k and the mean reciprocal rank."""
    recalls, reciprocals = [], []
    for q in range(len(similarity)):
        kept = [d for d in range(similarity.shape[1]) if documents is None or documents[d]]
        order = sorted(kept, key=lambda d: -similarity[q, d])
        good = [rank for rank, d in enumerate(order, start=1) if relevant[q, d]]
        if not good or not (queries is None or queries[q]):
            continue
        recalls.append(sum(rank <= k for rank in good) / len(good))
        reciprocals.append(1 / good[0])
    return np.mean(recalls), np.mean(reciprocals)


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("masks", [{}, {"queries": QUERIES, "documents": DOCUMENTS}])
def test_ranks_are_those_of_a_stable_sort(k, masks):
    recall, reciprocal = by_hand(SIMILARITY, RELEVANT, k, **masks)
    found = evaluation.recall_at_k(SIMILARITY, RELEVANT, k=k, **masks)
    np.testing.assert_allclose(found, recall, rtol=1e-6)
    found = evaluation.mean_reciprocal_rank(SIMILARITY, RELEVANT, **masks)
    np.testing.assert_allclose(found, reciprocal, rtol=1e-6)


def test_one_document_a_query_may_be_named_by_its_index():
    index = np.array([4, 1, -1, 0, 11, 2, 2, 7, 5])
    relevant = index[:, None] == np.arange(12)[None, :]
    recall, reciprocal = by_hand(SIMILARITY, relevant, 2)
    np.testing.assert_allclose(evaluation.recall_at_k(SIMILARITY, index, k=2), recall, rtol=1e-6)
    found = evaluation.mean_reciprocal_rank(SIMILARITY, index)
    np.testing.assert_allclose(found, reciprocal, rtol=1e-6)


def test_nothing_to_find_is_a_defined_result():
    nothing = np.zeros_like(RELEVANT)
    assert evaluation.recall_at_k(SIMILARITY, nothing, k=1) == 0
    assert evaluation.mean_reciprocal_rank(SIMILARITY, nothing) == 0
    with pytest.raises(ValueError, match="k of at least 1, found 0"):
        evaluation.recall_at_k(SIMILARITY, nothing, k=0)


def test_cosines_are_computed_in_full_precision_and_over_populations():
    queries, documents = RNG.normal(size=(2, 5, 8)), RNG.normal(size=(2, 7, 8))
    documents[0, 3] = 0
    found = jax.vmap(evaluation.cosine_similarity)(queries, documents)
    for i in range(2):
        norms = np.linalg.norm(queries[i], axis=1)[:, None] * np.linalg.norm(documents[i], axis=1)
        wanted = queries[i] @ documents[i].T / np.where(norms > 0, norms, 1)
        np.testing.assert_allclose(found[i], wanted, atol=1e-6)
