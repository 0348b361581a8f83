"""Tables of probabilities: genomes are written so that the space reads the same levels."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxmerge.search import binary, categorical, continuous, integer, space
from jaxmerge.search.strategies.levels import Levels

MIXED = space(
    {
        "a": categorical(["x", "y", "z"], shape=(2,)),
        "b": binary(shape=(2,), probability=0.3),
        "c": continuous(0, 1),
        "d": integer(-2, 2),
        "e": categorical([7]),
    }
)
LEVELS = Levels.of(MIXED, ("binary", "categorical", "integer"))
read, bounded = jax.jit(LEVELS.read), jax.jit(LEVELS.bounded)
first_table = jax.jit(lambda mean: LEVELS.table(mean, jnp.float32(0.25)))
decode = jax.jit(jax.vmap(MIXED.decode))


@jax.jit
def genomes(key: jax.Array, table: jax.Array) -> jax.Array:
    drawn = LEVELS.sample(key, table, 8192)
    return jnp.zeros((8192, MIXED.size)).at[:, LEVELS.coordinates].set(drawn)


def test_what_is_written_is_read_by_the_space() -> None:
    written = genomes(jax.random.key(0), first_table(MIXED.initial_genome()))
    level = np.argmax(read(written), axis=2)
    points = decode(written)
    np.testing.assert_array_equal(level[:, :2], points["a"])
    np.testing.assert_array_equal(level[:, 2:4], points["b"])
    np.testing.assert_array_equal(level[:, 4] - 2, points["d"])
    assert (level[:, 5] == 0).all()
    assert len(np.unique(level[:, 0])) == 3
    assert len(np.unique(level[:, 4])) == 5


def test_any_genome_is_read_as_the_space_reads_it() -> None:
    some = jax.random.uniform(jax.random.key(1), (8192, MIXED.size), minval=-0.5, maxval=1.5)
    level = np.argmax(read(some), axis=2)
    points = decode(some)
    found = np.concatenate([points["a"], points["b"], points["d"][:, None] + 2], axis=1)
    # The space clips first, after which choices may be equal.
    clear = np.all((some[:, :6] > 0) & (some[:, :6] < 1), axis=1)
    assert clear.any()
    np.testing.assert_array_equal(level[clear][:, :5], found[clear])


def test_the_first_table_follows_the_genome() -> None:
    table = np.asarray(first_table(MIXED.initial_genome()))
    np.testing.assert_allclose(table[0], [1 / 3, 1 / 3, 1 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(table[2], [0.7, 0.3, 0, 0, 0], rtol=1e-6)
    edges = stats.norm.cdf((np.arange(1, 5) / 5 - 0.5) / 0.25)
    np.testing.assert_allclose(table[4], np.diff(edges, prepend=0, append=1), rtol=1e-5)
    assert table[5].tolist() == [1, 0, 0, 0, 0]
    nothing = np.asarray(first_table(jnp.zeros(MIXED.size)))
    np.testing.assert_allclose(nothing[0], table[0], rtol=1e-6)


def test_sampling_follows_the_table() -> None:
    some = jax.random.uniform(jax.random.key(2), LEVELS.exists.shape)
    table = bounded(some, np.zeros(6, np.float32))
    share = np.mean(read(genomes(jax.random.key(0), table)), axis=0)
    np.testing.assert_allclose(share, table, atol=0.02)


@given(st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_bounded_tables_are_distributions_above_the_bound(seed: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    least = (part / LEVELS.counts).astype(np.float32)
    table = rng.normal(0.2, 0.4, LEVELS.exists.shape).astype(np.float32)
    found = np.asarray(bounded(table, least))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert (found[~LEVELS.exists] == 0).all()
    assert (found >= np.where(LEVELS.exists, least[:, None], 0) - 1e-6).all()
