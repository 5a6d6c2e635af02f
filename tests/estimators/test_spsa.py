"""The estimators against a hand-written NumPy SPSA, a known gradient, theory, and failed answers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedbbpt_jax.estimators.directions import rademacher, segmented_uniform
from fedbbpt_jax.estimators.spsa import one_sided_spsa, spsa

ESTIMATORS = {
    "two-sided": lambda q, c: spsa(rademacher(), q, c),
    "two-sided segmented": lambda q, c: spsa(segmented_uniform(), q, c),
    "one-sided": lambda q, c: one_sided_spsa(rademacher(), q, c),
}
every_estimator = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS.keys())

CURVATURE = jnp.diag(jnp.linspace(0.5, 2.0, 6)) + 0.1
TARGETS = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 6)), jnp.float32)  # B = 4 examples
POINT = jnp.arange(6.0) / 3


def losses_at(candidate):
    """A quadratic per example, `[B]`."""
    difference = candidate - TARGETS
    return 0.5 * jnp.einsum("bi,ij,bj->b", difference, CURVATURE, difference)


TRUE_GRADIENT = np.asarray(jax.grad(lambda p: losses_at(p).mean())(POINT))


def evaluate(estimator, key, state, params):
    ks = jnp.arange(estimator.num_candidates)
    candidates = jax.vmap(lambda k: estimator.perturb(key, state, params, k))(ks)
    losses = jax.vmap(losses_at)(candidates)
    return candidates, losses, jnp.ones(losses.shape, bool)


def estimate(estimator, key, valid=None):
    state = estimator.init(POINT)
    _, losses, all_valid = evaluate(estimator, key, state, POINT)
    return estimator.estimate(key, state, POINT, losses, all_valid if valid is None else valid)


def numpy_spsa(loss, point, directions, c):
    """Spall (1992), two-sided, mean over directions."""
    total = np.zeros_like(point)
    for delta in directions:
        total += (loss(point + c * delta) - loss(point - c * delta)) / (2 * c * delta)
    return total / len(directions)


@pytest.mark.parametrize("directions", [rademacher(), segmented_uniform()], ids=["rademacher", "segmented"])
def test_equals_numpy_spsa_with_the_same_directions(directions, key):
    estimator = spsa(directions, 5, 0.1)
    deltas = [np.asarray(directions.sample(jax.random.fold_in(key, j), POINT), np.float64) for j in range(5)]
    targets, curvature = np.asarray(TARGETS, np.float64), np.asarray(CURVATURE, np.float64)

    def loss(p):
        return np.mean([0.5 * (p - t) @ curvature @ (p - t) for t in targets])

    expected = numpy_spsa(loss, np.asarray(POINT, np.float64), deltas, 0.1)
    # float32 losses of size 10 carry 1e-6 each, divided by 2c = 0.2
    np.testing.assert_allclose(estimate(estimator, key)[0], expected, rtol=1e-4, atol=1e-4)


@every_estimator
def test_mean_is_the_true_gradient(make, key):
    """Within 4 standard errors; one-sided differences have the bias c/2·E[(Δᵀ H Δ) Δ] = 0 for even distributions."""
    estimator = make(2, 1e-2)
    draws = np.asarray(jax.jit(jax.vmap(lambda k: estimate(estimator, k)[0]))(jax.random.split(key, 20_000)))
    error = draws.std(0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - TRUE_GRADIENT) < 4 * error + 1e-3).all()
    assert error.max() < 0.05 * np.abs(TRUE_GRADIENT).max()


@pytest.mark.parametrize(("directions", "kappa"), [(rademacher(), 1.0), (segmented_uniform(), 7 / 6)])
@pytest.mark.parametrize("q", [1, 4])
def test_second_moment_follows_theory(directions, kappa, q, key):
    """E‖ĝ‖² = (1 + κ(d - 1)/q)‖g‖² on a linear function, where the estimator has no bias; within 4 standard errors."""
    slope = jnp.linspace(-1, 1, 16)
    estimator = spsa(directions, q, 0.5)

    def squared_norm(key):
        state = estimator.init(slope)
        ks = jnp.arange(estimator.num_candidates)
        losses = jax.vmap(lambda k: estimator.perturb(key, state, jnp.zeros(16), k) @ slope)(ks)[:, None]
        gradient, _, _ = estimator.estimate(key, state, slope, losses, jnp.ones(losses.shape, bool))
        return jnp.sum(gradient**2) / jnp.sum(slope**2)

    ratios = np.asarray(jax.jit(jax.vmap(squared_norm))(jax.random.split(key, 20_000)))
    error = ratios.std() / np.sqrt(len(ratios))
    assert abs(ratios.mean() - (1 + kappa * 15 / q)) < 4 * error + 1e-3


@every_estimator
def test_candidates_are_rebuilt_alike_in_any_order(make, key):
    estimator = make(3, 0.1)
    state = estimator.init(POINT)
    candidates, _, _ = evaluate(estimator, key, state, POINT)
    for k in reversed(range(estimator.num_candidates)):
        np.testing.assert_array_equal(estimator.perturb(key, state, POINT, jnp.asarray(k)), candidates[k])


@every_estimator
def test_works_under_jit_and_vmap(make, key):
    """Up to the rounding of fused float32 sums."""
    estimator = make(3, 0.1)
    keys = jax.random.split(key, 4)
    together = jax.jit(jax.vmap(lambda k: estimate(estimator, k)[0]))(keys)
    np.testing.assert_allclose(together[2], estimate(estimator, keys[2])[0], rtol=1e-4, atol=1e-4)


@every_estimator
def test_no_answer_gives_a_zero_estimate(make, key):
    estimator = make(3, 0.1)
    gradient, _, info = estimate(estimator, key, jnp.zeros((estimator.num_candidates, 4), bool))
    assert not np.asarray(gradient).any()
    assert info.num_directions == 0
    assert info.loss == 0


def test_one_failed_side_drops_its_pair_only(key):
    estimator = spsa(rademacher(), 3, 0.1)
    valid = jnp.ones((6, 4), bool).at[2].set(False)  # the plus side of direction 1
    gradient, _, info = estimate(estimator, key, valid)
    assert info.num_directions == 2

    state = estimator.init(POINT)
    _, losses, _ = evaluate(estimator, key, state, POINT)
    expected = np.zeros(6)
    for j in (0, 2):
        delta = np.asarray(rademacher().sample(jax.random.fold_in(key, j), POINT))
        expected += float((losses[2 * j] - losses[2 * j + 1]).mean() / 0.2) * delta / 2
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4)


@every_estimator
def test_lost_answers_leave_the_mean_unbiased(make, key):
    """20 % of answers lost at random: still the gradient, within 4 standard errors."""
    estimator = make(2, 1e-2)

    def one(key):
        estimate_key, mask_key = jax.random.split(key)
        valid = jax.random.bernoulli(mask_key, 0.8, (estimator.num_candidates, 4))
        gradient, _, info = estimate(estimator, estimate_key, valid)
        return gradient, info.num_directions

    draws, used = jax.jit(jax.vmap(one))(jax.random.split(key, 40_000))
    answered = np.asarray(draws)[np.asarray(used) == 2]  # with fewer the estimate is a mean over fewer, or zero
    error = answered.std(0) / np.sqrt(len(answered))
    assert len(answered) > 20_000
    assert (np.abs(answered.mean(0) - TRUE_GRADIENT) < 4 * error + 2e-3).all()


def test_invalid_losses_never_reach_the_estimate(key):
    estimator = spsa(rademacher(), 2, 0.1)
    state = estimator.init(POINT)
    _, losses, valid = evaluate(estimator, key, state, POINT)
    poisoned, valid = losses.at[0, 1].set(jnp.nan).at[3, 2].set(jnp.inf), valid.at[0, 1].set(False).at[3, 2].set(False)
    gradient, _, info = estimator.estimate(key, state, POINT, poisoned, valid)
    assert np.isfinite(gradient).all()
    assert np.isfinite(info.loss)


def test_perturbation_size_may_follow_a_schedule(key):
    estimator = spsa(rademacher(), 1, optax.exponential_decay(0.4, 1, 0.5))
    state = estimator.init(POINT)
    for size in (0.4, 0.2, 0.1):
        moved = estimator.perturb(key, state, POINT, jnp.asarray(0)) - POINT
        np.testing.assert_allclose(jnp.abs(moved), size, rtol=1e-5)
        _, state, _ = estimator.estimate(key, state, POINT, *evaluate(estimator, key, state, POINT)[1:])


@pytest.mark.parametrize("make", [spsa, one_sided_spsa])
@pytest.mark.parametrize(("q", "c", "name"), [(0, 0.1, "num_directions"), (1, 0.0, "perturbation_size")])
def test_sizes_must_be_positive(make, q, c, name):
    with pytest.raises(ValueError, match=name):
        make(rademacher(), q, c)
