"""One contract over all estimators of continuous parameters, bare and wrapped; and NumPy versions of the bare ones."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from fedbbpt_jax.estimators.directions import gaussian, rademacher, segmented_uniform
from fedbbpt_jax.estimators.guided import guided_spsa
from fedbbpt_jax.estimators.reduction import (
    clipped,
    standardised,
    trimmed,
    with_anchor,
    with_averaging,
    with_control_variate,
    with_shaped_losses,
    with_transformation,
)
from fedbbpt_jax.estimators.spsa import one_sided_spsa, residual_feedback, spsa
from fedbbpt_jax.estimators.structured import hadamard
from fedbbpt_jax.optimizers.descent import descent
from fedbbpt_jax.types import EstimateInfo

Q, C = 2, 0.3  # a large perturbation: on quadratics these estimators have no bias, and rounding errors stay small
UNBIASED = {
    "two-sided": spsa(segmented_uniform(), Q, C),
    "one-sided": one_sided_spsa(rademacher(), Q, C),
    "residual": residual_feedback(rademacher(), Q, C),
    "control-variate": with_control_variate(spsa(rademacher(), Q, C), 0.5),
    "anchor": with_anchor(spsa(rademacher(), Q, C), period=8),
    "averaged-control-variate": with_averaging(with_control_variate(spsa(rademacher(), Q, C), 0.5), 2),
    "guided-by-nothing-yet": guided_spsa(Q, C, history=4),
    "anchored-control-variate": with_anchor(with_control_variate(one_sided_spsa(gaussian(), Q, C)), period=2),
}
BIASED = {
    "momentum": with_transformation(spsa(segmented_uniform(), Q, C), optax.trace(0.9, nesterov=True)),
    "guided": guided_spsa(Q, C, history=2),
    "standardised": with_shaped_losses(residual_feedback(rademacher(), Q, C), standardised),
}
ESTIMATORS = {**UNBIASED, **BIASED}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)

CURVATURE = jnp.diag(jnp.linspace(0.5, 2.0, 6)) + 0.1
TARGETS = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 6)), jnp.float32)  # B = 4 examples
POINT = jnp.arange(6.0) / 3
POINTS = POINT + jnp.linspace(0.3, 0.0, 4)[:, None]  # four steps towards it
TREE = {"a": jnp.zeros((3, 5)), "b": [jnp.zeros(()), jnp.zeros(33)]}
NUM_DRAWS = 5_000
QUICKLY = {
    "xla_backend_optimization_level": 0
}  # programs that run once: better ones take longer to make than they save


def losses_at(candidate):
    """A quadratic per example, `[B]`."""
    difference = candidate - TARGETS
    return 0.5 * ((difference @ CURVATURE) * difference).sum(-1)


TRUE_GRADIENT = np.asarray(jax.grad(lambda p: losses_at(p).mean())(POINT))


class Step(NamedTuple):
    """What one step of an estimator asked, was told and said."""

    candidates: jax.Array
    losses: jax.Array
    gradient: jax.Array
    info: EstimateInfo


def step(estimator, key, state, params, valid, poison, each=jax.vmap):
    """Asks for all candidates, and puts `poison` in place of the answers that are lost."""
    candidates = each(lambda k: estimator.perturb(key, state, params, k))(jnp.arange(estimator.num_candidates))
    losses = jnp.where(valid, jax.vmap(losses_at)(candidates), poison)
    gradient, state, info = estimator.estimate(key, state, params, losses, valid)
    return state, Step(candidates, losses, gradient, info)


KEYS = jax.random.split(jax.random.key(5), (NUM_DRAWS, len(POINTS)))
CLEAN, POISON = (0.0,) * 4, (np.nan, np.inf, -np.inf, 1e30)  # of the examples of a lost answer


def answered(name, share):
    """Which answers come, `[draws, steps, K, B]`."""
    shape = (NUM_DRAWS, len(POINTS), ESTIMATORS[name].num_candidates, 4)
    return np.random.default_rng(2).random(shape) < share


@cache
def compiled(name):
    estimator = ESTIMATORS[name]

    def run(keys, valid, poison):
        one = lambda state, row: step(estimator, row[0], state, row[1], row[2], poison)  # noqa: E731
        return jax.lax.scan(one, estimator.init(POINT), (keys, POINTS, valid))

    return jax.jit(jax.vmap(run, (0, 0, None)), compiler_options=QUICKLY)


@cache
def runs(name, share, poison):
    """Final states, and steps `[draws, steps]`, of four steps of an estimator with many keys."""
    return jax.device_get(compiled(name)(KEYS, answered(name, share), np.float32(poison)))


@every_estimator
class TestContract:
    def test_shapes(self, name):
        """On a tree of matrices, scalars and vectors; a state keeps its shapes and types, so that it can be scanned."""
        estimator = ESTIMATORS[name]
        size = estimator.num_candidates
        state = estimator.init(TREE)
        candidate = jax.eval_shape(estimator.perturb, KEYS[0, 0], state, TREE, jnp.asarray(0))
        answers = jnp.zeros((size, 4)), jnp.ones((size, 4), bool)
        gradient, after, info = jax.eval_shape(estimator.estimate, KEYS[0, 0], state, TREE, *answers)
        for tree in (candidate, gradient):
            assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), TREE)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(lambda x: jax.typeof(jnp.zeros(x.shape, x.dtype)), after)
        assert [x.shape for x in info] == [(), (), ()]

    @pytest.mark.slow
    def test_steps_one_by_one_are_those_under_vmap_and_trace_once(self, name):
        """Candidates one after the other from the last. Losses of 10 carry 1e-6 each, which 1/c makes 1e-5, and
        standardising those that hardly differ ten times more.
        """
        estimator, traces = ESTIMATORS[name], []

        def backwards(perturb):
            return lambda ks: jax.lax.map(perturb, ks[::-1])[::-1]

        @partial(jax.jit, compiler_options=QUICKLY)
        def one(key, *arguments):
            traces.append(key)
            return step(estimator, key, *arguments, each=backwards)

        _, together = runs(name, 0.8, POISON)
        state = estimator.init(POINT)
        for t, (key, params) in enumerate(zip(KEYS[3], np.asarray(POINTS), strict=True)):
            valid = answered(name, 0.8)[3, t]
            state, alone = one(key, state, params, valid, np.float32(POISON))
            alone, same = jax.device_get(alone), jax.tree.map(lambda x, t=t: x[3, t], together)
            np.testing.assert_allclose(alone.candidates, same.candidates, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(alone.gradient, same.gradient, rtol=1e-4, atol=1e-3)
            assert alone.info.num_directions == same.info.num_directions
            np.testing.assert_allclose(alone.info.gradient_norm, np.linalg.norm(alone.gradient), rtol=1e-5)
            if "anchor" not in name:  # where it is the loss at the parameters
                np.testing.assert_allclose(alone.info.loss, alone.losses[valid].mean(), rtol=1e-5)
        assert len(traces) == 1

    def test_keys_give_different_candidates(self, name):
        _, steps = runs(name, 0.8, CLEAN)
        assert (steps.candidates[0, 0] != steps.candidates[1, 0]).any()
        assert (steps.candidates[0, 0] - POINTS[0] != steps.candidates[0, 1] - POINTS[1]).any()

    def test_no_answer_gives_a_zero_estimate_and_is_counted(self, name):
        state, steps = runs(name, 0.0, POISON)
        assert not np.asarray(steps.gradient).any()
        assert not np.asarray(steps.info.num_directions).any()
        assert not np.asarray(steps.info.loss).any()
        leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
        assert all(np.isfinite(x).all() for x in leaves)
        counters = [x for x in leaves if np.issubdtype(x.dtype, np.integer)]
        assert counters
        assert all((x == len(POINTS)).all() for x in counters)

    def test_lost_losses_never_reach_the_estimate(self, name):
        clean, poisoned = (runs(name, 0.8, poison) for poison in (CLEAN, POISON))
        for a, b in zip(
            jax.tree.leaves((clean[0], clean[1].gradient, clean[1].info)),
            jax.tree.leaves((poisoned[0], poisoned[1].gradient, poisoned[1].info)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
            assert np.isfinite(b).all()


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_mean_is_the_true_gradient(name, share):
    """At the last of four points, also with 20 % of the answers lost, within 4 standard errors where any came."""
    _, steps = runs(name, share, CLEAN)
    used = steps.info.num_directions[:, -1] > 0
    drawn = np.float64(steps.gradient[:, -1])[used]
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert used.mean() > 0.95
    assert error.max() < 0.05 * np.abs(TRUE_GRADIENT).max()
    np.testing.assert_array_less(np.abs(drawn.mean(0) - TRUE_GRADIENT), 4 * error)


def numpy_loss(point):
    targets, curvature = np.asarray(TARGETS, np.float64), np.asarray(CURVATURE, np.float64)
    return np.mean([0.5 * (point - t) @ curvature @ (point - t) for t in targets])


def numpy_two_sided(points, deltas, duals, sizes):
    """Spall (1992), mean over directions; one estimate for each point."""
    return [
        np.mean([(numpy_loss(p + c * x) - numpy_loss(p - c * x)) / (2 * c) * y for x, y in zip(xs, ys)], axis=0)  # noqa: B905
        for p, xs, ys, c in zip(points, deltas, duals, sizes, strict=True)
    ]


def numpy_one_sided(points, deltas, duals, sizes):
    return [
        np.mean([(numpy_loss(p + c * x) - numpy_loss(p)) / c * y for x, y in zip(xs, ys, strict=True)], axis=0)
        for p, xs, ys, c in zip(points, deltas, duals, sizes, strict=True)
    ]


def numpy_residual(points, deltas, duals, sizes):
    """Zhang et al. (2022), equation 3, for each direction by itself; the first step has no estimate."""
    estimates, last = [np.zeros(6)], None
    for p, xs, ys, c in zip(points, deltas, duals, sizes, strict=True):
        now = [numpy_loss(p + c * x) for x in xs]
        if last is not None:
            estimates.append(np.mean([(a - b) / c * y for a, b, y in zip(now, last, ys, strict=True)], axis=0))
        last = now
    return estimates


NUMPY_VERSIONS = {
    "two-sided": (spsa, numpy_two_sided),
    "one-sided": (one_sided_spsa, numpy_one_sided),
    "residual": (residual_feedback, numpy_residual),
}


@pytest.mark.parametrize(("make", "expected"), NUMPY_VERSIONS.values(), ids=NUMPY_VERSIONS.keys())
def test_equals_numpy_with_the_same_directions(make, expected, key):
    """Over four steps of a schedule; float32 losses of 10 carry 1e-6 each, which 1/c makes 1e-5."""
    directions = segmented_uniform()
    schedule = optax.exponential_decay(0.4, 1, 0.8)
    estimator = make(directions, 5, schedule)

    @partial(jax.jit, compiler_options=QUICKLY)
    def run(key):
        def one(state, row):
            t, params = row
            step_key = jax.random.fold_in(key, t)
            ks = jnp.arange(estimator.num_candidates)
            losses = jax.vmap(lambda k: losses_at(estimator.perturb(step_key, state, params, k)))(ks)
            gradient, state, _ = estimator.estimate(step_key, state, params, losses, jnp.ones(losses.shape, bool))
            drawn = jax.vmap(lambda j: directions.sample(step_key, j, params))(jnp.arange(5))
            return state, (gradient, drawn, jax.vmap(directions.dual)(drawn))

        return jax.lax.scan(one, estimator.init(POINT), (jnp.arange(len(POINTS)), POINTS))[1]

    gradients, *drawn = run(key)
    deltas, duals = (np.float64(x) for x in drawn)
    wanted = expected(np.float64(POINTS), deltas, duals, [0.4 * 0.8**t for t in range(len(POINTS))])
    np.testing.assert_allclose(gradients, wanted, rtol=1e-4, atol=1e-4)


def test_guided_directions_lean_towards_the_past(key):
    """Their second moment is (1 - s) I + (s d/r) U Uᵀ, where U spans the past."""
    estimator = guided_spsa(1, C, history=2, share=0.5)
    past = np.random.default_rng(3).normal(size=(2, 6))
    state = estimator.init(POINT)._replace(past=jnp.asarray(past, jnp.float32), known=jnp.asarray(2.0))
    keys = jax.random.split(key, 20_000)
    drawn = jax.vmap(lambda key: (estimator.perturb(key, state, POINT, 0) - POINT) / C)(keys)
    products = np.einsum("ni,nj->nij", *[np.float64(drawn)] * 2)
    basis = scipy.linalg.orth(past.T)
    wanted = 0.5 * np.eye(6) + 0.5 * 6 / 2 * basis @ basis.T
    error = products.std(0) / np.sqrt(len(keys))
    np.testing.assert_array_less(np.abs(products.mean(0) - wanted), 4 * error)


def test_guided_remembers_the_last_estimates():
    state, steps = runs("guided", 1.0, CLEAN)
    np.testing.assert_array_equal(state.past, steps.gradient[:, :1:-1])
    assert (np.asarray(state.known) == len(POINTS)).all()


def test_guided_by_the_same_estimate_twice_stays_finite(key):
    estimator = guided_spsa(1, C, history=2)
    state = estimator.init(POINT)._replace(past=jnp.stack([POINT, POINT]), known=jnp.asarray(2.0))
    assert jnp.isfinite(estimator.perturb(key, state, POINT, 0)).all()


@pytest.mark.parametrize(("history", "share"), [(0, 0.5), (2, 1.0), (2, -0.1), (7, 0.5)])
def test_guided_refuses_what_has_no_meaning(history, share):
    with pytest.raises(ValueError, match="history"):
        guided_spsa(Q, C, history=history, share=share).init(POINT)


@pytest.mark.parametrize(("directions", "q"), [(segmented_uniform(), 1), (hadamard(), 5)])
def test_variance_on_a_linear_function_is_that_of_the_directions(directions, q, key):
    """E‖ĝ - g‖²/‖g‖² within 3 standard errors of 1.5 % at most; all families are in `test_directions.py`."""
    slope = jnp.asarray(np.random.default_rng(1).normal(size=8), jnp.float32)
    estimator = spsa(directions, q, 0.5)
    state = estimator.init(slope)

    @partial(jax.jit, compiler_options=QUICKLY)
    @jax.vmap
    def errors(key):
        candidates = jax.vmap(lambda k: estimator.perturb(key, state, slope, k))(jnp.arange(2 * q))
        losses = (candidates * slope).sum(-1)[:, None]
        gradient, _, _ = estimator.estimate(key, state, slope, losses, jnp.ones(losses.shape, bool))
        return jnp.sum((gradient - slope) ** 2) / jnp.sum(slope**2)

    drawn = np.float64(errors(jax.random.split(key, 20_000)))
    error, stated = drawn.std() / np.sqrt(len(drawn)), directions.variance(8, q)
    assert error < 0.015 * stated
    assert abs(drawn.mean() - stated) < 3 * error


def exact(estimator, key, valid=None):
    """One estimate at POINT, with what was asked."""
    state = estimator.init(POINT)

    @partial(jax.jit, compiler_options=QUICKLY)
    def run(key, valid):
        candidates = jax.vmap(lambda k: estimator.perturb(key, state, POINT, k))(jnp.arange(estimator.num_candidates))
        losses = jax.vmap(losses_at)(candidates)
        return losses, estimator.estimate(key, state, POINT, losses, valid)

    losses, (gradient, _, info) = run(key, jnp.ones((estimator.num_candidates, 4), bool) if valid is None else valid)
    return np.float64(losses), gradient, info


def numpy_slopes(losses, size):
    return (losses[0::2] - losses[1::2]).mean(axis=1) / (2 * size)


def signs(key, count):
    return np.stack([np.asarray(rademacher().sample(key, j, POINT)) for j in range(count)])


def test_one_failed_side_drops_its_pair_only(key):
    valid = jnp.ones((6, 4), bool).at[2].set(False)  # the plus side of direction 1
    losses, gradient, info = exact(spsa(rademacher(), 3, 0.1), key, valid)
    assert info.num_directions == 2
    expected = (numpy_slopes(losses, 0.1)[:, None] * signs(key, 3))[[0, 2]].mean(axis=0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_one_failed_example_drops_out_of_its_pair_only(key):
    valid = jnp.ones((4, 4), bool).at[3, 1].set(False)  # example 1 on the minus side of direction 1
    losses, gradient, info = exact(spsa(rademacher(), 2, 0.1), key, valid)
    assert info.num_directions == 2
    differences = (losses[0::2] - losses[1::2]) / 0.2
    slopes = np.array([differences[0].mean(), differences[1, [0, 2, 3]].mean()])
    np.testing.assert_allclose(gradient, (slopes[:, None] * signs(key, 2)).mean(axis=0), rtol=1e-4, atol=1e-4)


def test_one_sided_needs_its_base_point(key):
    valid = jnp.ones((4, 4), bool)
    assert exact(one_sided_spsa(rademacher(), 3, 0.1), key, valid.at[0].set(False))[2].num_directions == 0
    assert exact(one_sided_spsa(rademacher(), 3, 0.1), key, valid.at[2].set(False))[2].num_directions == 2


def test_residual_feedback_compares_with_the_last_answer(key):
    """A point without an answer has no slope, and the next is compared with the one before it."""
    estimator = residual_feedback(rademacher(), 1, 0.5)
    state = estimator.init(POINT)
    told = [(3.0, True), (np.nan, False), (7.0, True), (6.0, True)]
    slopes, used = [], []
    run = jax.jit(estimator.estimate, compiler_options=QUICKLY)
    for loss, answered in told:
        gradient, state, info = run(key, state, POINT, jnp.full((1, 4), loss), jnp.full((1, 4), answered))
        slopes.append(float((gradient * signs(key, 1)[0]).mean()))
        used.append(int(info.num_directions))
    assert used == [0, 0, 1, 1]
    np.testing.assert_allclose(slopes, [0, 0, (7 - 3) / 0.5, (6 - 7) / 0.5], rtol=1e-6)


def test_residual_feedback_starts_within_descent(key):
    """Its first step estimates nothing and yet has to be remembered."""
    optimizer = descent(residual_feedback(rademacher(), 2, 0.5), optax.sgd(0.1))
    state = optimizer.init(POINT)
    tell = jax.jit(optimizer.tell, compiler_options=QUICKLY)
    for loss in (3.0, 2.0):
        losses = jnp.full((2, 4), loss).at[1].add(1.0)
        before = state
        state, _ = tell(key, state, losses, jnp.ones((2, 4), bool))
    assert (state.params != before.params).any()


@pytest.mark.parametrize(("make", "first"), [(spsa, 0), (one_sided_spsa, 1), (residual_feedback, 0)])
def test_perturbation_size_may_follow_a_schedule(make, first, key):
    estimator = make(rademacher(), 1, optax.exponential_decay(0.4, 1, 0.5))
    state = estimator.init(POINT)
    size, zeros = estimator.num_candidates, jnp.zeros((estimator.num_candidates, 4))
    run = jax.jit(estimator.estimate, compiler_options=QUICKLY)
    for c in (0.4, 0.2, 0.1):
        sides = [np.asarray(estimator.perturb(key, state, POINT, jnp.asarray(k)) - POINT) for k in range(size)]
        np.testing.assert_allclose(np.abs(sides[first]), c, rtol=1e-5)
        if make is spsa:
            np.testing.assert_allclose(sides[0], -sides[1], rtol=1e-5)
        if make is one_sided_spsa:
            assert not sides[0].any()
        _, state, _ = run(key, state, POINT, zeros, zeros == 0)


def test_slopes_are_clipped(key):
    losses, gradient, _ = exact(spsa(rademacher(), 5, 0.1, clipped(1.5)), key)
    slopes = numpy_slopes(losses, 0.1)
    assert (np.abs(slopes) > 1.5).any()
    assert (np.abs(slopes) < 1.5).any()
    expected = (np.clip(slopes, -1.5, 1.5)[:, None] * signs(key, 5)).mean(axis=0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_largest_slopes_are_trimmed_among_the_usable(key):
    valid = jnp.ones((10, 4), bool).at[3].set(False)  # direction 1: four are left, of which half go
    losses, gradient, info = exact(spsa(rademacher(), 5, 0.1, trimmed(0.5)), key, valid)
    slopes = numpy_slopes(losses, 0.1)
    usable = [0, 2, 3, 4]
    kept = sorted(usable, key=lambda j: abs(slopes[j]))[:2]
    expected = sum(slopes[j] * signs(key, 5)[j] for j in kept) / 4
    assert info.num_directions == 4
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [spsa, one_sided_spsa, residual_feedback])
@pytest.mark.parametrize(("q", "c", "name"), [(0, 0.1, "num_directions"), (1, 0.0, "perturbation_size")])
def test_sizes_must_be_positive(make, q, c, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {q if q == 0 else c}"):
        make(rademacher(), q, c)
