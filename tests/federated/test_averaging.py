import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedbbpt_jax.estimators.directions import rademacher
from fedbbpt_jax.estimators.reduction import with_anchor
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.federated.averaging import (
    is_optimizer_state,
    is_personal,
    isolated,
    partly_shared,
    weighted_mean,
    weighted_mean_of_params,
)
from fedbbpt_jax.optimizers.descent import descent


def total(x):
    return x.sum(0)


def first(states):
    return jax.tree.map(lambda x: x[0], states)


def assert_same_bits(found, expected):
    def check(a, b):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(check, found, expected)


@pytest.fixture
def states():
    """Client states as an optimizer has them: floats of several ranks and a step counter."""
    rng = np.random.default_rng(0)
    moments = jnp.asarray(rng.normal(0, 1, (4, 3)), jnp.float32)
    return {"x": jnp.asarray(rng.normal(0, 1, (4, 2, 5)), jnp.float32), "m": moments, "t": jnp.full(4, 17)}


def test_weighted_mean_equals_numpy(states):
    weights = np.array([1.0, 3.0, 0.0, 6.0], np.float32)
    found = weighted_mean().aggregate(first(states), jnp.arange(4), states, jnp.asarray(weights), total)
    for name in ("x", "m"):
        expected = np.average(np.asarray(states[name], np.float64), axis=0, weights=weights)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)
    assert found["t"] == 17
    assert found["t"].dtype == states["t"].dtype


def test_padding_with_weight_zero_has_no_effect_even_if_it_is_nan(states):
    weights = jnp.array([1.0, 3.0, 0.0, 6.0])
    spoilt = states | {"x": states["x"].at[2].set(jnp.nan)}
    clean, found = (
        weighted_mean().aggregate(first(states), jnp.arange(4), s, weights, total) for s in (states, spoilt)
    )
    np.testing.assert_array_equal(clean["x"], found["x"])


def test_broadcast_gives_every_client_the_server(states):
    server = jax.tree.map(lambda x: x[1], states)
    clients = weighted_mean().broadcast(server, jnp.array([5, 9]))
    np.testing.assert_array_equal(clients["x"], np.stack([states["x"][1]] * 2))


class TestIsolated:
    def test_clients_keep_their_own_state(self, states):
        federation = isolated(4)
        server = federation.init(first(states))
        ids = jnp.array([2, 0])
        clients = jax.tree.map(lambda x: x + 1, federation.broadcast(server, ids))
        after = federation.aggregate(server, ids, clients, jnp.array([5.0, 0.0]), total)
        np.testing.assert_array_equal(after["x"][2], server["x"][2] + 1)
        for untouched in (0, 1, 3):  # client 0 was padding
            np.testing.assert_array_equal(after["x"][untouched], server["x"][untouched])

    @pytest.mark.slow
    def test_states_arrive_bit_by_bit(self, states):
        """As if each were put in its place; sums of numbers would lose the sign of zero."""
        odd = jnp.array([-0.0, jnp.nan, -jnp.inf, 1e-42])
        states |= {"odd": jnp.tile(odd, (4, 1)), "flag": jnp.array([True, False, True, False])}
        states |= {"half": states["x"].astype(jnp.bfloat16), "n": jnp.array([-1, 5, -(2**31), 0])}
        server = isolated(6).init(jax.tree.map(jnp.zeros_like, first(states)))
        ids, took_part = np.array([5, 0, 0, 3]), np.array([True, False, True, True])
        found = isolated(6).aggregate(server, jnp.asarray(ids), states, jnp.asarray(took_part * 2.5), total)
        expected = jax.tree.map(lambda old, new: old.at[ids[took_part]].set(new[took_part]), server, states)
        assert_same_bits(found, expected)

    def test_nothing_travels(self, states):
        assert isolated(4).payload_bytes(first(states)) == (0, 0)

    def test_there_must_be_a_client(self):
        with pytest.raises(ValueError, match="num_clients must be at least 1, got 0"):
            isolated(0)


def test_payload_is_the_size_of_what_travels(states):
    assert weighted_mean().payload_bytes(first(states)) == (52, 52)  # 10 + 3 floats; the counter stays


