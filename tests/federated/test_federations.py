"""One contract over all federations, on one device and with the clients spread over several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import linear_box, vector_generator
from jax.sharding import PartitionSpec

from fedbbpt_jax.estimators.directions import rademacher
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.federated.averaging import (
    is_optimizer_state,
    is_personal,
    isolated,
    partly_shared,
    weighted_mean,
    weighted_mean_of_params,
)
from fedbbpt_jax.federated.cohort import pack
from fedbbpt_jax.federated.participation import uniform_cohort
from fedbbpt_jax.federated.placement import compile_rounds
from fedbbpt_jax.federated.server_optimizers import SERVER_OPTIMIZERS, with_server_optimizer
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.optimizers.descent import descent
from fedbbpt_jax.prompts.personal import personal
from fedbbpt_jax.types import Method

QUICKLY = {"xla_backend_optimization_level": 0}  # programs that run once
NUM_CLIENTS = 10
OPTIMIZER = descent(spsa(rademacher(), 2, 0.1), optax.adam(optax.linear_schedule(0.1, 0.0, 100)))

# What travels: floats of 4 bytes, 6 shared and 6 local parameters with two moments each. And the number of outcomes.
AVERAGING = {
    "mean": (weighted_mean(), 36, 1),
    "mean-of-params": (weighted_mean_of_params(OPTIMIZER), 12, 1),
    "isolated": (isolated(NUM_CLIENTS), 0, NUM_CLIENTS),
    "own-moments": (partly_shared(NUM_CLIENTS, is_optimizer_state), 12, 1),
    "personal": (partly_shared(NUM_CLIENTS, is_personal), 18, NUM_CLIENTS),
}
FEDERATIONS = AVERAGING | {
    f"{name}-{inner}": (with_server_optimizer(AVERAGING[inner][0], SERVER_OPTIMIZERS[name](0.1)), *AVERAGING[inner][1:])
    for name, inner in [
        ("fedavgm", "mean"),
        ("fedyogi", "mean"),
        ("fedadam", "mean"),
        ("fedadam", "mean-of-params"),
        ("fedadam", "personal"),
        ("fedadam", "isolated"),
    ]
}

# Two of padding, whose ids are also those of clients that do take part; a client that never does.
IDS = jnp.array([0, 7, 3, 3, 9, 1, 0, 4], jnp.int32)
WEIGHTS = jnp.array([5.0, 0.5, 0.0, 2.0, 11.0, 3.0, 0.0, 1.0])


def first_client():
    picture = jnp.linspace(-1, 1, 6).reshape(2, 3)
    return OPTIMIZER.init({"shared": {"picture": picture}, "local": {"picture": picture[::-1]}})


@pytest.fixture
def client():
    return first_client()


def total(x):
    return x.sum(0)


def moved(clients, ids, weights, index):
    """Clients after some steps: every number moved by its own amount, counters by 3; padding has become NaN."""

    def move(x):
        if x.dtype == jnp.int32:
            return x + 3
        per_client, per_number = ids.reshape(-1, *[1] * (x.ndim - 1)), jnp.arange(x[0].size).reshape(x.shape[1:])
        new = x + jnp.abs(jnp.sin(1.0 + 2.0 * per_client + per_number + 0.7 * index))
        return jnp.where((weights > 0).reshape(-1, *[1] * (x.ndim - 1)), new, jnp.nan)

    return jax.tree.map(move, clients)


def play(federation, total, server, ids, weights):
    """Three rounds, of which the second has nobody in it."""

    def one(server, index):
        present = jnp.where(index == 1, 0.0, weights)
        clients = moved(federation.broadcast(server, ids), ids, present, index)
        return federation.aggregate(server, ids, clients, present, total), None

    return jax.lax.scan(one, server, jnp.arange(3))[0]


def play_all(total, servers, ids, weights):
    return {name: play(FEDERATIONS[name][0], total, server, ids, weights) for name, server in servers.items()}


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("federation", "num_floats", "num_outcomes"), FEDERATIONS.values(), ids=FEDERATIONS.keys())
class TestContract:
    def test_shapes_and_types_stay(self, federation, num_floats, num_outcomes, client):
        server = federation.init(client)
        clients = jax.eval_shape(federation.broadcast, server, IDS)
        assert shapes(clients) == jax.tree.map(lambda x: ((8, *x.shape), x.dtype), client)
        after = jax.eval_shape(lambda s, c: federation.aggregate(s, IDS, c, WEIGHTS, total), server, clients)
        assert shapes(after) == shapes(server)
        outcomes = jax.eval_shape(federation.outcomes, after)
        assert shapes(outcomes) == jax.tree.map(lambda x: ((num_outcomes, *x.shape), x.dtype), client)

    def test_payload(self, federation, num_floats, num_outcomes, client):
        assert federation.payload_bytes(client) == (4 * num_floats, 4 * num_floats)

    def test_everybody_begins_with_the_first_client_state(self, federation, num_floats, num_outcomes, client):
        server = federation.init(client)
        for states in (federation.broadcast(server, IDS), federation.outcomes(server)):
            assert_same(states, jax.tree.map(lambda x, start: np.broadcast_to(start, x.shape), states, client))

    def test_padding_has_no_effect_whatever_is_in_it(self, federation, num_floats, num_outcomes, client):
        server = federation.init(client)
        clients = moved(federation.broadcast(server, IDS), IDS, WEIGHTS, 0)  # NaN in the padding
        aggregate = jax.jit(lambda ids, clients: federation.aggregate(server, ids, clients, WEIGHTS, total))
        present = np.asarray(WEIGHTS > 0)
        clean = jax.tree.map(lambda x: jnp.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, 0), clients)
        assert_same(aggregate(IDS, clients), aggregate(jnp.where(present, IDS, 5), clean))
        alone = federation.aggregate(
            server, IDS[present], jax.tree.map(lambda x: x[present], clients), WEIGHTS[present], total
        )
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), aggregate(IDS, clients), alone)

    def test_a_round_of_nobody_leaves_everything_as_it_was(self, federation, num_floats, num_outcomes, client):
        server = play(federation, total, federation.init(client), IDS, WEIGHTS)
        clients = moved(federation.broadcast(server, IDS), IDS, WEIGHTS, 0)
        after = federation.aggregate(server, IDS, clients, jnp.zeros(8), total)
        assert_same(after, server)


@pytest.fixture(scope="module")
def on_one_device():
    """Servers of all federations, and what they are after three rounds on one device."""
    servers = {name: federation.init(first_client()) for name, (federation, *_) in FEDERATIONS.items()}
    return servers, jax.jit(partial(play_all, total), compiler_options=QUICKLY)(servers, IDS, WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 8])
def test_servers_are_the_same_on_any_number_of_devices(on_one_device, num_devices):
    servers, expected = on_one_device
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((num_devices,), ("clients",), axis_types=auto, devices=jax.devices()[:num_devices])
    spread, everywhere = PartitionSpec("clients"), PartitionSpec()
    over_devices = jax.shard_map(
        partial(play_all, lambda x: jax.lax.psum(x.sum(0), "clients")),
        mesh=mesh,
        in_specs=(everywhere, spread, spread),
        out_specs=everywhere,
    )
    found = jax.jit(over_devices, compiler_options=QUICKLY)(servers, IDS, WEIGHTS)

    def check(path, found, expected, start):
        # Sums in another order, divided by roots of second moments of some 0.1.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=jax.tree_util.keystr(path))
        copies = [np.asarray(shard.data).tobytes() for shard in found.addressable_shards]
        assert len(copies) == num_devices
        assert len(set(copies)) == 1, path
        assert not jnp.array_equal(found, start) or "mean-of-params" in str(path), path

    jax.tree.map_with_path(check, found, expected, servers)


@pytest.mark.slow
def test_personal_prompts_fit_clients_that_disagree(vectors, key):
    """Each client holds one class only: a shared prompt cannot favour them all."""
    clients = pack(vectors, [np.flatnonzero(vectors.labels == i) for i in range(4)])

    def final_loss(generator, federation):
        optimizer = descent(spsa(rademacher(), 4, 0.1), optax.adam(0.1))
        method = Method(generator, cross_entropy, optimizer, federation)
        server = federation.init(optimizer.init(generator.init(key)))
        run_rounds = compile_rounds(method, uniform_cohort(4), local_steps=2, batch_size=5)
        _, info = run_rounds(jax.tree_util.Partial(linear_box), server, clients, key, jnp.arange(30))
        return float(info.step.loss[-5:].mean())

    shared = final_loss(vector_generator(4), weighted_mean())
    own = final_loss(personal(vector_generator(4)), partly_shared(4, is_personal))
    assert own < shared / 3
