"""Layers take turns, each with a search of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.optimizers.cma_es import cma_es
from fedbbpt_jax.optimizers.layer_by_layer import layer_by_layer

L, D, K = 3, 4, 6
TARGET = jnp.linspace(-1, 1, L * D).reshape(L, D)


def losses_of(optimizer, key, state):
    candidates = jax.vmap(lambda k: optimizer.ask(key, state, k))(jnp.arange(optimizer.num_candidates))
    return candidates, ((candidates - TARGET) ** 2).sum((1, 2))[:, None]


def step(optimizer, key, state):
    _, losses = losses_of(optimizer, key, state)
    return optimizer.tell(key, state, losses, jnp.ones(losses.shape, bool))[0]


@pytest.mark.slow
def test_each_layer_plays_as_if_the_others_were_constant(key):
    """Ranks do not see what the other layers add to all losses: each layer's run is that of plain CMA-ES."""
    inner = cma_es(K, initial_step_size=0.5)
    optimizer = layer_by_layer(inner)
    state, alone = optimizer.init(jnp.zeros((L, D))), [inner.init(jnp.zeros(D)) for _ in range(L)]
    for turn in range(2 * L + 1):
        step_key, layer = jax.random.fold_in(key, turn), turn % L
        before = optimizer.solution(state)
        candidates, _ = losses_of(optimizer, step_key, state)
        others = np.arange(L) != layer
        np.testing.assert_array_equal(candidates[:, others], jnp.broadcast_to(before[others], (K, L - 1, D)))
        own = jax.vmap(lambda k, key=step_key, s=alone[layer]: inner.ask(key, s, k))(jnp.arange(K))
        np.testing.assert_allclose(candidates[:, layer], own, atol=1e-6)
        own_losses = ((own - TARGET[layer]) ** 2).sum(1)[:, None]
        alone[layer] = inner.tell(step_key, alone[layer], own_losses, jnp.ones((K, 1), bool))[0]
        state = step(optimizer, step_key, state)
    np.testing.assert_allclose(optimizer.solution(state), jnp.stack([s.params for s in alone]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(L, D), (1, D)])
def test_it_finds_the_minimum(key, shape):
    optimizer = layer_by_layer(cma_es(K, initial_step_size=0.5))
    target = TARGET[: shape[0]]

    def play(state, step_key):
        candidates = jax.vmap(lambda k: optimizer.ask(step_key, state, k))(jnp.arange(K))
        losses = ((candidates - target) ** 2).sum((1, 2))[:, None]
        return optimizer.tell(step_key, state, losses, jnp.ones((K, 1), bool))[0], None

    state, _ = jax.lax.scan(play, optimizer.init(jnp.zeros(shape)), jax.random.split(key, 200 * shape[0]))
    np.testing.assert_allclose(optimizer.solution(state), target, atol=1e-2)


@pytest.mark.slow
def test_clients_may_have_different_turns(key):
    optimizer = layer_by_layer(cma_es(K, initial_step_size=0.5))
    first = optimizer.init(jnp.zeros((L, D)))
    states = jax.tree.map(lambda *x: jnp.stack(x), first, step(optimizer, key, first))
    moved = jax.vmap(lambda state: step(optimizer, key, state))(states)
    np.testing.assert_array_equal(moved.turn, [1, 2])
    changed = (jax.vmap(optimizer.solution)(moved) != jax.vmap(optimizer.solution)(states)).any(-1)
    np.testing.assert_array_equal(changed, [[True, False, False], [False, True, False]])


def test_a_server_that_moves_the_parameters_moves_the_search(key):
    optimizer = layer_by_layer(cma_es(K, initial_step_size=0.5))
    state = step(optimizer, key, optimizer.init(jnp.zeros((L, D))))
    moved = state._replace(params=state.params + 5.0)
    asked, asked_after = (optimizer.ask(key, s, jnp.asarray(2)) for s in (state, moved))
    np.testing.assert_allclose(asked_after, asked + 5.0, atol=1e-5)