class TestPartlyShared:
    @pytest.fixture
    def federation(self):
        return partly_shared(5, is_local=is_personal)

    @pytest.fixture
    def clients(self):
        rng = np.random.default_rng(1)
        state = {"params": {"shared": (3,), "local": (2, 2)}, "moments": {"shared": (3,), "local": (2, 2)}}
        state = jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(0, 1, (4, *shape)), jnp.float32),
            state,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        return state | {"step": jnp.array([3, 3, 99, 3])}

    def test_equals_numpy_with_unequal_weights_and_a_padding_client_of_nan(self, federation, clients):
        server = federation.init(jax.tree.map(jnp.zeros_like, first(clients)))
        spoilt = jax.tree.map(lambda x: x.at[2].set(jnp.nan) if x.dtype == jnp.float32 else x, clients)
        ids, weights = jnp.array([4, 1, 1, 0]), np.array([2.0, 0.5, 0.0, 7.0])  # the padding's id is another's
        after = federation.aggregate(server, ids, spoilt, jnp.asarray(weights, jnp.float32), total)
        for name in ("params", "moments"):
            shared = np.average(np.asarray(clients[name]["shared"], "d"), axis=0, weights=weights)
            np.testing.assert_allclose(after[name]["shared"], shared, rtol=1e-6, atol=1e-6)
            expected = np.zeros((5, 2, 2), np.float32)
            expected[[4, 1, 0]] = np.asarray(clients[name]["local"])[[0, 1, 3]]
            np.testing.assert_array_equal(after[name]["local"], expected)
        assert after["step"] == 3

    def test_a_client_that_comes_late_has_the_initial_local_state_and_the_present_shared_one(self, federation, clients):
        server = federation.init(first(clients))
        moved = jax.tree.map(lambda x: x + 1, clients)
        after = federation.aggregate(server, jnp.arange(4), moved, jnp.ones(4), total)
        late, early = (federation.broadcast(after, jnp.array([i]))["params"] for i in (4, 2))
        np.testing.assert_array_equal(late["local"][0], clients["params"]["local"][0])
        np.testing.assert_array_equal(early["local"][0], clients["params"]["local"][2] + 1)
        np.testing.assert_array_equal(late["shared"][0], after["params"]["shared"])

    def test_every_client_is_an_outcome_where_parameters_are_local(self, federation, clients):
        server = federation.init(first(clients))
        server = federation.aggregate(server, jnp.arange(4), clients, jnp.ones(4), total)
        outcomes = federation.outcomes(server)["params"]
        np.testing.assert_array_equal(outcomes["local"][:4], clients["params"]["local"])
        np.testing.assert_array_equal(outcomes["shared"], np.stack([server["params"]["shared"]] * 5))

    def test_one_model_is_the_outcome_where_only_momenta_are_local(self, clients):
        federation = partly_shared(5, is_local=is_optimizer_state)
        server = federation.init(first(clients))
        outcomes = federation.outcomes(server)
        np.testing.assert_array_equal(outcomes["params"]["local"][0], server["params"]["local"])
        assert {len(x) for x in jax.tree.leaves(outcomes)} == {1}

    def test_nothing_local_is_the_weighted_mean(self, clients):
        server, weights = first(clients), jnp.array([1.0, 2.0, 0.0, 4.0])
        found = partly_shared(5, lambda path: False).aggregate(server, jnp.arange(4), clients, weights, total)
        assert_same_bits(found, weighted_mean().aggregate(server, jnp.arange(4), clients, weights, total))


class TestWeightedMeanOfParams:
    @pytest.fixture
    def optimizer(self):
        tx = optax.adam(optax.linear_schedule(0.1, 0.0, 100))
        return descent(with_anchor(spsa(rademacher(), 2, 0.1), period=5), tx)

    @pytest.fixture
    def begun(self, optimizer):
        """The server's state and those of its clients after 6 steps that moved every number."""
        server = optimizer.init({"x": jnp.array([1.0, -2.0, 3.0])})
        clients = jax.tree.map(
            lambda x: (
                jnp.stack([x + 6] * 3) if x.dtype == jnp.int32 else x + jnp.arange(1.0, 4).reshape(3, *[1] * x.ndim)
            ),
            server,
        )
        return server, clients

    def test_parameters_are_averaged_and_the_rest_begins_anew(self, optimizer, begun):
        server, clients = begun
        federation, weights = weighted_mean_of_params(optimizer), np.array([1.0, 0.0, 4.0])
        spoilt = clients._replace(params={"x": clients.params["x"].at[1].set(jnp.nan)})
        after = federation.aggregate(server, jnp.arange(3), spoilt, jnp.asarray(weights, jnp.float32), total)
        params = np.average(np.asarray(clients.params["x"], "d"), axis=0, weights=weights)
        np.testing.assert_allclose(after.params["x"], params, rtol=1e-6)

        client = first(federation.broadcast(after, jnp.array([7])))
        np.testing.assert_array_equal(client.params["x"], after.params["x"])
        np.testing.assert_array_equal(client.estimator.memory.params["x"], after.params["x"])  # the anchor is here
        adam, schedule = client.transformation
        assert not np.asarray([adam.mu["x"], adam.nu["x"], client.estimator.memory.mean["x"]]).any()
        assert adam.count == 0
        assert schedule.count == client.estimator.inner.step == 6

    def test_the_first_step_of_a_round_is_adams_first_at_the_schedules_present_rate(self, optimizer, begun, key):
        """A count that went on would make it half as long after 6 steps, and in the end 3.2 times."""
        server, clients = begun
        federation = weighted_mean_of_params(optimizer)
        after = federation.aggregate(server, jnp.arange(3), clients, jnp.ones(3), total)
        client = first(federation.broadcast(after, jnp.array([0])))
        losses = jnp.arange(8.0)[:, None] ** 2
        moved, _ = optimizer.tell(key, client, losses, jnp.ones((8, 1), bool))
        step = np.abs(moved.params["x"] - client.params["x"])
        np.testing.assert_allclose(step, 0.1 * (1 - 6 / 100), rtol=1e-4)

    def test_only_parameters_travel(self, optimizer, begun):
        assert weighted_mean_of_params(optimizer).payload_bytes(begun[0]) == (12, 12)
