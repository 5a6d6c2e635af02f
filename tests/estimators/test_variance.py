"""The laboratory on landscapes whose gradient, curvature and noise are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.estimators.directions import gaussian, rademacher, segmented_uniform
from fedbbpt_jax.estimators.quadratic import quadratic_landscape
from fedbbpt_jax.estimators.reduction import with_control_variate
from fedbbpt_jax.estimators.spsa import one_sided_spsa, spsa
from fedbbpt_jax.estimators.structured import hadamard, subspace
from fedbbpt_jax.estimators.theory import best_two_sided_size, expected_cosine, kappa
from fedbbpt_jax.estimators.variance import best_perturbation_size, draw_trials, measure, measure_sizes

pytestmark = pytest.mark.slow  # compiles dozens of small programs

D = 32


def within(mean, expected, errors=4.0):
    return abs(mean.value - expected) <= errors * mean.error + 1e-6 * abs(expected)


@pytest.fixture(scope="module")
def landscape():
    return quadratic_landscape(D)


@pytest.fixture(scope="module")
def trials(landscape):
    return draw_trials(landscape, jax.random.key(0), 600)


@pytest.fixture(scope="module")
def two_sided(landscape, trials):
    return measure(landscape, spsa(rademacher(), 4, 0.1), trials)


def relative(trials, theory):
    """Theory's share of ‖g_b‖² as a share of ‖g‖²."""
    return theory * (trials.of_batch**2).sum(1).mean() / (trials.of_all @ trials.of_all)


