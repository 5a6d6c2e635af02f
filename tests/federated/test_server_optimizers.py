"""The servers' steps against the formulas of the papers, with unequal weights and a padding client of NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedbbpt_jax.estimators.directions import rademacher
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.federated.averaging import is_personal, partly_shared, weighted_mean
from fedbbpt_jax.federated.server_optimizers import SERVER_OPTIMIZERS, fedadam, fedavgm, fedyogi, with_server_optimizer
from fedbbpt_jax.optimizers.descent import descent

NUM_ROUNDS, RATE = 6, 0.3
WEIGHTS = np.array([3.0, 1.0, 0.0, 6.0])
OPTIMIZER = descent(spsa(rademacher(), 2, 0.1), optax.trace(0.9))


def total(x):
    return x.sum(0)


@pytest.fixture
def movements():
    """How far each client goes from the server in each round, `[R, C, d]`, from 0.1 to 1 along d."""
    return np.random.default_rng(2).normal(0, np.logspace(-1, 0, 5), (NUM_ROUNDS, 4, 5)).astype(np.float32)


def play(federation, movements, start=None):
    """The server's parameters after each round, `[R, d]`, and its last state."""
    client = OPTIMIZER.init(jnp.arange(5.0) if start is None else start)

    def one(server, movement):
        clients = federation.broadcast(server, jnp.arange(4))
        moved = (clients.params + movement).at[2].set(jnp.nan)  # padding
        clients = jax.tree.map(lambda x: x + 1, clients)._replace(params=moved)
        server = federation.aggregate(server, jnp.arange(4), clients, jnp.asarray(WEIGHTS, jnp.float32), total)
        return server, federation.outcomes(server).params[0]

    return jax.lax.scan(one, federation.init(client), jnp.asarray(movements))[::-1]


def pseudo_gradients(movements):
    """Delta of each round `[R, d]`, the negative of the paper's."""
    return -np.average(movements.astype("d"), axis=1, weights=WEIGHTS)


def avgm(gradients):
    velocity, params, path = 0, np.arange(5.0), []
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        params = params - RATE * velocity
        path.append(params)
    return path


def adam(gradients, correct=True, start=0.0):
    first, second, params, path = 0, start, np.arange(5.0), []
    for t, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        corrected = (first / (1 - 0.9**t), second / (1 - 0.99**t)) if correct else (first, second)
        params = params - RATE * corrected[0] / (np.sqrt(corrected[1]) + 1e-3)
        path.append(params)
    return path


def yogi(gradients):
    first, second, params, path = 1e-6, 1e-6, np.arange(5.0), []
    for t, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient
        second = second - 0.01 * gradient**2 * np.sign(second - gradient**2)
        corrected = first / (1 - 0.9**t), second / (1 - 0.99**t)
        params = params - RATE * corrected[0] / (np.sqrt(corrected[1]) + 1e-3)
        path.append(params)
    return path


@pytest.mark.parametrize(("name", "formula"), [("fedavgm", avgm), ("fedadam", adam), ("fedyogi", yogi)])
def test_equals_the_formula(name, formula, movements):
    found, _ = play(with_server_optimizer(weighted_mean(), SERVER_OPTIMIZERS[name](RATE)), movements)
    # Differences of parameters of size 4 are right to 5e-7 in float32, and divided by roots of second moments of 0.05.
    np.testing.assert_allclose(found, formula(pseudo_gradients(movements)), atol=2e-5)


def test_sgd_of_rate_one_is_plain_averaging(movements):
    plain, mean = play(weighted_mean(), movements)
    found, server = play(with_server_optimizer(weighted_mean(), optax.sgd(1.0)), movements)
    np.testing.assert_allclose(found, plain, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), server.inner, mean)


def test_only_parameters_are_the_servers(movements):
    _, plain = play(weighted_mean(), movements)
    found, server = play(with_server_optimizer(weighted_mean(), fedavgm(0.1)), movements)
    assert np.abs(found[-1] - plain.params).max() > 0.01
    for part in ("estimator", "transformation"):
        jax.tree.map(np.testing.assert_array_equal, getattr(server.inner, part), getattr(plain, part))


def test_parameters_that_stay_with_their_clients_are_left_to_them():
    """The server's momentum moves the shared part on, and no local part of clients that were away."""
    inner = partly_shared(3, is_personal)
    federation = with_server_optimizer(inner, fedavgm(1.0))
    server = federation.init(OPTIMIZER.init({"shared": jnp.zeros(2), "local": jnp.zeros(2)}))
    assert [x.shape for x in jax.tree.leaves(server.transformation)] == [(2,)]
    for movement in (1.0, 0.0):
        clients = federation.broadcast(server, jnp.array([1]))
        clients = clients._replace(params=jax.tree.map(lambda x, by=movement: x + by, clients.params))
        server = federation.aggregate(server, jnp.array([1]), clients, jnp.ones(1), total)
    np.testing.assert_allclose(server.inner.params["shared"], [1.9, 1.9], atol=1e-6)
    np.testing.assert_array_equal(server.inner.params["local"], [[0, 0], [1, 1], [0, 0]])
    assert federation.outcomes(server).params["shared"].shape == (3, 2)


def test_how_far_fedadam_is_from_the_papers_algorithm():
    """Steps of Algorithm 2 over ours, for a constant difference well above tau; as the docstring says."""
    tx, gradient = fedadam(RATE), jnp.ones(5)
    _, ours = jax.lax.scan(lambda state, _: tx.update(gradient, state)[::-1], tx.init(gradient), length=100)
    papers = np.diff([np.arange(5.0), *adam(np.ones((100, 5)), correct=False, start=1e-6)], axis=0)
    ratio = papers[:, 0] / np.asarray(ours)[:, 0]
    assert 11 < np.argmax(ratio) + 1 < 16
    np.testing.assert_allclose(ratio[[0, 12, 99]], [1.0, 2.12, 1.26], atol=0.01)


def test_fedyogi_hardly_moves_what_no_client_moved():
    tx, gradient = fedyogi(1.0), jnp.zeros(1)
    _, steps = jax.lax.scan(lambda state, _: tx.update(gradient, state)[::-1], tx.init(gradient), length=100)
    assert 0 < np.abs(steps).max() < 1e-3
