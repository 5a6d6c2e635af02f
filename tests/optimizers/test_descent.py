import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedbbpt_jax.estimators.directions import rademacher, segmented_uniform
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.optimizers.descent import descent, spsa_gc_perturbation_size, spsa_gc_transformation


def ask_and_tell(optimizer, key, state, loss):
    ks = jnp.arange(optimizer.num_candidates)
    losses = jax.vmap(lambda k: loss(optimizer.ask(key, state, k)))(ks)[:, None]
    return optimizer.tell(key, state, losses, jnp.ones(losses.shape, bool))


def test_descends_a_quadratic(key):
    optimizer = descent(spsa(rademacher(), 8, 0.01), optax.sgd(0.05))
    state = optimizer.init(jnp.full(8, 3.0))

    def step(state, k):
        return ask_and_tell(optimizer, k, state, lambda p: jnp.sum((p - 1) ** 2))

    state, info = jax.lax.scan(step, state, jax.random.split(key, 200))
    np.testing.assert_allclose(optimizer.solution(state), 1.0, atol=1e-3)
    assert info.loss[-1] < 1e-2 * info.loss[0]


@pytest.mark.slow
def test_an_unanswered_step_counts_and_changes_no_number(key):
    optimizer = descent(spsa(rademacher(), 2, 0.01), optax.adam(0.1))
    state, _ = ask_and_tell(optimizer, key, optimizer.init(jnp.ones(3)), jnp.sum)
    after, info = optimizer.tell(key, state, jnp.full((4, 5), jnp.nan), jnp.zeros((4, 5), bool))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        counts = jnp.issubdtype(old.dtype, jnp.integer)
        np.testing.assert_array_equal(new, old + 1 if counts else old)
    assert info.num_directions == 0


def test_spsa_gc_follows_the_published_recursion(key):
    """Thirty steps against the loop of the published code, in float64: a, o, alpha, gamma, c and t from 1."""
    a, o, alpha, gamma, c, beta = 0.01, 1.0, 0.4, 0.1, 0.01, 0.9
    directions = segmented_uniform()
    optimizer = descent(spsa(directions, 5, spsa_gc_perturbation_size(c, decay=gamma)), spsa_gc_transformation(a))

    def loss(p, xp=jnp):
        return xp.sum(xp.cos(p)) + 0.5 * xp.sum((p - 2.0) ** 2)

    step = jax.jit(lambda key, state: ask_and_tell(optimizer, key, state, loss))
    state = optimizer.init(jnp.zeros(4))
    w, m = np.zeros(4), np.zeros(4)
    for t in range(1, 31):
        step_key = jax.random.fold_in(key, t)
        deltas = [np.asarray(directions.sample(step_key, j, jnp.zeros(4)), "d") for j in range(5)]
        size = c / t**gamma
        g = np.mean([(loss(w + size * x, np) - loss(w - size * x, np)) / (2 * size * x) for x in deltas], axis=0)
        m = g if t == 1 else beta * m + g
        w = w - a / (t + o) ** alpha * (g + beta * m)
        state, _ = step(step_key, state)
        # float32 losses of size 10 divided by 2c = 0.02 carry about 1e-4 into each of 30 steps of size 0.01
        np.testing.assert_allclose(optimizer.solution(state), w, atol=1e-3)
    assert np.abs(w).min() > 0.2


def test_spsa_gc_update_is_nesterov_trace_bit_for_bit(key):
    tx = spsa_gc_transformation(0.02, offset=1.0, decay=0.4, momentum=0.7)
    trace = optax.trace(decay=0.7, nesterov=True)
    params = jnp.zeros(5)
    ours, theirs = tx.init(params), trace.init(params)
    for t in range(1, 6):
        gradient = jax.random.normal(jax.random.fold_in(key, t), (5,))
        update, ours = tx.update(gradient, ours)
        direction, theirs = trace.update(gradient, theirs)
        expected = -jnp.asarray(0.02 / (jnp.asarray(t - 1, jnp.int32) + 2.0) ** 0.4) * direction
        np.testing.assert_array_equal(update, expected)