def test_true_gradients_are_those_of_the_quadratic(landscape, trials):
    """Against H(θ - mean of the centres), from the minibatches themselves."""
    rng = np.random.default_rng(0)
    centres = 1 + 0.5 * rng.standard_normal((5, 1, D))
    targets = centres + rng.standard_normal((5, 64, D))
    curvature = np.linspace(0.5, 2.0, D)
    clients, rows = (np.asarray(x) for x in trials.draws)
    np.testing.assert_allclose(trials.of_all, -curvature * targets.mean((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trials.of_client[3], -curvature * targets[clients[3]].mean(0), rtol=1e-4, atol=1e-5)
    own = targets[clients[3], rows[3]].mean(0)
    np.testing.assert_allclose(trials.of_batch[3], -curvature * own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("directions", [rademacher(), segmented_uniform(), gaussian()], ids=["sign", "7/6", "normal"])
def test_the_directions_part_is_what_theory_says(directions, landscape, trials):
    measured = measure(landscape, spsa(directions, 4, 0.1), trials)
    assert within(measured.directions, relative(trials, directions.variance(D, 4)))
    assert measured.directions.error < 0.05 * measured.directions.value


def test_orthogonal_directions_leave_only_the_sampling_of_data(landscape, trials):
    measured = measure(landscape, spsa(hadamard(), D, 0.1), trials)
    assert measured.directions.value < 1e-8
    assert within(measured.mse, measured.minibatch.value + measured.clients.value)


def test_exact_answers_and_no_third_derivative_leave_no_perturbation_error(two_sided):
    assert two_sided.api.value == 0
    assert two_sided.smoothing.value < 1e-6  # float32 losses of size 30 divided by 2c = 0.2


def test_parts_add_up_to_the_error(two_sided):
    parts = (two_sided.directions, two_sided.minibatch, two_sided.clients)
    assert within(two_sided.mse, sum(part.value for part in parts))


def test_unbiased_estimates_have_no_bias_and_biased_ones_have_theirs(two_sided, landscape, trials):
    assert within(two_sided.bias, 0.0)
    directions = subspace(8)
    draws = jax.vmap(lambda j: directions.sample(jax.random.key(1), j, jnp.zeros(D)))(jnp.arange(4000))
    projected = np.cov(np.asarray(draws, np.float64).T, bias=True)  # P = E[ΔΔᵀ]
    lost = trials.of_all - projected @ trials.of_all
    measured = measure(landscape, spsa(directions, 8, 0.1), trials)
    expected = lost @ lost / (trials.of_all @ trials.of_all)
    assert measured.bias.value == pytest.approx(expected, abs=4 * measured.bias.error + 0.02 * expected)
    assert measured.bias.value > 10 * measured.bias.error


def test_cosine_is_that_of_theory(landscape, trials):
    measured = measure(landscape, spsa(rademacher(), 16, 0.1), trials)
    assert measured.cosine.value == pytest.approx(expected_cosine(measured.mse.value), abs=0.03)  # order 1/d


def test_derived_figures(two_sided):
    assert two_sided.num_evaluations == 8
    assert two_sided.unit_error_evaluations.value == pytest.approx(8 * two_sided.mse.value)
    assert two_sided.variance.value == pytest.approx(two_sided.mse.value - two_sided.bias.value)
    assert two_sided.snr.value == pytest.approx(1 / two_sided.variance.value)


def test_a_control_variate_that_knows_the_gradient_leaves_less(landscape, trials):
    estimator = with_control_variate(spsa(hadamard(), 8, 0.1), decay=0.9)
    cold, warm = (measure(landscape, estimator, trials, num_warmup=n) for n in (0, 40))
    assert warm.variance.value < 0.5 * cold.variance.value


def test_lost_answers_are_told_as_invalid():
    """A fifth of all answers is NaN: no estimate is, and the mean stays."""

    def lose(losses, key):
        return jnp.where(jax.random.bernoulli(key, 0.2, losses.shape), jnp.nan, losses)

    landscape = quadratic_landscape(D, answer=lose)
    measured = measure(landscape, spsa(rademacher(), 4, 0.1), draw_trials(landscape, jax.random.key(0), 600))
    assert np.isfinite(measured.mse.value)
    assert within(measured.bias, 0.0)
    assert measured.api.value > 0


SIZES = np.geomspace(0.02, 2.0, 9)


def errors_under_noise(deviation: float, build=lambda c: spsa(rademacher(), 4, c)):
    def answer(losses, key):
        return losses + deviation * jax.random.normal(key, losses.shape)

    landscape = quadratic_landscape(D, cubic=1.0, answer=answer)
    trials = draw_trials(landscape, jax.random.key(0), 200)
    return np.array([m.perturbation.value for m in measure_sizes(landscape, build, SIZES, trials)])


def test_recommended_size_is_near_the_best_and_follows_the_cube_root_law():
    found = []
    for deviation in (1e-3, 1e-2, 1e-1):
        errors = errors_under_noise(deviation)
        size = best_perturbation_size(SIZES, errors)
        assert 0.5 < size / SIZES[errors.argmin()] < 2
        found.append(size)
    # A tenfold noise wants 10^(1/3) = 2.15 times the size; the fit is of figures with some percent of error.
    np.testing.assert_allclose(np.array(found[1:]) / found[:-1], 10 ** (1 / 3), rtol=0.15)


def test_recommended_size_is_the_minimum_of_an_exact_law():
    for noise, third in [(1e-4, 1.0), (1e-2, 3.0)]:
        errors = noise * SIZES**-2 + third * SIZES**4
        assert best_perturbation_size(SIZES, errors) == pytest.approx(best_two_sided_size(noise, third), rel=0.01)


def test_one_sided_differences_want_another_size():
    two, one = (errors_under_noise(1e-2, build) for build in (
        lambda c: spsa(rademacher(), 4, c), lambda c: one_sided_spsa(rademacher(), 8, c)))  # fmt: skip
    assert one.min() > 2 * two.min()
    assert best_perturbation_size(SIZES, one) < best_perturbation_size(SIZES, two)


def test_kappa():
    assert kappa(rademacher(), 100) == 1
    assert kappa(segmented_uniform(), 100) == pytest.approx(7 / 6)
    assert kappa(gaussian(), 100) == pytest.approx(101 / 99)
