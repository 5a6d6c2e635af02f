"""CMA-ES against the tutorial in plain float64 and against evosax and pycma, and what must not change its runs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from fedbbpt_jax.optimizers.cma_es import (
    best_half,
    cma_es,
    decomposed,
    default_rates,
    every_rank,
    initial_distribution,
    recombination_weights,
    recombined,
    stretched,
    whitened,
)

DIM, K = 6, 8
OPTIMIZER = cma_es(K, 0.7)


def candidates(optimizer, key, state):
    return jax.vmap(lambda k: optimizer.ask(key, state, k))(jnp.arange(optimizer.num_candidates))


ASK, TELL = jax.jit(lambda key, state: candidates(OPTIMIZER, key, state)), jax.jit(OPTIMIZER.tell)


def play(optimizer, loss, params, num_generations, key):
    """Returns the last state and the mean losses of all generations."""

    def generation(state, key):
        losses = jax.vmap(loss)(candidates(optimizer, key, state))[:, None]
        state, info = optimizer.tell(key, state, losses, jnp.ones(losses.shape, bool))
        return state, info.loss

    keys = jax.random.split(key, num_generations)
    return jax.jit(lambda state: jax.lax.scan(generation, state, keys))(optimizer.init(params))


def stretched_ellipsoid(x):
    return ((jnp.linspace(1, 30, x.size) * (x - 1)) ** 2).sum()


@pytest.fixture(scope="module")
def adapted():
    """A state in which nothing is as at the beginning."""
    return play(OPTIMIZER, stretched_ellipsoid, jnp.linspace(-1, 2, DIM), 25, jax.random.key(7))[0]


# The step


class Tutorial:
    """CMA-ES with weights of the best half, as the tutorial writes it, in float64."""

    def __init__(self, mean, step_size, num_candidates):
        self.m, self.sigma, self.dim = np.array(mean, "d"), step_size, len(mean)
        self.C, self.p_sigma, self.p_c, self.g = np.eye(self.dim), np.zeros(self.dim), np.zeros(self.dim), 0
        self.full = self.weights(num_candidates)

    @staticmethod
    def weights(count):
        raw = [max(0.0, math.log((count + 1) / 2) - math.log(i)) for i in range(1, count + 1)]
        return np.array(raw) / sum(raw)

    def tell(self, points, losses):
        n, mu_eff = self.dim, 1 / (self.full**2).sum()
        c_s = (mu_eff + 2) / (n + mu_eff + 5)
        d_s = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_s
        c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
        c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
        c_mu = min(1 - c_1, 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))
        chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        w = self.weights(len(losses))
        now = 1 / (w**2).sum()
        y = (np.array(points, "d")[np.argsort(losses)] - self.m) / self.sigma
        y_w = sum(w[i] * y[i] for i in range(len(w)))
        values, vectors = np.linalg.eigh(self.C)
        self.m = self.m + self.sigma * y_w
        inverse_root = vectors @ np.diag(values**-0.5) @ vectors.T
        self.p_sigma = (1 - c_s) * self.p_sigma + math.sqrt(c_s * (2 - c_s) * now) * inverse_root @ y_w
        length = np.linalg.norm(self.p_sigma)
        self.g += 1
        h = float(length / math.sqrt(1 - (1 - c_s) ** (2 * self.g)) < (1.4 + 2 / (n + 1)) * chi)
        self.p_c = (1 - c_c) * self.p_c + h * math.sqrt(c_c * (2 - c_c) * now) * y_w
        rank_mu = sum(w[i] * np.outer(y[i], y[i]) for i in range(len(w)))
        decay = 1 + c_1 * (1 - h) * c_c * (2 - c_c) - c_1 - c_mu
        self.C = decay * self.C + c_1 * np.outer(self.p_c, self.p_c) + c_mu * rank_mu
        self.sigma *= math.exp(c_s / d_s * (length / chi - 1))
        return h


def assert_is(state, reference, atol=2e-5):
    """Numbers of size 1 after some generations, in float32 against float64."""
    np.testing.assert_allclose(state.params, reference.m, atol=atol)
    np.testing.assert_allclose(state.step_size, reference.sigma, rtol=atol)
    np.testing.assert_allclose(state.covariance, reference.C, atol=atol)
    np.testing.assert_allclose(state.step_path, reference.p_sigma, atol=atol)
    np.testing.assert_allclose(state.covariance_path, reference.p_c, atol=atol)


def test_equals_the_tutorial_in_float64(key):
    """Twelve generations: a slope that makes the path long (h = 0), then noise, and failed answers in every third."""
    rng = np.random.default_rng(0)
    state, reference = OPTIMIZER.init(jnp.linspace(-1, 2, DIM)), Tutorial(np.linspace(-1, 2, DIM), 0.7, K)
    held_back = 0
    for t in range(12):
        step_key = jax.random.fold_in(key, t)
        points = np.asarray(ASK(step_key, state))
        losses = (points.sum(1) if t < 7 else rng.normal(size=K)) + np.float32(5)
        valid = np.arange(K) != (3 if t % 3 == 2 else K)
        told = np.where(valid, losses, np.nan)[:, None].astype(np.float32)
        state, info = TELL(step_key, state, jnp.asarray(told), jnp.asarray(valid[:, None]))
        before = reference.m
        held_back += not reference.tell(points[valid], losses[valid])
        np.testing.assert_allclose(info.gradient_norm, np.linalg.norm(reference.m - before), rtol=1e-4)
        np.testing.assert_allclose(info.loss, losses[valid].mean(), rtol=1e-5)
        assert info.num_directions == valid.sum()
        assert_is(state, reference)
    assert held_back
    assert state.generation == 12
    assert np.abs(reference.C - np.eye(DIM)).max() > 0.5


def test_a_hand_worked_step():
    """d = 1 and K = 2, where the better candidate takes all: mu_eff = 1, c_sigma = 3/7, c_c = 5/7, y = 0.5."""
    state = initial_distribution(jnp.array([10.0]), 2.0)
    rates = default_rates(1, 2)
    told = recombined(state, rates, jnp.array([[0.5], [-3.0]]), jnp.array([1.0, 0.0]), jnp.array([0.5]))
    assert told.params == 11.0
    p_sigma = math.sqrt(3 / 7 * 11 / 7) * 0.5
    p_c = math.sqrt(5 / 7 * 9 / 7) * 0.5
    c_1, c_mu = 2 / (2.3**2 + 1), 2 * 0.25 / (3**2 + 1)
    expected_norm = 1 - 1 / 4 + 1 / 21
    np.testing.assert_allclose(told.step_path, [p_sigma], rtol=1e-6)
    np.testing.assert_allclose(told.covariance_path, [p_c], rtol=1e-6)
    np.testing.assert_allclose(
        told.step_size, 2 * math.exp(3 / 7 / (10 / 7) * (p_sigma / expected_norm - 1)), rtol=1e-6
    )
    np.testing.assert_allclose(told.covariance, [[1 - c_1 - c_mu + c_1 * p_c**2 + c_mu * 0.25]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parity
def test_equals_evosax(key):
    algorithms = pytest.importorskip("evosax.algorithms")
    theirs = algorithms.CMA_ES(population_size=K, solution=jnp.zeros(DIM))
    theirs.use_negative_weights = False
    rates = default_rates(DIM, K)
    hyper = theirs.default_params.replace(std_init=jnp.asarray(0.7), c_mu=rates.rank_mu)
    start = jnp.linspace(-1, 2, DIM)
    ours, their_state = OPTIMIZER.init(start), theirs.init(key, start, hyper)
    for name in ("c_std", "d_std", "c_c", "c_1", "chi_n"):
        field = {"c_std": "step_path", "d_std": "damping", "c_c": "covariance_path", "c_1": "rank_one"}
        np.testing.assert_allclose(getattr(hyper, name), getattr(rates, field.get(name, "expected_norm")), rtol=1e-6)
    for t in range(6):
        step_key = jax.random.fold_in(key, t)
        points = ASK(step_key, ours)
        losses = jax.vmap(stretched_ellipsoid)(points)
        _, their_state = theirs.ask(step_key, their_state, hyper)  # decomposes C
        their_state, _ = theirs.tell(step_key, points, losses, their_state, hyper)
        ours, _ = TELL(step_key, ours, losses[:, None], jnp.ones((K, 1), bool))
        names = [("params", "mean"), ("step_size", "std"), ("covariance", "C"), ("step_path", "p_std")]
        for our, their in [*names, ("covariance_path", "p_c")]:
            np.testing.assert_allclose(getattr(ours, our), getattr(their_state, their), atol=1e-5, rtol=1e-5)


@pytest.mark.parity
def test_equals_pycma(key):
    """But the step size, for which pycma has another rule: it is given ours."""
    purecma = pytest.importorskip("cma.more_algorithms.purecma")
    theirs = purecma.CMAES([*map(float, np.linspace(-1, 2, DIM))], 0.7, popsize=K)
    theirs.params.cmu = default_rates(DIM, K).rank_mu
    ours = OPTIMIZER.init(jnp.linspace(-1, 2, DIM))
    for t in range(6):
        step_key = jax.random.fold_in(key, t)
        points = ASK(step_key, ours)
        losses = jax.vmap(stretched_ellipsoid)(points)
        theirs.C.update_eigensystem(theirs.counteval + 1, 0)
        theirs.tell(np.asarray(points, "d").tolist(), np.asarray(losses, "d").tolist())
        ours, _ = TELL(step_key, ours, losses[:, None], jnp.ones((K, 1), bool))
        theirs.sigma = float(ours.step_size)
        np.testing.assert_allclose(ours.params, theirs.xmean, atol=1e-5)
        np.testing.assert_allclose(ours.covariance, np.array(theirs.C), atol=1e-5)
        np.testing.assert_allclose(ours.step_path, theirs.ps, atol=1e-5)
        np.testing.assert_allclose(ours.covariance_path, theirs.pc, atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "num_candidates", "published"),
    [
        (10, 10, (0.29499038303562225, 0.015283824524751714, 0.02355177665041747)),
        (3, 6, (0.5598629786005055, 0.09747248265066792, 0.057092054709502314)),
    ],
)
def test_rates_are_those_of_pycma(dim, num_candidates, published):
    """As pycma 4.5 prints c_c, c_1 and c_mu without negative weights."""
    rates = default_rates(dim, num_candidates)
    np.testing.assert_allclose((rates.covariance_path, rates.rank_one, rates.rank_mu), published, rtol=1e-6)


def test_decompositions_are_rare_where_covariances_change_slowly():
    assert default_rates(500, 5).decomposition_gap == 16
    assert default_rates(DIM, K).decomposition_gap == 1


# Weights


def test_weights_are_logarithmic_over_the_better_half():
    losses = jnp.array([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 9.0, 8.0])
    found = recombination_weights(losses, jnp.ones(8, bool))
    np.testing.assert_allclose(np.sort(found)[::-1], Tutorial.weights(8), atol=1e-6)
    np.testing.assert_array_equal(np.argsort(-found, stable=True)[:4], [1, 3, 4, 2])


def test_every_rank_has_a_weight_if_wanted():
    """The figures measured in NVFlare, whose server chooses no better half."""
    found = recombination_weights(jnp.arange(10.0), jnp.ones(10, bool), every_rank)
    expected = [0.28, 0.20, 0.15, 0.12, 0.09, 0.07, 0.05, 0.03, 0.02, 0.01]
    np.testing.assert_allclose(found, expected, atol=6e-3)


def test_equal_losses_have_equal_weights_and_numbers_do_not_matter():
    losses = jnp.array([2.0, 1.0, 2.0, 7.0, 2.0, 0.0])
    found = np.asarray(recombination_weights(losses, jnp.ones(6, bool)))
    assert found[0] == found[2] == found[4] > 0
    np.testing.assert_allclose(found.sum(), 1, atol=1e-6)
    order = np.array([4, 3, 0, 5, 1, 2])
    np.testing.assert_array_equal(recombination_weights(losses[order], jnp.ones(6, bool)), found[order])
    np.testing.assert_allclose(recombination_weights(jnp.zeros(6), jnp.ones(6, bool)), np.full(6, 1 / 6), atol=1e-6)


@pytest.mark.parametrize("zero_rank", [best_half, every_rank])
def test_a_single_answer_has_all_the_weight_and_no_answer_none(zero_rank):
    losses = jnp.array([jnp.nan, 3.0, 1.0])
    np.testing.assert_array_equal(recombination_weights(losses, jnp.array([0, 1, 0], bool), zero_rank), [0, 1, 0])
    np.testing.assert_array_equal(recombination_weights(losses, jnp.zeros(3, bool), zero_rank), np.zeros(3))


# Failed answers


def test_without_answers_only_the_counter_moves(adapted, key):
    state = adapted
    nothing = np.zeros((K, 3), bool)
    alone = nothing.copy()
    alone[2] = True
    not_a_number = np.full((K, 3), np.nan, np.float32)
    for valid, losses in [(nothing, np.ones((K, 3), "f")), (alone, np.ones((K, 3), "f")), (~nothing, not_a_number)]:
        after, info = TELL(key, state, jnp.asarray(losses), jnp.asarray(valid))
        for name, new, old in zip(state._fields, after, state, strict=True):
            np.testing.assert_array_equal(new, old + 1 if name == "generation" else old)
        assert info.num_directions == info.gradient_norm == 0


def test_a_failed_candidate_may_hold_anything(adapted, key):
    losses, valid = jax.random.normal(key, (K, 3)), jnp.arange(K)[:, None] != jnp.full(3, 5)
    expected, _ = TELL(key, adapted, losses, valid)
    for junk in (jnp.nan, jnp.inf, -jnp.inf, -100.0):
        found, _ = TELL(key, adapted, losses.at[5].set(junk), valid)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    for junk in (jnp.nan, jnp.inf):  # answers that are no numbers have failed too
        found, _ = TELL(key, adapted, losses.at[5].set(junk), jnp.ones((K, 3), bool))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_failed_examples_are_left_out_of_their_candidate(adapted, key):
    losses = jnp.stack([jnp.arange(K), 100 - jnp.arange(K), jnp.arange(K)], 1).astype(jnp.float32)
    found, _ = TELL(key, adapted, losses, jnp.array([[True, False, True]] * K))
    expected, _ = TELL(key, adapted, losses[:, :1], jnp.ones((K, 1), bool))
    np.testing.assert_allclose(found.params, expected.params, atol=1e-6)


# Candidates


def test_candidates_have_the_distribution_of_the_state(adapted, key):
    """Exactly: mean + step size x the symmetric root of C x normal noise of the candidate's own key."""
    state = adapted
    values, vectors = np.linalg.eigh(np.asarray(state.covariance, "d"))
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    points = ASK(key, state)
    for k in range(K):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, k), (DIM,)), "d")
        expected = np.asarray(state.params, "d") + float(state.step_size) * root @ noise
        np.testing.assert_allclose(points[k], expected, atol=1e-5)
    np.testing.assert_allclose(whitened(state, stretched(state, jnp.eye(DIM))), np.eye(DIM), atol=1e-3)
    assert np.linalg.cond(root) > 3


