"""One contract over all distributions of directions, and the moments that their docstrings state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.estimators.directions import rademacher, segmented_uniform

DIRECTIONS = {"rademacher": rademacher(), "segmented-uniform": segmented_uniform()}
TREE = {"a": jnp.zeros((3, 5)), "b": [jnp.zeros(()), jnp.zeros(33)]}


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS.keys())
class TestContract:
    def test_shapes_follow_the_tree(self, directions, key):
        drawn = directions.sample(key, TREE)
        assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, TREE)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(drawn))

    def test_same_key_same_bits_also_under_jit_and_vmap(self, directions, key):
        keys = jax.random.split(key, 3)
        one_by_one = [directions.sample(k, TREE) for k in keys]
        together = jax.jit(jax.vmap(directions.sample, (0, None)))(keys, TREE)
        for i, drawn in enumerate(one_by_one):
            same = jax.tree.map(lambda a, b, i=i: bool((a == b[i]).all()), drawn, together)
            assert all(jax.tree.leaves(same))

    def test_dual_times_direction_is_the_identity_on_average(self, directions, key):
        """E[dual directionᵀ] = I within 4 standard errors, the bound of 64 entries at once."""
        draws = jax.vmap(directions.sample, (0, None))(jax.random.split(key, 40_000), jnp.zeros(8))
        outer = np.asarray(jax.vmap(directions.dual)(draws))[:, :, None] * np.asarray(draws)[:, None, :]
        error = outer.std(0) / np.sqrt(len(outer)) + 1e-6  # the diagonal is 1 exactly
        assert (np.abs(outer.mean(0) - np.eye(8)) < 4 * error).all()


def test_segmented_uniform_magnitudes_fill_their_range(key):
    draws = np.asarray(segmented_uniform().sample(key, jnp.zeros(100_000)))
    sizes = np.abs(draws)
    assert sizes.min() >= 0.5 - 1e-6
    assert sizes.max() <= 1.0
    # Uniform in [0.5, 1]: mean 0.75 with standard error 0.5/sqrt(12 n) = 4.6e-4; signs even within 0.0016.
    assert abs(sizes.mean() - 0.75) < 0.002
    assert abs(np.sign(draws).mean()) < 0.01


def test_rademacher_unpacks_bits_lowest_first(key):
    words = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    expected = [1.0 if (int(words[i // 32]) >> (i % 32)) & 1 else -1.0 for i in range(40)]
    np.testing.assert_array_equal(rademacher().sample(key, jnp.zeros(40)), expected)
