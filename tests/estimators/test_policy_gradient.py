"""Policy gradients against enumeration of all prompts, the published estimator, and failed answers."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedbbpt_jax.estimators.policy_gradient import (
    bdpl,
    expected_loss,
    gumbel,
    leave_one_out,
    logits,
    mean,
    optimal_scalar,
    policy_gradient,
    probabilities,
    probabilities_constrained,
    probabilities_negative,
    probabilities_normalized,
)

QUICKLY = {
    "xla_backend_optimization_level": 0
}  # programs that run once: better ones take longer to make than they save
N, K, NUM_DRAWS = 3, 4, 20_000
P = jnp.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
LOSSES = jnp.array([[3.0, 1.0, 2.0], [0.5, 4.0, 1.0], [2.0, 2.5, 0.0]])  # of each of the nine prompts

# Policies, parameters that stand for P, and what the mean of their scores is of the gradient on the simplex.
POLICIES = {
    "zero": (probabilities(), P, 1.0),
    "negative": (probabilities_negative(), P, 2.0),
    "normalized": (probabilities_normalized(), P, 1 + 1 / N),
    "constrained": (probabilities_constrained(), P, 2.0),
    "logits": (logits(), jnp.log(P) + 0.7, 1.0),
    "gumbel": (gumbel(0.5), 2.0 * P**0.5, 1.0),
}
OVER_PROBABILITIES = ("zero", "negative", "normalized", "constrained")
BASELINES = {"mean": mean, "leave-one-out": leave_one_out, "optimal-scalar": optimal_scalar}
# `optimal_scalar` wants scores of the same mean for all words, as tested below.
PAIRS = [
    (policy, baseline)
    for policy, baseline in product(POLICIES, BASELINES)
    if not (policy in ("negative", "normalized") and baseline == "optimal-scalar")
]
every_policy = pytest.mark.parametrize("name", POLICIES)


def loss(ids):
    return LOSSES[ids[0], ids[1]]


def answer(estimator, key, params, valid, loss=loss):
    state = estimator.init(params)
    samples = jax.vmap(lambda k: estimator.perturb(key, state, params, k))(jnp.arange(estimator.num_candidates))
    losses = jnp.where(valid, jax.vmap(loss)(samples)[:, None], jnp.nan)
    gradient, _, info = estimator.estimate(key, state, params, losses, valid)
    return samples, losses[:, 0], gradient, info


def centred(name, gradient):
    """On the simplex a constant added to all words of a position is no gradient."""
    return gradient - gradient.mean(-1, keepdims=True) if name in OVER_PROBABILITIES else gradient


def true_gradient(name):
    policy, params, factor = POLICIES[name]
    gradient = jax.jit(jax.grad(lambda x: expected_loss(policy, x, loss)), compiler_options=QUICKLY)(params)
    return factor * centred(name, np.float64(gradient))


@cache
def compiled(name):
    """`(keys, valid) -> gradients and how many were used` of each baseline, from the same samples."""
    policy, params, _ = POLICIES[name]

    def run(key, valid):
        runs = [answer(policy_gradient(policy, K, b), key, params, valid) for b in BASELINES.values()]
        return jnp.stack([r[2] for r in runs]), runs[0][3].num_directions

    return jax.jit(jax.vmap(run), compiler_options=QUICKLY)


@cache
def draws(name, share):
    keys, valid = (
        jax.random.split(jax.random.key(4), NUM_DRAWS),
        np.random.default_rng(2).random((NUM_DRAWS, K, 1)) < share,
    )
    gradients, used = compiled(name)(keys, valid)
    return dict(zip(BASELINES, np.float64(gradients).swapaxes(0, 1), strict=True)), np.asarray(used)


@pytest.mark.parametrize(("name", "baseline"), PAIRS)
def test_mean_is_the_gradient_by_enumeration(name, baseline):
    """Within 4 standard errors, that are below a tenth of the largest number; (K - 1)/K of it for `mean`."""
    wanted = true_gradient(name) * ((K - 1) / K if baseline == "mean" else 1.0)
    drawn = centred(name, draws(name, 1.0)[0][baseline])
    error = drawn.std(0) / np.sqrt(NUM_DRAWS)
    assert error.max() < 0.1 * np.abs(wanted).max()
    np.testing.assert_array_less(np.abs(drawn.mean(0) - wanted), 4 * error + 1e-6)


@pytest.mark.parametrize(("name", "baseline"), [pair for pair in PAIRS if pair[1] != "mean"])
def test_lost_answers_leave_the_mean_unbiased(name, baseline):
    """20 % lost at random, and two or more left to be compared: 97 % of the estimates."""
    gradients, used = draws(name, 0.8)
    assert abs((used > 0).mean() - (1 - 0.2**4 - 4 * 0.8 * 0.2**3)) < 0.01
    drawn = centred(name, gradients[baseline])[used > 0]
    error = drawn.std(0) / np.sqrt(len(drawn))
    np.testing.assert_array_less(np.abs(drawn.mean(0) - true_gradient(name)), 4 * error + 1e-6)
    assert not gradients[baseline][used == 0].any()


@every_policy
def test_scores_have_the_same_mean_for_all_words(name):
    """Σ_j p(j) v(j), by enumeration: any baseline leaves the gradient on the simplex as it is.

    Not so `negative` and `normalized`, which need advantages that sum to zero.
    """
    policy, params, _ = POLICIES[name]
    prompts = list(product(range(N), repeat=2))
    scores = np.stack([policy.score(params, jnp.array(ids)) for ids in prompts])
    chances = np.array([P[0, i] * P[1, j] for i, j in prompts])
    spread = np.ptp(np.tensordot(chances, scores, 1), axis=-1).max()
    if name in ("negative", "normalized"):
        assert spread > 0.5
    else:
        assert spread < 1e-5


@every_policy
def test_samples_follow_the_probabilities(name):
    policy, params, _ = POLICIES[name]
    if name not in ("logits", "gumbel"):
        np.testing.assert_allclose(jnp.exp(policy.log_probabilities(params)), P, rtol=1e-6)
        return
    np.testing.assert_allclose(jnp.exp(policy.log_probabilities(params)), P, rtol=1e-5)
    estimator = policy_gradient(policy, 2, mean)
    draw = lambda key: estimator.perturb(key, estimator.init(params), params, 1)  # noqa: E731
    ids = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), NUM_DRAWS)))
    assert ids.dtype == np.int32
    shares = np.stack([(ids == word).mean(0) for word in range(N)], axis=1)
    # 4 standard errors of a share, at most 0.5/sqrt(20,000) each
    np.testing.assert_allclose(shares, P, atol=4 * 0.5 / np.sqrt(NUM_DRAWS))


@pytest.mark.parametrize("name", ["zero", "logits", "gumbel"])
def test_score_is_the_gradient_of_the_log_probability(name):
    policy, params, _ = POLICIES[name]
    log_chance = lambda x, ids: policy.log_probabilities(x)[jnp.arange(2), ids].sum()  # noqa: E731
    ids = jnp.array(list(product(range(N), repeat=2)))
    expected = jax.jit(jax.vmap(jax.grad(log_chance), (None, 0)), compiler_options=QUICKLY)(params, ids)
    np.testing.assert_allclose(jax.vmap(policy.score, (None, 0))(params, ids), expected, rtol=1e-5, atol=1e-6)


@every_policy
def test_expected_loss_equals_a_loop_over_all_prompts(name):
    policy, params, _ = POLICIES[name]
    total = sum(float(P[0, i] * P[1, j] * LOSSES[i, j]) for i in range(N) for j in range(N))
    np.testing.assert_allclose(expected_loss(policy, params, loss), total, rtol=1e-5)


def test_expected_loss_of_three_positions():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 3)
    table = np.random.default_rng(1).normal(size=(4, 4, 4))
    total = sum(p[0, a] * p[1, b] * p[2, c] * table[a, b, c] for a, b, c in product(range(4), repeat=3))
    of_table = lambda ids: jnp.asarray(table, jnp.float32)[ids[0], ids[1], ids[2]]  # noqa: E731
    np.testing.assert_allclose(expected_loss(probabilities(), jnp.float32(p), of_table), total, rtol=1e-5)


def published_bdpl(samples, losses, p):
    """1/(K - 1) Σ (L - mean) v, with 1/p at the sampled word and -1/p elsewhere."""
    total = np.zeros(p.shape)
    for ids, value in zip(samples, losses, strict=True):
        v = -1 / p
        for i, j in enumerate(ids):
            v[i, j] = 1 / p[i, j]
        total += (value - np.mean(losses)) * v
    return total / (len(losses) - 1)


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (lambda: bdpl(K), 1 / 2),
        (lambda: policy_gradient(probabilities_negative(), K, leave_one_out), 1.0),
        (lambda: policy_gradient(probabilities_normalized(), K, leave_one_out), (1 + 1 / N) / 2),
    ],
    ids=["bdpl", "negative", "normalized"],
)
def test_is_the_published_estimator_sample_by_sample(make, factor):
    run = partial(answer, make(), params=P, valid=jnp.ones((K, 1), bool))
    keys = jax.random.split(jax.random.key(2), 50)
    samples, losses, gradients, _ = jax.jit(jax.vmap(lambda key: run(key)), compiler_options=QUICKLY)(keys)
    expected = [published_bdpl(s, x, np.float64(P)) for s, x in zip(np.asarray(samples), losses, strict=True)]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(gradients, factor * np.array(expected), rtol=1e-5, atol=1e-5)


def test_leave_one_out_is_the_mean_scaled():
    losses = jnp.array([3.0, -1.0, 2.5, 7.0, 100.0])
    answered = jnp.array([True, True, True, True, False])
    advantages = (losses - leave_one_out(losses, answered, jnp.full(5, 9.0)))[:4]
    np.testing.assert_allclose(advantages, 4 / 3 * (losses - losses[:4].mean())[:4], rtol=1e-5)
    np.testing.assert_allclose(mean(losses, answered, jnp.ones(5)), jnp.full(5, losses[:4].mean()))


@pytest.mark.parametrize(
    "squared_scores", [[4.0, 1.0, 0.5, 3.0, 9.0], [1.0, 1e-9, 2e-9, 3e-9, 1.0], [1e9, 1.0, 2.0, 3.0, 1.0]]
)
def test_optimal_scalar_is_the_weighted_mean_of_the_others(squared_scores):
    """Also where one outweighs all others, as that of a rare word does: nothing of theirs may be rounded away."""
    losses = np.array([3.0, -1.0, 2.5, 7.0, 100.0])
    answered = np.array([True, True, True, True, False])
    baselines = optimal_scalar(jnp.float32(losses), jnp.asarray(answered), jnp.float32(squared_scores))
    for k in range(4):
        others = [i for i in range(4) if i != k]
        expected = np.average(losses[others], weights=np.array(squared_scores)[others])
        np.testing.assert_allclose(baselines[k], expected, rtol=1e-5)


def test_optimal_scalar_has_less_variance_than_the_mean():
    """Rare words are dear here, and have scores so large that their loss should be the baseline."""
    p = jnp.array([[0.8, 0.1, 0.1]])
    dear = lambda ids: jnp.array([0.0, 10.0, 12.0])[ids[0]]  # noqa: E731
    valid = jnp.ones((16, 1), bool)

    def run(key):
        return [answer(policy_gradient(probabilities(), 16, b), key, p, valid, dear)[2] for b in BASELINES.values()]

    drawn = jax.jit(jax.vmap(run), compiler_options=QUICKLY)(jax.random.split(jax.random.key(3), 5_000))
    of_mean, _, of_optimal = (np.var(centred("zero", np.float64(x)), axis=0).sum() for x in drawn)
    assert of_optimal < 0.7 * of_mean  # 5,000 draws know a variance to some 3 %


@pytest.mark.parametrize("name", ["zero", "constrained"])
def test_words_of_probability_zero_never_come_and_give_no_nan(name):
    p = jnp.array([[0.0, 0.3, 0.7], [0.0, 1.0, 0.0]])
    valid = jnp.ones((K, 1), bool)

    @partial(jax.jit, compiler_options=QUICKLY)
    @jax.vmap
    def run(key):
        runs = [answer(policy_gradient(POLICIES[name][0], K, b), key, p, valid) for b in BASELINES.values()]
        return runs[0][0], jnp.stack([r[2] for r in runs]), jnp.stack([r[3].gradient_norm for r in runs])

    samples, gradients, norms = jax.device_get(run(jax.random.split(jax.random.key(6), 200)))
    assert (samples[:, :, 0] > 0).all()
    assert (samples[:, :, 1] == 1).all()
    assert np.isfinite(gradients).all()
    assert np.isfinite(norms).all()
    assert gradients.any(axis=(0, 2, 3)).all()
    if name == "zero":
        assert not gradients[:, :, np.asarray(p) == 0].any()


@pytest.mark.parametrize("name", ["zero", "gumbel"])
def test_one_answer_alone_or_none_gives_zero(name):
    policy, params, _ = POLICIES[name]
    estimator, traces = policy_gradient(policy, K, optimal_scalar), []

    @partial(jax.jit, compiler_options=QUICKLY)
    def run(state, losses, valid):
        traces.append(valid)
        return estimator.estimate(jax.random.key(8), state, params, losses, valid)

    state = estimator.init(params)
    losses = np.arange(8.0, dtype=np.float32).reshape(K, 2)
    for answered in ([], [2]):
        valid = np.zeros((K, 2), bool)
        valid[answered, 1] = True
        gradient, state, info = run(state, np.where(valid, losses, np.nan), valid)
        assert not np.asarray(gradient).any()
        assert info.num_directions == 0
        assert info.gradient_norm == 0
        assert info.loss == (5.0 if answered else 0.0)
    gradient, state, info = run(state, losses, np.ones((K, 2), bool))
    assert np.asarray(gradient).any()
    assert info.num_directions == K
    np.testing.assert_allclose(info.loss, 3.5)
    np.testing.assert_allclose(info.gradient_norm, np.linalg.norm(gradient), rtol=1e-6)
    assert state.step == 3
    assert len(traces) == 1


def test_two_answers_are_compared_with_each_other():
    """Advantages are ± their difference; the mean is over the two."""
    estimator = bdpl(K)
    losses, valid = jnp.array([[9.0], [1.0], [9.0], [4.0]]), jnp.array([[False], [True], [False], [True]])

    @partial(jax.jit, compiler_options=QUICKLY)
    def run(key):
        state = estimator.init(P)
        scores = [probabilities().score(P, estimator.perturb(key, state, P, k)) for k in (1, 3)]
        return scores, estimator.estimate(key, state, P, losses, valid)

    (first, second), (gradient, _, info) = run(jax.random.key(10))
    assert (first != second).any()
    np.testing.assert_allclose(gradient, (1.0 - 4.0) * (first - second) / 2, rtol=1e-5, atol=1e-5)
    assert info.num_directions == 2


def bisection(row):
    """The simplex point nearest to a row: clip(row - v, 0) for the v where it sums to 1."""
    low, high = row.min() - 1, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - high, 0)


def test_simplex_projection_of_optax_is_exact_also_with_zeros():
    rng = np.random.default_rng(0)
    outside = np.concatenate([rng.normal(0, size, (20, 7)) for size in (0.01, 0.3, 5.0)])
    inside = np.concatenate([rng.dirichlet(np.full(7, 0.2), 5), np.eye(7), np.zeros((1, 7))])
    inside[:5, 3] = 0.0
    points = np.float32(np.concatenate([outside, inside]))
    projected = jax.jit(jax.vmap(optax.projections.projection_simplex))(points)
    assert np.isfinite(projected).all()
    assert (np.asarray(projected) >= 0).all()
    # Cumulative sums of seven float32 numbers of up to 15 carry some 1e-6.
    np.testing.assert_allclose(projected, [bisection(row) for row in np.float64(points)], atol=5e-6)
    np.testing.assert_allclose(projected.sum(-1), 1, atol=5e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy_gradient(logits(), 1, mean), "num_samples must be at least 2, got 1"),
        (lambda: bdpl(0), "num_samples must be at least 2, got 0"),
        (lambda: gumbel(0.0), "temperature must be positive, got 0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