def test_candidates_are_functions_of_the_key_alone(key):
    state = OPTIMIZER.init(jnp.zeros(DIM))
    points = np.asarray(ASK(key, state))
    np.testing.assert_array_equal(points, ASK(key, state))
    others = np.asarray(ASK(jax.random.fold_in(key, 1), state))
    assert len({row.tobytes() for row in np.concatenate([points, others])}) == 2 * K


def test_a_rounding_error_of_the_covariance_moves_no_candidate_much(key):
    """With the root B D it turns them within the space of equal eigenvalues: other devices would ask for others."""
    state = initial_distribution(jnp.zeros(20), 1.0)
    noise = jax.random.normal(key, (20,))
    rounding = 1e-6 * jax.random.normal(jax.random.fold_in(key, 1), (20, 20))
    results = []
    for covariance in (jnp.eye(20), jnp.eye(20) + rounding @ rounding.T + rounding + rounding.T):
        basis, scales = decomposed(covariance, 1e7)
        results.append(stretched(state._replace(basis=basis, scales=scales), noise))
    np.testing.assert_allclose(*results, atol=1e-4)


# Invariance


def test_only_ranks_of_losses_matter(key):
    def run(transform):
        state = OPTIMIZER.init(jnp.zeros(DIM))
        for t in range(6):
            step_key = jax.random.fold_in(key, t)
            losses = transform(((ASK(step_key, state) - 1) ** 2).sum(1))
            state, _ = TELL(step_key, state, losses[:, None], jnp.ones((K, 1), bool))
        return state

    jax.tree.map(np.testing.assert_array_equal, run(lambda x: x), run(lambda x: 7 * jnp.sqrt(x) - 3))


