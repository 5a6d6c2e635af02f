import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.optimizers.cma_es import cma_es
from fedbbpt_jax.optimizers.perturbed_loss import loss_ratio, with_perturbed_loss

K, B = 6, 3


@pytest.fixture
def losses():
    return np.random.default_rng(0).uniform(0.5, 2, (K, 2 * B)).astype(np.float32)


def test_the_ratio_of_means_is_told(losses, key):
    inner = cma_es(K, 1.0)
    state, valid = inner.init(jnp.zeros(4)), np.ones((K, 2 * B), bool)
    found, info = jax.jit(with_perturbed_loss(inner).tell)(key, state, losses, valid)
    ratio = losses[:, :B].mean(1) / losses[:, B:].mean(1)
    assert np.argmin(ratio) != np.argmin(losses.mean(1))
    expected, _ = jax.jit(inner.tell)(key, state, ratio[:, None], np.ones((K, 1), bool))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)
    np.testing.assert_allclose(info.loss, losses[:, :B].mean(), rtol=1e-6)  # in nats, as without
    assert info.num_directions == K


def test_an_example_counts_where_both_answers_came(losses):
    valid = np.ones((K, 2 * B), bool)
    valid[0, 1] = valid[0, B + 2] = False  # leaves the first example
    valid[1] = np.arange(2 * B) < B  # no answer with replaced words
    valid[2] = [True, False, False, False, True, True]  # no example with both
    ratio, usable = loss_ratio(jnp.where(valid, losses, jnp.nan), valid)
    np.testing.assert_allclose(ratio[0, 0], losses[0, 0] / losses[0, B], rtol=1e-6)
    np.testing.assert_array_equal(usable[:, 0], [True, False, False, True, True, True])
    assert np.isfinite(ratio).all()


def test_a_loss_of_nothing_divides_nothing(losses):
    ratio, usable = loss_ratio(jnp.asarray(losses).at[0, B:].set(0.0), jnp.ones((K, 2 * B), bool))
    assert not usable[0]
    assert usable[1:].all()
    assert np.isfinite(ratio).all()


def test_there_are_as_many_texts_with_words_replaced():
    with pytest.raises(ValueError, match="got 5"):
        loss_ratio(jnp.ones((K, 5)), jnp.ones((K, 5), bool))
