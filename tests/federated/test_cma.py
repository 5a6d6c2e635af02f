"""FedBPT: the server's generation against plain CMA-ES, its step size against the paper's, and what travels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear_box, vector_generator
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from fedbbpt_jax.federated.cma import (
    FedBPTState,
    Reports,
    fedbpt,
    fedbpt_client,
    gathered,
    replay,
    report,
    server_step_size,
    with_sent_covariance,
)
from fedbbpt_jax.federated.cohort import pack
from fedbbpt_jax.federated.host import host_rounds
from fedbbpt_jax.federated.mesh import make_mesh, place_clients, replicate
from fedbbpt_jax.federated.participation import uniform_cohort
from fedbbpt_jax.federated.placement import compile_rounds, shard_rounds
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.optimizers.cma_es import cma_es, every_rank, initial_distribution
from fedbbpt_jax.types import Method

DIM, LAMBDA, NUM_CLIENTS, COHORT = 5, 4, 10, 6
IDS = jnp.array([7, 0, 3, 3, 9, 1, 0, 4], jnp.int32)  # the second 3 and the second 0 are padding
WEIGHTS = jnp.array([5.0, 0.5, 2.0, 0.0, 11.0, 3.0, 0.0, 1.0])
FEDERATION = fedbpt(NUM_CLIENTS, COHORT, LAMBDA)


def total(x):
    return x.sum(0)


AGGREGATE = jax.jit(lambda *args: FEDERATION.aggregate(*args, total))
GATHER = jax.jit(gathered, static_argnums=(3, 4, 5))


def moved(federation, server, ids, weights, index=0):
    """Clients at the end of a round, as functions of their ids; whoever did not take part holds NaN."""

    def end(state, i, weight):
        flat, unravel = ravel_pytree(state.distribution.params)
        there = flat + state.distribution.step_size * jnp.sin(1.0 + 2.0 * i + 0.7 * jnp.arange(flat.size) + index)
        distribution = state.distribution._replace(params=unravel(there))
        ended = FedBPTState(distribution, (1.0 + i) * state.distribution.step_size**2, jnp.cos(3.0 * i + index))
        return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else jnp.where(weight > 0, x, jnp.nan), ended)

    return jax.vmap(end)(federation.broadcast(server, ids), ids, weights)


MOVED = jax.jit(moved, static_argnums=0)


def play(federation, total, server, ids, weights):
    """Three rounds, of which the second has nobody in it."""
    for index in range(3):
        present = weights * (index != 1)
        server = federation.aggregate(server, ids, moved(federation, server, ids, present, index), present, total)
    return server


@pytest.fixture(scope="module")
def server():
    """A distribution in which nothing is as at the beginning."""
    start = initial_distribution({"z": jnp.linspace(-1, 1, DIM)}, 0.8)
    return jax.jit(partial(play, FEDERATION, total))(start, IDS, WEIGHTS)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, atol=1e-5):
    for name in ("params", "step_size", "covariance", "step_path", "covariance_path", "generation"):
        check = partial(np.testing.assert_allclose, atol=atol, err_msg=name)
        jax.tree.map(check, getattr(found, name), getattr(expected, name))


# The server's generation


@pytest.mark.slow
def test_clients_that_end_at_candidates_of_cma_es_are_a_generation_of_it(server, key):
    """Six clients whose step sizes make sigma' the server's own: 2 sqrt(3 s / (6 lambda)) = sigma."""
    optimizer = cma_es(COHORT, 1.0)
    points = jax.jit(jax.vmap(lambda k: optimizer.ask(key, server, k)))(jnp.arange(COHORT))
    losses = jax.random.normal(key, (COHORT,))
    clients = FEDERATION.broadcast(server, jnp.arange(COHORT))
    clients = FedBPTState(
        clients.distribution._replace(params=points), jnp.full(COHORT, LAMBDA / 2) * server.step_size**2, losses
    )
    found = AGGREGATE(server, jnp.arange(COHORT), clients, jnp.ones(COHORT))
    expected, _ = jax.jit(optimizer.tell)(key, server, losses[:, None], jnp.ones((COHORT, 1), bool))
    assert_close(found, expected)
    np.testing.assert_allclose(found.basis * found.scales**2 @ found.basis.T, found.covariance, atol=1e-5)
    assert np.abs(found.params["z"] - server.params["z"]).max() > 0.05


def test_one_client_takes_the_mean_with_it(server):
    federation = fedbpt(NUM_CLIENTS, 1, LAMBDA)
    clients = MOVED(federation, server, jnp.array([4]), jnp.ones(1))
    after = jax.jit(federation.aggregate, static_argnums=4)(server, jnp.array([4]), clients, jnp.ones(1), total)
    np.testing.assert_allclose(after.params["z"], clients.params["z"][0], atol=1e-6)


def test_the_mean_is_of_the_better_half_or_of_all(server):
    clients = MOVED(FEDERATION, server, IDS, WEIGHTS)
    ends = {int(i): clients.params["z"][n] for n, i in enumerate(IDS) if WEIGHTS[n] > 0}
    ranked = sorted(ends, key=lambda i: np.cos(np.float32(3.0 * i)))
    for federation, zero in [(FEDERATION, 3.5), (fedbpt(NUM_CLIENTS, COHORT, LAMBDA, zero_rank=every_rank), 6.5)]:
        after = jax.jit(federation.aggregate, static_argnums=4)(server, IDS, clients, WEIGHTS, total)
        weights = np.maximum(np.log(zero) - np.log(np.arange(1, 7)), 0)
        expected = np.average([ends[i] for i in ranked], axis=0, weights=weights)
        np.testing.assert_allclose(after.params["z"], expected, atol=1e-5)


# Step sizes


@pytest.mark.parametrize("absent", [[], [2], [0, 5], [0, 1, 2, 3, 4]], ids=str)
def test_the_server_step_size_is_that_of_the_paper(absent):
    """Equation 6; an odd number of clients has its half rounded down, and one client is its own best half."""
    rng = np.random.default_rng(0)
    losses, sigmas = rng.normal(size=6), rng.uniform(0.5, 2, (6, 8))
    answered = ~np.isin(np.arange(6), absent)
    found = server_step_size(
        jnp.where(answered, losses, -jnp.inf), jnp.asarray((sigmas**2).sum(1)), jnp.asarray(answered), LAMBDA
    )
    best = sorted(np.flatnonzero(answered), key=lambda k: losses[k])[: max(1, answered.sum() // 2)]
    expected = 2 * np.sqrt((sigmas[best] ** 2).sum() / (2 * len(best) * LAMBDA))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_clients_scale_their_step_size_as_the_server_does(server):
    """sigma_(t+1) = sigma_t * new / sigma', whatever sigma' is."""
    clients = MOVED(FEDERATION, server, IDS, WEIGHTS)
    ratios = []
    for own in (0.5, 2.0):
        after = AGGREGATE(server._replace(step_size=jnp.float32(own)), IDS, clients, WEIGHTS)
        ratios.append(after.step_size / own)
    np.testing.assert_allclose(*ratios, rtol=1e-6)
    assert ratios[0] != 1


def test_the_floor_of_the_step_size_holds():
    """Clients that end where they began shrink the step, round after round, down to the floor and no further."""
    federation, ids = fedbpt(4, 4, LAMBDA, min_step_size=0.5), jnp.arange(4)
    state = initial_distribution(jnp.zeros(DIM), 1.0)
    aggregate = jax.jit(lambda server, clients: federation.aggregate(server, ids, clients, jnp.ones(4), total))
    sizes = []
    for _ in range(12):
        clients = federation.broadcast(state, ids)
        state = aggregate(state, clients._replace(squared_step_sizes=jnp.ones(4), loss=jnp.arange(4.0)))
        sizes.append(float(state.step_size))
    assert sizes[0] > sizes[1] > 0.5
    assert sizes[-3:] == [0.5] * 3
    np.testing.assert_array_equal(federation.broadcast(state, ids).distribution.step_size, 0.5)


# Who takes part


def test_the_order_of_clients_does_not_matter(server):
    clients = MOVED(FEDERATION, server, IDS, WEIGHTS)
    order = np.array([5, 2, 7, 0, 6, 1, 4, 3])
    shuffled = jax.tree.map(lambda x: x[order], clients)
    assert_same(AGGREGATE(server, IDS[order], shuffled, WEIGHTS[order]), AGGREGATE(server, IDS, clients, WEIGHTS))


def test_whoever_did_not_take_part_has_no_effect(server):
    clients = MOVED(FEDERATION, server, IDS, WEIGHTS)  # NaN in the padding
    present = np.asarray(WEIGHTS > 0)
    expected = AGGREGATE(server, IDS, clients, WEIGHTS)
    alone = jax.tree.map(lambda x: x[present], clients)
    assert_close(AGGREGATE(server, IDS[present], alone, WEIGHTS[present]), expected)
    assert np.isfinite(expected.covariance).all()
    others = AGGREGATE(server, jnp.where(present, IDS, 5), clients, WEIGHTS * 3)
    assert_same(others, expected)


@pytest.mark.parametrize("spoil", ["loss", "mean"])
def test_a_client_without_a_report_does_not_count(server, spoil):
    clients = MOVED(FEDERATION, server, IDS, WEIGHTS)
    z = clients.params["z"]
    if spoil == "loss":
        spoilt = clients._replace(loss=clients.loss.at[4].set(jnp.nan))
    else:
        spoilt = clients._replace(distribution=clients.distribution._replace(params={"z": z.at[4, 0].set(jnp.nan)}))
    found = AGGREGATE(server, IDS, spoilt, WEIGHTS)
    assert_close(found, AGGREGATE(server, IDS, clients, WEIGHTS.at[4].set(0.0)))


def test_a_round_of_nobody_leaves_everything_as_it_was(server):
    clients = MOVED(FEDERATION, server, IDS, WEIGHTS)
    assert_same(AGGREGATE(server, IDS, clients, jnp.zeros(8)), server)
    silent = clients._replace(loss=jnp.full(8, jnp.nan))
    assert_same(AGGREGATE(server, IDS, silent, WEIGHTS), server)


def test_reports_are_in_the_order_of_ids(server):
    clients = MOVED(FEDERATION, server, IDS, WEIGHTS)
    found = GATHER(clients, IDS, WEIGHTS, total, NUM_CLIENTS, 8)
    ratios = found.squared_step_sizes[:6] / found.squared_step_sizes[0]
    np.testing.assert_allclose(ratios, [1, 2, 4, 5, 8, 10], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(found.losses), [False] * 6 + [True] * 2)
    np.testing.assert_array_equal(found.means[4], clients.params["z"][0])


@pytest.mark.parametrize("num_devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_servers_are_the_same_on_any_number_of_devices(server, num_devices):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((num_devices,), ("clients",), axis_types=auto, devices=jax.devices()[:num_devices])
    spread, everywhere = PartitionSpec("clients"), PartitionSpec()
    over_devices = jax.shard_map(
        lambda server, ids, weights: FEDERATION.aggregate(
            server,
            ids,
            moved(FEDERATION, server, ids, weights),
            weights,
            lambda x: jax.lax.psum(x.sum(0), "clients"),
        ),
        mesh=mesh,
        in_specs=(everywhere, spread, spread),
        out_specs=everywhere,
    )
    found = jax.jit(over_devices)(server, IDS, WEIGHTS)
    assert_close(found, AGGREGATE(server, IDS, MOVED(FEDERATION, server, IDS, WEIGHTS), WEIGHTS))
    copies = {np.asarray(shard.data).tobytes() for shard in found.covariance.addressable_shards}
    assert len(copies) == 1


# Replay and what travels


def test_replaying_the_reports_gives_the_servers_bits(server):
    """Over three rounds with nothing but the reports; without the free places, to rounding."""
    step = jax.jit(replay(COHORT + 2, LAMBDA))
    federation = fedbpt(NUM_CLIENTS, COHORT + 2, LAMBDA)
    aggregate = jax.jit(lambda *args: federation.aggregate(*args, total))
    sent = replayed = shorter = server
    for index in range(3):
        clients = MOVED(federation, sent, IDS, WEIGHTS, index)
        reports = GATHER(clients, IDS, WEIGHTS, total, NUM_CLIENTS, COHORT + 2)
        sent = aggregate(sent, IDS, clients, WEIGHTS)
        replayed = step(replayed, reports)
        shorter = step(shorter, jax.tree.map(lambda x: x[:6], reports))
    assert_same(replayed, sent)
    assert_close(shorter, sent, atol=1e-6)
    assert np.abs(sent.covariance - server.covariance).max() > 0.01


def test_payload_is_the_size_of_what_is_sent():
    """Ten clients and d = 500: 20 kB down instead of 1 MB."""
    federation, dim = fedbpt(100, 10, 5), 500
    client = fedbpt_client(cma_es(5, 1.0)).init({"z": jnp.zeros(dim)})

    def size(tree):
        return sum(len(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree))

    reports = GATHER(jax.tree.map(lambda x: jnp.stack([x] * 10), client), jnp.arange(10), jnp.ones(10), total, 100, 10)
    one = Reports(*(x[0] for x in reports))
    assert federation.payload_bytes(client) == (size(reports), size(one)) == (20_080, 2_008)
    server = federation.init(client)
    sent = size((server.params, server.step_size, server.covariance))
    assert with_sent_covariance(federation).payload_bytes(client) == (sent, size(one)) == (1_002_004, 2_008)


# Clients


def test_clients_remember_the_step_sizes_they_used(key):
    inner = cma_es(LAMBDA, 2.0)
    client, tell = fedbpt_client(inner), jax.jit(inner.tell)
    client_tell = jax.jit(client.tell)
    state, plain, squares = client.init(jnp.zeros(DIM)), inner.init(jnp.zeros(DIM)), 0.0
    for t in range(4):
        step_key = jax.random.fold_in(key, t)
        np.testing.assert_allclose(client.ask(step_key, state, 1), inner.ask(step_key, plain, 1), atol=1e-5)
        losses = jax.random.normal(step_key, (LAMBDA, 1))
        valid = jnp.full((LAMBDA, 1), t != 2)  # a generation without answers moves nothing and does not count
        squares += float(plain.step_size) ** 2 * (t != 2)
        state, info = client_tell(step_key, state, losses, valid)
        plain, expected = tell(step_key, plain, losses, valid)
        assert info.num_directions == expected.num_directions
    np.testing.assert_allclose(state.squared_step_sizes, squares, rtol=1e-6)
    np.testing.assert_allclose(client.solution(state), inner.solution(plain), atol=1e-5)
    assert np.isnan(state.loss)
    assert client.num_candidates == LAMBDA


def test_the_reported_loss_is_the_mean_of_valid_ones():
    state = fedbpt_client(cma_es(LAMBDA, 2.0)).init(jnp.zeros(DIM))
    losses = jnp.array([1.0, jnp.nan, 4.0])
    assert report(state, losses, jnp.array([True, False, True])).loss == 2.5
    assert np.isnan(report(state, losses, jnp.zeros(3, bool)).loss)


def test_rounds_begin_with_the_distribution_and_fresh_paths(server):
    clients = FEDERATION.broadcast(server, IDS)
    for name in ("step_size", "covariance", "basis", "scales"):
        found = getattr(clients.distribution, name)
        np.testing.assert_array_equal(found, np.broadcast_to(getattr(server, name), found.shape))
    for x in (clients.distribution.step_path, clients.distribution.covariance_path, clients.distribution.generation):
        assert not np.asarray(x).any()
    assert np.asarray(server.step_path).any()
    assert not np.asarray(clients.squared_step_sizes).any()
    (outcome,) = FEDERATION.outcomes(server).params["z"]
    np.testing.assert_array_equal(outcome, server.params["z"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 6, 4), "cohort of 6 is larger than the federation of 5"),
        ((5, 0, 4), "cohort_size must be positive, got 0"),
        ((5, 2, 0), "num_candidates must be positive, got 0"),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        fedbpt(*sizes)


# Rounds


def reporting(optimizer):
    """Reports the mean loss of its last generation, for want of one at its mean."""

    def tell(key, state, losses, valid):
        state, info = optimizer.tell(key, state, losses, valid)
        return state._replace(loss=info.loss), info

    return optimizer._replace(tell=tell)


@pytest.fixture
def method():
    optimizer = reporting(fedbpt_client(cma_es(LAMBDA, 0.5)))
    return Method(vector_generator(4), cross_entropy, optimizer, fedbpt(8, 8, LAMBDA))


@pytest.mark.slow
def test_rounds_learn_what_clients_have_in_common(method, vectors, key):
    start = method.federation.init(method.optimizer.init(method.generator.init(key)))
    run = compile_rounds(method, uniform_cohort(8), local_steps=4, batch_size=60)
    clients = pack(vectors, [np.arange(60)] * 8)
    server, info = run(jax.tree_util.Partial(linear_box), start, clients, key, jnp.arange(12))
    assert info.step.loss[-1] < 0.5 * info.step.loss[0]
    assert server.generation == 12
    assert np.isfinite(server.covariance).all()


@pytest.mark.slow
def test_placements_agree(method, vectors, key):
    cohort_size = 5
    parts = [np.arange(i, 60, 8) for i in range(8)]
    method = method._replace(federation=fedbpt(8, cohort_size, LAMBDA))
    start = method.federation.init(method.optimizer.init(method.generator.init(key)))
    box, rounds = jax.tree_util.Partial(linear_box), jnp.arange(4)
    sizes = {"local_steps": 3, "batch_size": 4}
    who = uniform_cohort(cohort_size)
    expected, _ = compile_rounds(method, who, **sizes)(box, start, pack(vectors, parts), key, rounds)
    on_host, _ = host_rounds(method, who, **sizes)(box, start, pack(vectors, parts), key, rounds)
    assert_close(on_host, expected, atol=1e-4)
    mesh = make_mesh(4)
    spread = place_clients(pack(vectors, parts, num_shards=4), mesh)
    over_devices, _ = shard_rounds(method, who, mesh, **sizes)(
        *replicate((box, start), mesh), spread, *replicate((key, rounds), mesh)
    )
    assert_close(over_devices, expected, atol=1e-4)