def test_a_rotation_of_the_space_rotates_the_step(adapted, key):
    state = adapted
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))[0], jnp.float32)
    turned = state._replace(
        params=rotation @ state.params,
        covariance=rotation @ state.covariance @ rotation.T,
        basis=rotation @ state.basis,
        step_path=rotation @ state.step_path,
        covariance_path=rotation @ state.covariance_path,
    )
    noise, weights = jax.random.normal(key, (K, DIM)), recombination_weights(jnp.arange(float(K)), jnp.ones(K, bool))
    rates = default_rates(DIM, K)
    steps, turned_steps = stretched(state, noise), stretched(turned, noise @ rotation.T)
    np.testing.assert_allclose(turned_steps, steps @ rotation.T, atol=1e-4)
    plain = recombined(state, rates, steps, weights, weights @ noise)
    found = recombined(turned, rates, turned_steps, weights, weights @ noise @ rotation.T)
    np.testing.assert_allclose(found.params, rotation @ plain.params, atol=1e-4)
    np.testing.assert_allclose(found.covariance, rotation @ plain.covariance @ rotation.T, atol=1e-4)
    np.testing.assert_allclose(found.step_size, plain.step_size, rtol=1e-4)


def test_parameters_may_be_any_pytree(key):
    flat = jnp.linspace(-1, 2, DIM)
    tree = {"a": flat[:4].reshape(2, 2), "b": (flat[4:],)}
    losses = jax.random.normal(key, (K, 1))
    states = [TELL(key, OPTIMIZER.init(x), losses, jnp.ones((K, 1), bool))[0] for x in (flat, tree)]
    np.testing.assert_array_equal(jax.flatten_util.ravel_pytree(states[1].params)[0], states[0].params)
    point = OPTIMIZER.ask(key, states[1], 3)
    assert jax.tree.map(jnp.shape, point) == jax.tree.map(jnp.shape, tree)
    np.testing.assert_array_equal(jax.flatten_util.ravel_pytree(point)[0], OPTIMIZER.ask(key, states[0], 3))


