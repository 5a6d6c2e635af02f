import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.federated.averaging import isolated, weighted_mean


def total(x):
    return x.sum(0)


@pytest.fixture
def states():
    """Client states as an optimizer has them: floats of several ranks and a step counter."""
    rng = np.random.default_rng(0)
    moments = jnp.asarray(rng.normal(0, 1, (4, 3)), jnp.float32)
    return {"x": jnp.asarray(rng.normal(0, 1, (4, 2, 5)), jnp.float32), "m": moments, "t": jnp.full(4, 17)}


def test_weighted_mean_equals_numpy(states):
    weights = np.array([1.0, 3.0, 0.0, 6.0], np.float32)
    server = jax.tree.map(lambda x: x[0], states)
    found = weighted_mean().aggregate(server, jnp.arange(4), states, jnp.asarray(weights), total)
    for name in ("x", "m"):
        expected = np.average(np.asarray(states[name], np.float64), axis=0, weights=weights)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)
    assert found["t"] == 17
    assert found["t"].dtype == states["t"].dtype


def test_padding_with_weight_zero_has_no_effect_even_if_it_is_nan(states):
    weights = jnp.array([1.0, 3.0, 0.0, 6.0])
    server = jax.tree.map(lambda x: x[0], states)
    spoilt = states | {"x": states["x"].at[2].set(jnp.nan)}
    clean, found = (weighted_mean().aggregate(server, jnp.arange(4), s, weights, total) for s in (states, spoilt))
    np.testing.assert_array_equal(clean["x"], found["x"])


def test_an_empty_round_leaves_the_server_alone(states):
    server = jax.tree.map(lambda x: x[1], states)
    found = weighted_mean().aggregate(server, jnp.arange(4), states, jnp.zeros(4), total)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, server))


def test_broadcast_gives_every_client_the_server(states):
    server = jax.tree.map(lambda x: x[1], states)
    clients = weighted_mean().broadcast(server, jnp.array([5, 9]))
    np.testing.assert_array_equal(clients["x"], np.stack([states["x"][1]] * 2))


def test_isolated_clients_keep_their_own_state(states):
    federation = isolated(4)
    server = federation.init(jax.tree.map(lambda x: x[0], states))
    ids = jnp.array([2, 0])
    clients = jax.tree.map(lambda x: x + 1, federation.broadcast(server, ids))
    after = federation.aggregate(server, ids, clients, jnp.array([5.0, 0.0]), total)
    np.testing.assert_array_equal(after["x"][2], server["x"][2] + 1)
    for untouched in (0, 1, 3):  # client 0 was padding
        np.testing.assert_array_equal(after["x"][untouched], server["x"][untouched])


@pytest.mark.parametrize(("federation", "expected"), [(weighted_mean(), (52, 52)), (isolated(4), (0, 0))])
def test_payload_is_the_size_of_what_travels(states, federation, expected):
    assert (
        federation.payload_bytes(jax.tree.map(lambda x: x[0], states)) == expected
    )  # 10 + 3 floats; the counter stays
