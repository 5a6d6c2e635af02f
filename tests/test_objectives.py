import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedbbpt_jax.objectives import cross_entropy


def test_cross_entropy_equals_optax():
    rng = np.random.default_rng(0)
    scores, labels = jnp.asarray(rng.normal(0, 5, (3, 7, 10))), jnp.asarray(rng.integers(0, 10, (3, 7)))
    expected = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    np.testing.assert_allclose(cross_entropy(scores, labels), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_losses_are_float32_whatever_the_scores(dtype):
    assert cross_entropy(jnp.zeros((2, 3), dtype), jnp.zeros(2, jnp.int32)).dtype == jnp.float32


def test_large_scores_stay_finite():
    assert cross_entropy(jnp.array([1e4, -1e4]), jnp.array(1)) == pytest.approx(2e4)