# Convergence


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize(
    ("loss", "num_generations"),
    [
        (lambda x: ((x - 1) ** 2).sum(), 120),
        (lambda x: ((10 ** jnp.linspace(0, 3, DIM) * (x - 1)) ** 2).sum(), 400),
        pytest.param(rosenbrock, 500, marks=pytest.mark.slow),
    ],
    ids=["sphere", "ellipsoid", "rosenbrock"],
)
def test_converges(key, loss, num_generations):
    """To 1, from a start at some 2 from it; condition numbers of 1, 1e6 and 4e3."""
    state, losses = play(OPTIMIZER, loss, jnp.zeros(DIM), num_generations, key)
    np.testing.assert_allclose(OPTIMIZER.solution(state), 1.0, atol=1e-3)
    assert losses[-1] < 1e-4


@pytest.mark.slow
def test_learns_the_shape_of_the_loss(key):
    """C becomes the inverse Hessian but for a factor: what was conditioned 900 is nearly a sphere in its terms."""
    state, _ = play(cma_es(12, 0.7), stretched_ellipsoid, jnp.zeros(DIM), 150, key)
    roots = jnp.linspace(1, 30, DIM)
    assert np.linalg.cond(np.asarray(state.covariance * roots * roots[:, None], "d")) < 15


