import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.data.token_noise import corrupt_tokens

PROTECTED = [0, 1, 2, 3, 19, 7]
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (400, 50)), jnp.int32)
corrupt = jax.jit(lambda key, ids, rate: corrupt_tokens(key, ids, rate, 20, PROTECTED))


def test_each_word_is_replaced_with_the_given_probability(key):
    """A word comes for itself once in 14 times. 14,000 draws: four standard errors are 0.017."""
    free = ~np.isin(IDS, PROTECTED)
    changed = np.asarray(corrupt(key, IDS, 0.4) != IDS)
    assert not changed[~free].any()
    np.testing.assert_allclose(changed[free].mean(), 0.4 * 13 / 14, atol=0.017)


def test_words_that_are_drawn_are_equally_likely_and_never_protected(key):
    """20,000 draws of 14 words: a count has a standard error of 37."""
    drawn = np.asarray(corrupt(key, jnp.full_like(IDS, 5), 1.0))
    counts = np.bincount(drawn.ravel(), minlength=20)
    assert not counts[PROTECTED].any()
    np.testing.assert_allclose(np.delete(counts, PROTECTED), 20_000 / 14, atol=4.5 * 37)
    assert len(counts) == 20


def test_no_rate_changes_nothing_and_keys_tell_texts_apart(key):
    np.testing.assert_array_equal(corrupt(key, IDS, 0.0), IDS)
    np.testing.assert_array_equal(corrupt(key, IDS, 0.5), corrupt(key, IDS, 0.5))
    assert (corrupt(key, IDS, 0.5) != corrupt(jax.random.fold_in(key, 1), IDS, 0.5)).mean() > 0.3
    assert corrupt(key, IDS, 0.5).dtype == jnp.int32


def test_whether_and_by_what_a_word_is_replaced_are_independent(key):
    """With one key for both, the words that come would depend on the rate."""
    changed = np.asarray(corrupt(key, jnp.full_like(IDS, 5), 0.3))
    counts = np.bincount(changed[changed != 5], minlength=20)
    others = np.setdiff1d(np.arange(20), [*PROTECTED, 5])
    np.testing.assert_allclose(counts[others], counts[others].mean(), atol=4.5 * np.sqrt(counts[others].mean()))


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_is_a_probability(key, rate):
    with pytest.raises(ValueError, match="between 0 and 1"):
        corrupt_tokens(key, IDS, rate, 20, PROTECTED)


def test_some_words_must_be_free(key):
    with pytest.raises(ValueError, match="all 3 tokens"):
        corrupt_tokens(key, IDS, 0.5, 3, [0, 1, 2, 9])
