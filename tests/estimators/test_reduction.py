"""The wrappers against what they promise; that each is an estimator is tested with all others in `test_spsa.py`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from fedbbpt_jax.estimators.directions import rademacher, segmented_uniform
from fedbbpt_jax.estimators.reduction import (
    Anchor,
    WrappedState,
    clipped,
    ranks,
    standardised,
    trimmed,
    with_anchor,
    with_averaging,
    with_control_variate,
    with_shaped_losses,
    with_transformation,
)
from fedbbpt_jax.estimators.spsa import SpsaState, one_sided_spsa, spsa
from fedbbpt_jax.optimizers.descent import descent

pytestmark = pytest.mark.slow  # compiles dozens of small programs

QUICKLY = {
    "xla_backend_optimization_level": 0
}  # programs that run once: better ones take longer to make than they save
SLOPE = jnp.asarray(np.random.default_rng(1).normal(size=6), jnp.float32)
POINT = jnp.arange(6.0) / 3
CURVATURE = jnp.diag(jnp.linspace(0.5, 2.0, 6)) + 0.1
ALL = jnp.ones((4, 1), bool)


def quadratic(candidate):
    return (0.5 * candidate @ CURVATURE @ candidate + candidate @ SLOPE)[None]  # B = 1


def linear(candidate):
    return (candidate @ SLOPE)[None]


def answer(estimator, loss, key, state, params, valid=None):
    """One estimate; all answers are given if it is not said which."""
    ks = jnp.arange(estimator.num_candidates)
    losses = jax.vmap(lambda k: loss(estimator.perturb(key, state, params, k)))(ks)
    valid = jnp.ones(losses.shape, bool) if valid is None else valid
    return estimator.estimate(key, state, params, losses, valid)


def many(function, num_draws, *arguments):
    keys = jax.random.split(jax.random.key(3), num_draws)
    return jax.device_get(jax.jit(jax.vmap(function), compiler_options=QUICKLY)(keys, *arguments))


def assert_mean(drawn, wanted):
    """Within 4 standard errors, that are small against what is measured."""
    drawn = np.float64(drawn)
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert error.max() < 0.05 * np.abs(wanted).max()
    np.testing.assert_array_less(np.abs(drawn.mean(0) - wanted), 4 * error + 1e-5)


def test_spsa_gc_is_momentum_inside_or_after_the_estimator_bit_for_bit(key):
    estimator = spsa(segmented_uniform(), 3, lambda step: 0.1 / (step + 1.0) ** 0.1)
    trace = optax.trace(0.9, nesterov=True)
    rate = optax.scale_by_learning_rate(lambda count: 0.05 / (count + 2.0) ** 0.4)
    inside = descent(with_transformation(estimator, trace), rate)
    after = descent(estimator, optax.chain(trace, rate))

    def trajectory(optimizer, key):
        def one(state, key):
            losses = jax.vmap(lambda k: quadratic(optimizer.ask(key, state, k)))(jnp.arange(6))
            state, _ = optimizer.tell(key, state, losses, jnp.ones(losses.shape, bool))
            return state, optimizer.solution(state)

        return jax.lax.scan(one, optimizer.init(POINT), jax.random.split(key, 30))[1]

    first, second = (jax.jit(partial(trajectory, optimizer))(key) for optimizer in (inside, after))
    assert (first[-1] != first[-2]).any()
    np.testing.assert_array_equal(first, second)


def test_transformation_forgets_nothing_of_an_unanswered_step(key):
    inner = spsa(rademacher(), 2, 0.1)
    estimator = with_transformation(inner, optax.trace(0.9))
    run, bare = (jax.jit(partial(answer, e, quadratic), compiler_options=QUICKLY) for e in (estimator, inner))
    first, state, _ = run(key, estimator.init(POINT), POINT, ALL)
    nothing, kept, info = run(key, state, POINT, ~ALL)
    assert not nothing.any()
    assert info.gradient_norm == 0
    np.testing.assert_array_equal(kept.memory.trace, state.memory.trace)
    assert kept.inner.step == 2
    other = jax.random.fold_in(key, 2)
    moved, _, _ = run(other, kept, POINT, ALL)
    np.testing.assert_allclose(moved, bare(other, kept.inner, POINT, ALL)[0] + 0.9 * first, rtol=1e-5, atol=1e-5)


class TestControlVariate:
    def test_has_no_variance_left_once_its_prediction_is_the_gradient(self):
        """On a linear function: g - h is estimated, with the variance (d - 1)/q·‖g - h‖² = 5/2 of it."""
        estimator = with_control_variate(spsa(rademacher(), 2, 0.5))

        def errors(key, prediction):
            state = WrappedState(SpsaState(jnp.zeros((), jnp.int32)), prediction)
            gradient, _, _ = answer(estimator, linear, key, state, POINT)
            return gradient - SLOPE

        predictions = jnp.repeat(jnp.stack([0 * SLOPE, SLOPE, SLOPE + 0.1]), 4_000, axis=0)
        drawn = many(errors, 12_000, predictions).reshape(3, 4_000, 6)
        squares = (np.float64(drawn) ** 2).sum(-1)
        for i, distance in enumerate((float(SLOPE @ SLOPE), 0.0, 6 * 0.01)):
            assert abs(squares[i].mean() - 2.5 * distance) < 4 * squares[i].std() / np.sqrt(4_000) + 1e-9
        assert_mean(drawn[2] + SLOPE, np.asarray(SLOPE))

    def test_learns_its_prediction_on_a_linear_function(self):
        """h is within (1 - β)/(1 + β) of the variance of ĝ, which shrinks as h comes closer: both go to zero."""
        estimator = with_control_variate(spsa(rademacher(), 4, 0.5), 0.8)

        def errors(key):
            def one(state, key):
                gradient, state, _ = answer(estimator, linear, key, state, POINT)
                return state, (((gradient - SLOPE) ** 2).sum(), ((state.memory - SLOPE) ** 2).sum())

            return jax.lax.scan(one, estimator.init(POINT), jax.random.split(key, 80))[1]

        of_estimate, of_prediction = (x.mean(0) / float(SLOPE @ SLOPE) for x in many(errors, 200))
        # At first that of spsa, (d - 1)/q = 1.25; 200 draws know it to some 10 %.
        assert abs(of_estimate[0] - 1.25) < 0.5
        assert of_estimate[-1] < 1e-6
        assert of_prediction[-1] < 1e-6

    def test_averages_its_estimates(self, key):
        estimator = with_control_variate(spsa(rademacher(), 2, 0.5), 0.75)
        run = jax.jit(partial(answer, estimator, quadratic), compiler_options=QUICKLY)
        first, state, info = run(key, estimator.init(POINT), POINT, ALL)
        np.testing.assert_allclose(state.memory, 0.25 * first, rtol=1e-5)
        second, after, _ = run(jax.random.fold_in(key, 1), state, POINT, ALL)
        np.testing.assert_allclose(after.memory, 0.75 * state.memory + 0.25 * second, rtol=1e-5)
        # What a researcher sees are the losses that were told, not what is left of them.
        losses = [quadratic(estimator.perturb(key, state, POINT, k))[0] for k in range(4)]
        np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-5)
        _, kept, _ = run(key, after, POINT, ~ALL)
        np.testing.assert_array_equal(kept.memory, after.memory)

    @pytest.mark.parametrize("decay", [-0.1, 1.0])
    def test_decay_is_checked(self, decay):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            with_control_variate(spsa(rademacher(), 2, 0.1), decay)


class TestAnchor:
    """On minibatches that disagree: example b of a step has the target `noise[b]`, redrawn at each step."""

    estimator = with_anchor(spsa(rademacher(), 2, 0.3), period=100)

    def after_anchored_steps(self, key, estimator, params, num_steps):
        """The estimate at `params` after some steps at POINT."""

        def one(state, row):
            key, at = row
            noise = 2.0 * jax.random.normal(jax.random.fold_in(key, 9), (6,))
            loss = lambda x: quadratic(x) + noise @ x  # noqa: E731
            gradient, state, _ = answer(estimator, loss, key, state, at)
            return state, gradient

        points = jnp.concatenate([jnp.tile(POINT, (num_steps, 1)), params[None]])
        return jax.lax.scan(one, estimator.init(POINT), (jax.random.split(key, num_steps + 1), points))[1][-1]

    def test_unbiased_away_from_the_anchor_and_less_variable_near_it(self):
        bare = spsa(rademacher(), 2, 0.3)

        def both(key, point):
            return tuple(self.after_anchored_steps(key, e, point, 20) for e in (self.estimator, bare))

        points = POINT + jnp.array([[0.5], [0.02]])
        anchored, alone = many(both, 6_000, jnp.repeat(points, 3_000, axis=0))
        for point, drawn in zip(points, (anchored[:3_000], anchored[3_000:]), strict=True):
            assert_mean(drawn, np.asarray(CURVATURE @ point + SLOPE))
        # Near: the variance of μ is a 20th, ĝ - ĝ(anchor) adds little. A third leaves room for chance.
        assert np.var(anchored[3_000:], axis=0).sum() < np.var(alone[3_000:], axis=0).sum() / 3

    def test_is_the_estimate_there_less_that_at_the_anchor_plus_the_mean(self, key):
        bare = jax.jit(partial(answer, spsa(rademacher(), 2, 0.3), quadratic), compiler_options=QUICKLY)
        run = jax.jit(partial(answer, self.estimator, quadratic), compiler_options=QUICKLY)
        state, there = self.estimator.init(POINT), []
        for t in range(3):
            step_key, params = jax.random.fold_in(key, t), POINT + 0.1 * t
            valid = jnp.ones((8, 1), bool)
            inner = state.inner
            gradient, state, info = run(step_key, state, params, valid)
            here, _, _ = bare(step_key, inner, params, valid[:4])
            expected = here if t == 0 else here - bare(step_key, inner, POINT, valid[:4])[0] + np.mean(there, axis=0)
            there.append(np.asarray(bare(step_key, inner, POINT, valid[:4])[0]))
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(info.gradient_norm, jnp.linalg.norm(gradient), rtol=1e-6)
            np.testing.assert_allclose(state.memory.mean, np.mean(there, axis=0), rtol=1e-4, atol=1e-4)
            assert state.memory.age == t + 1

    def test_moves_after_a_period_of_answered_steps(self, key):
        estimator = with_anchor(spsa(rademacher(), 2, 0.3), period=2)
        run = jax.jit(partial(answer, estimator, quadratic), compiler_options=QUICKLY)
        state = estimator.init(POINT)
        seen = []
        for t, answered in enumerate([True, False, False, True, True]):
            valid = jnp.full((8, 1), answered)
            _, state, _ = run(jax.random.fold_in(key, t), state, POINT + t, valid)
            anchor: Anchor = state.memory
            seen.append((float(anchor.params[0]), float(anchor.age)))
            assert state.inner.step == t + 1
        # The second answered step is number 3; the anchor goes where it was made, and starts anew.
        assert seen == [(0, 1), (0, 1), (0, 1), (3, 0), (3, 1)]

    def test_an_answer_without_its_twin_is_dropped(self, key):
        run = jax.jit(partial(answer, self.estimator, quadratic), compiler_options=QUICKLY)
        state = self.estimator.init(POINT)
        valid = jnp.ones((8, 1), bool)
        # Direction 0 has lost a side at the anchor, direction 1 a side at the parameters.
        gradient, kept, info = run(key, state, POINT + 1, valid.at[4].set(False).at[3].set(False))
        assert info.num_directions == 0
        assert not gradient.any()
        assert kept.memory.age == 0
        assert run(key, state, POINT + 1, valid.at[4].set(False))[2].num_directions == 1

    @pytest.mark.parametrize("period", [0, 1])
    def test_period_is_checked(self, period):
        with pytest.raises(ValueError, match="period must be at least 2"):
            with_anchor(spsa(rademacher(), 2, 0.1), period)


class TestAveraging:
    def test_is_the_mean_of_repeats_with_folded_keys(self, key):
        inner, repeats = one_sided_spsa(rademacher(), 3, 0.1), 3
        bare = jax.jit(partial(answer, inner, quadratic), compiler_options=QUICKLY)
        run = jax.jit(partial(answer, with_averaging(inner, repeats), quadratic), compiler_options=QUICKLY)
        state = inner.init(POINT)
        valid = jnp.ones((12, 1), bool)
        each = [np.asarray(bare(jax.random.fold_in(key, i), state, POINT, valid[:4])[0]) for i in range(repeats)]
        gradient, after, info = run(key, state, POINT, valid)
        np.testing.assert_allclose(gradient, np.mean(each, axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(info.gradient_norm, jnp.linalg.norm(gradient), rtol=1e-5)
        assert info.num_directions == 9
        assert after.step == 1

        # Without a base point repeat 1 has no estimate; the others count in full.
        gradient, _, info = run(key, state, POINT, valid.at[4].set(False))
        np.testing.assert_allclose(gradient, (each[0] + each[2]) / 2, rtol=1e-4, atol=1e-4)
        assert info.num_directions == 6

    def test_number_is_checked(self):
        with pytest.raises(ValueError, match="num_repeats must be at least 1, got 0"):
            with_averaging(spsa(rademacher(), 2, 0.1), 0)


LOSSES = {
    "different": [3.0, -1.0, 7.0, 0.5, 2.0, 9.0, 4.0],
    "ties": [1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 5.0],
    "all-equal": [0.1] * 7,
    "two": [4.0, 4.0],
    "large": [1e6, 1e6 + 1, 1e6 + 3],
}
ANSWERED = {"all": slice(None), "some": slice(1, None)}


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("part", ANSWERED.values(), ids=ANSWERED.keys())
class TestShapes:
    """What failed has the loss 0 and shows up as 0, wherever it would have stood among the others."""

    def told(self, losses, part):
        answered = np.zeros(len(losses), bool)
        answered[part] = True
        return np.where(answered, np.float32(losses), np.float32(0)), answered

    def test_ranks_equal_scipy(self, losses, part):
        """Equal losses have equal ranks; from -1/2 to 1/2 about a mean of 0."""
        losses, answered = self.told(losses, part)
        expected = np.zeros(len(losses))
        places = scipy.stats.rankdata(losses[answered])  # from 1, means of ties
        expected[answered] = (places - places.mean()) / max(len(places) - 1, 1)
        np.testing.assert_allclose(ranks(jnp.asarray(losses), jnp.asarray(answered)), expected, atol=1e-6)

    def test_standardised_equals_numpy(self, losses, part):
        """Up to the rounding of the mean: 1e-7 of the largest loss, over the deviation."""
        losses, answered = self.told(losses, part)
        expected, kept = np.zeros(len(losses)), np.float64(losses[answered])
        if len(set(kept)) > 1:
            expected[answered] = (kept - kept.mean()) / kept.std()
        tolerance = 1e-5 + 2e-7 * np.abs(kept).max() / max(kept.std(), 0.1)
        np.testing.assert_allclose(standardised(jnp.asarray(losses), jnp.asarray(answered)), expected, atol=tolerance)


@pytest.mark.parametrize("shape", [ranks, standardised])
def test_shapes_of_nothing_and_of_one_are_zero(shape):
    losses = jnp.array([3.0, 0.0, 0.0])
    assert not shape(losses, jnp.zeros(3, bool)).any()
    assert not shape(losses, jnp.array([True, False, False])).any()


@pytest.mark.parametrize("shape", [ranks, standardised])
def test_shaped_losses_are_those_of_the_means_and_do_not_know_the_scale(shape, key):
    inner = spsa(rademacher(), 3, 0.1)
    run = jax.jit(with_shaped_losses(inner, shape).estimate, compiler_options=QUICKLY)
    bare = jax.jit(inner.estimate, compiler_options=QUICKLY)
    state = inner.init(POINT)
    losses, valid = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), np.ones((6, 4), bool)
    valid[2], valid[5, 1] = False, False
    answered = valid.any(1)
    means = np.where(valid, losses, 0).sum(1) / np.maximum(valid.sum(1), 1)
    gradient, _, info = run(key, state, POINT, losses, valid)
    shaped = shape(jnp.asarray(means), jnp.asarray(answered))
    expected, _, _ = bare(key, state, POINT, shaped[:, None], answered[:, None])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    assert gradient.any()
    assert info.num_directions == 2
    np.testing.assert_allclose(info.loss, losses[valid].mean(), rtol=1e-5)  # not of the shaped
    scaled, _, _ = run(key, state, POINT, 1000 * losses + 5, valid)
    np.testing.assert_allclose(scaled, gradient, rtol=1e-3, atol=1e-3)


def test_ranks_of_a_flat_function_move_nothing(key):
    estimator = with_shaped_losses(spsa(rademacher(), 3, 0.1), ranks)
    run = jax.jit(estimator.estimate, compiler_options=QUICKLY)
    gradient, _, info = run(key, estimator.init(POINT), POINT, np.full((6, 4), 0.7, np.float32), np.ones((6, 4), bool))
    assert info.num_directions == 3
    assert not gradient.any()


def test_clipped_and_trimmed_slopes():
    slopes = jnp.array([-3.0, 1.0, 0.5, -0.2, 9.0])
    usable = jnp.array([True, True, True, True, False])
    np.testing.assert_allclose(clipped(0.75)(slopes, usable), [-0.75, 0.75, 0.5, -0.2, 0.75])
    np.testing.assert_allclose(trimmed(0.5)(slopes, usable)[:4], [0, 0, 0.5, -0.2])
    np.testing.assert_allclose(trimmed(0.3)(slopes, usable)[:4], [0, 1, 0.5, -0.2])  # 1.2 of four is one
    np.testing.assert_allclose(trimmed(0.0)(slopes, usable), slopes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clipped(0.0), "limit must be positive, got 0"),
        (lambda: clipped(-1.0), "limit must be positive, got -1"),
        (lambda: trimmed(-0.1), "share must be in"),
        (lambda: trimmed(1.5), "share must be in"),
    ],
)
def test_slope_shapes_check_their_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrappers_compose(key):
    """The mean over two repeats of control variates of clipped spsa, by hand."""
    inner = with_control_variate(spsa(rademacher(), 2, 0.1, clipped(0.5)), 0.5)
    whole = with_averaging(inner, 2)
    assert whole.num_candidates == 8
    bare = jax.jit(partial(answer, inner, quadratic), compiler_options=QUICKLY)
    run = jax.jit(partial(answer, whole, quadratic), compiler_options=QUICKLY)
    state = WrappedState(SpsaState(jnp.asarray(3)), 0.1 * SLOPE)
    gradient, after, _ = run(key, state, POINT, jnp.ones((8, 1), bool))
    each = [bare(jax.random.fold_in(key, i), state, POINT, ALL) for i in range(2)]
    np.testing.assert_allclose(gradient, (each[0][0] + each[1][0]) / 2, rtol=1e-4, atol=1e-4)
    assert after.inner.step == 4

    directions = [np.asarray(rademacher().sample(jax.random.fold_in(key, 0), j, POINT)) for j in range(2)]
    prediction = np.asarray(state.memory)
    value = lambda x: float(quadratic(jnp.asarray(x))[0])  # noqa: E731
    slopes = [(value(POINT + 0.1 * x) - value(POINT - 0.1 * x)) / 0.2 - prediction @ x for x in directions]
    assert max(np.abs(slopes)) > 0.5  # so that clipping shows
    expected = prediction + sum(np.clip(s, -0.5, 0.5) * x for s, x in zip(slopes, directions, strict=True)) / 2
    np.testing.assert_allclose(each[0][0], expected, rtol=1e-4, atol=1e-4)