# Numbers that stay in bounds


def test_step_size_has_a_floor(adapted, key):
    """Equal losses move the mean little, and that shrinks the step: from above the floor and from below it."""
    losses, valid = jnp.ones((K, 3)), jnp.ones((K, 3), bool)
    resting = adapted._replace(step_path=jnp.zeros(DIM))
    for start, expected in [(1.0, None), (1.001e-6, 1e-6), (1e-9, 1e-6)]:
        after, _ = TELL(key, resting._replace(step_size=jnp.float32(start)), losses, valid)
        assert after.step_size == np.float32(expected) if expected else 0.1 < after.step_size < 1


def test_small_eigenvalues_are_raised(key):
    covariance = jnp.diag(jnp.array([4.0, 1e-12, -1e-9, 1.0]))
    basis, scales = decomposed(covariance, 1e4)
    np.testing.assert_allclose(np.sort(scales), [0.02, 0.02, 1.0, 2.0], rtol=1e-5)
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-6)


# Programs


def told(optimizer, key, states):
    losses = jax.random.normal(key, (len(states.step_size), optimizer.num_candidates, 2))
    keys = jax.random.split(key, len(losses))
    return keys, states, losses, jnp.ones(losses.shape, bool)


@pytest.mark.slow
def test_clients_are_mapped_and_decompose_each_in_its_own_generation(key):
    """C is decomposed in every second generation; of these clients two are where it is, and one where it is not."""
    optimizer = cma_es(4, 1.0)
    assert default_rates(64, 4).decomposition_gap == 2
    one = optimizer.init(jnp.zeros(64))
    states = jax.tree.map(lambda x: jnp.stack([x] * 3), one)._replace(generation=jnp.array([1, 0, 3]))
    arguments = told(optimizer, key, states)
    together, _ = jax.jit(jax.vmap(optimizer.tell))(*arguments)
    for i in range(3):
        alone, _ = jax.jit(optimizer.tell)(*jax.tree.map(lambda x, i=i: x[i], arguments))
        mapped = jax.tree.map(lambda x, i=i: np.asarray(x[i]), together)
        root, expected = (np.asarray(s.basis) * s.scales @ np.asarray(s.basis).T for s in (mapped, alone))
        np.testing.assert_allclose(root, expected, atol=1e-5)
        for name in ("params", "step_size", "covariance", "step_path", "covariance_path", "generation"):
            np.testing.assert_allclose(getattr(mapped, name), getattr(alone, name), atol=1e-5)
    changed = [not np.array_equal(basis, np.eye(64)) for basis in np.asarray(together.basis)]
    assert changed == [True, False, True]
    np.testing.assert_allclose(root @ root, together.covariance[2], atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_no_client_decomposes_where_none_is_due(key, depth):
    """A branch of the program holds the decomposition, however deep the maps are; `lax.cond` alone would do both."""
    optimizer = cma_es(4, 1.0)
    arguments = told(optimizer, key, jax.tree.map(lambda x: jnp.stack([x] * 3), optimizer.init(jnp.zeros(64))))
    tell = jax.vmap(optimizer.tell)
    if depth == 2:
        tell, arguments = jax.vmap(tell), jax.tree.map(lambda x: x[None], arguments)
    outside, inside = [], []

    def look(jaxpr, found):
        for equation in jaxpr.eqns:
            found.append(equation.primitive.name)
            for inner in jaxprs_in_params(equation.params):
                look(inner, inside if equation.primitive.name == "cond" else found)

    look(jax.make_jaxpr(tell)(*arguments).jaxpr, outside)
    assert "eigh" in inside
    assert "eigh" not in outside


def test_compiles_once(key):
    optimizer = cma_es(K, 0.7)
    tell, state = jax.jit(optimizer.tell), optimizer.init(jnp.zeros(DIM))
    for t in range(3):
        losses = jax.random.normal(jax.random.fold_in(key, t), (K, 2))
        state, _ = tell(key, state, losses, losses < 1)
    assert tell._cache_size() == 1


def test_all_arrays_of_a_state_may_be_donated():
    leaves = jax.tree.leaves(OPTIMIZER.init(jnp.zeros(DIM)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
        ({"initial_step_size": 0.0}, "initial_step_size must be positive, got 0.0"),
        ({"min_step_size": -1.0}, "min_step_size must be positive, got -1.0"),
        ({"max_condition": 1.0}, "max_condition"),
    ],
)
def test_wrong_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        cma_es(**{"num_candidates": 4, "initial_step_size": 1.0} | change)
