import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.optimizers.evosax_adapter import from_evosax

algorithms = pytest.importorskip("evosax.algorithms")
pytestmark = pytest.mark.parity
START = {"a": jnp.zeros((2, 2)), "b": jnp.full(2, 3.0)}


def sphere(params):
    return sum(((x - 1) ** 2).sum() for x in jax.tree.leaves(params))


def ask_and_tell(optimizer, key, state, losses=None, valid=None):
    points = jax.vmap(lambda k: optimizer.ask(key, state, k))(jnp.arange(optimizer.num_candidates))
    found = jax.vmap(sphere)(points)[:, None] if losses is None else losses
    return optimizer.tell(key, state, found, jnp.ones(found.shape, bool) if valid is None else valid)


@pytest.fixture(scope="module")
def optimizer():
    return from_evosax(algorithms.SimpleES(population_size=8, solution=START))


@pytest.mark.slow
def test_equals_the_algorithm_on_its_own(optimizer, key):
    strategy = algorithms.SimpleES(population_size=8, solution=START)
    hyper = strategy.default_params
    theirs, ours = strategy.init(jax.random.key(0), START, hyper), optimizer.init(START)
    for t in range(2):
        step_key = jax.random.fold_in(key, t)
        population, theirs = strategy.ask(jax.random.fold_in(step_key, 0), theirs, hyper)
        for k in (0, 5):
            expected = jax.tree.map(lambda x, k=k: x[k], population)
            jax.tree.map(np.testing.assert_array_equal, optimizer.ask(step_key, ours, k), expected)
        theirs, _ = strategy.tell(
            jax.random.fold_in(step_key, 1), population, jax.vmap(sphere)(population), theirs, hyper
        )
        ours, info = ask_and_tell(optimizer, step_key, ours)
        np.testing.assert_allclose(info.loss, jax.vmap(sphere)(population).mean(), rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ours.params, strategy.get_mean(theirs))
    assert optimizer.num_candidates == 8


@pytest.mark.slow
def test_a_mean_that_a_federation_changed_is_the_one_in_use(optimizer, key):
    state = optimizer.init(START)
    moved = state._replace(params=jax.tree.map(lambda x: x + 10, state.params))
    difference = jax.tree.map(jnp.subtract, optimizer.ask(key, moved, 3), optimizer.ask(key, state, 3))
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 10, atol=1e-5), difference)
    after, _ = ask_and_tell(optimizer, key, moved)
    assert all((x > 3).all() for x in jax.tree.leaves(after.params))


def test_failed_candidates_are_last_and_failed_steps_change_only_counters(optimizer, key):
    state, _ = ask_and_tell(optimizer, key, optimizer.init(START))
    losses, valid = jnp.arange(8.0)[:, None], (jnp.arange(8) != 0)[:, None]
    found, info = ask_and_tell(optimizer, key, state, losses.at[0].set(jnp.nan), valid)
    expected, _ = ask_and_tell(optimizer, key, state, losses.at[0].set(7.0))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert info.num_directions == 7
    after, info = ask_and_tell(optimizer, key, state, losses * jnp.nan, jnp.zeros((8, 1), bool))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new, old + 1 if jnp.issubdtype(old.dtype, jnp.integer) else old)
    assert info.num_directions == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")  # within evosax's PGPE
@pytest.mark.parametrize("name", ["Open_ES", "PGPE", "SNES", "CMA_ES"])
def test_algorithms_learn_under_jit_and_vmap_without_changing_types(name, key):
    optimizer = from_evosax(getattr(algorithms, name)(population_size=16, solution=START))
    states = jax.tree.map(lambda x: jnp.stack([x] * 2), optimizer.init(START))

    def generation(states, key):
        keys = jax.random.split(key, 2)
        return jax.vmap(lambda k, s: ask_and_tell(optimizer, k, s))(keys, states)

    last, _ = jax.jit(lambda states: jax.lax.scan(generation, states, jax.random.split(key, 150)))(states)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), last) == jax.tree.map(lambda x: (x.shape, x.dtype), states)
    assert (jax.vmap(lambda state: sphere(optimizer.solution(state)))(last) < 0.99 * sphere(START)).all()


def test_populations_without_a_mean_are_refused():
    strategy = algorithms.DifferentialEvolution(population_size=8, solution=START)
    with pytest.raises(ValueError, match=r"distribution-based .* got DifferentialEvolution"):
        from_evosax(strategy)
