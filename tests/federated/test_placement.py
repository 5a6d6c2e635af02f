"""One round body, four placements: compiled, sharded over 1 to 8 devices, streamed, around a host box; same results."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import linear_box, vector_generator
from jax.sharding import PartitionSpec

from fedbbpt_jax.estimators.catalogue import ESTIMATORS
from fedbbpt_jax.estimators.directions import rademacher
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.federated.averaging import isolated, weighted_mean
from fedbbpt_jax.federated.cohort import draw_cohort, pack
from fedbbpt_jax.federated.host import host_rounds
from fedbbpt_jax.federated.mesh import CLIENTS, make_mesh, place_clients, replicate
from fedbbpt_jax.federated.participation import (
    uniform_cohort,
    weighted_cohort,
    with_availability,
    with_dropout,
    with_equal_weights,
)
from fedbbpt_jax.federated.placement import compile_rounds, shard_rounds
from fedbbpt_jax.federated.streaming import prefetched, stream_rounds
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.optimizers.descent import descent
from fedbbpt_jax.types import EstimateInfo, Method, Query

SIZES = {"local_steps": 2, "batch_size": 3}
PARTS = np.split(np.arange(60), [3, 10, 14, 30, 33, 35, 50, 51, 58])  # ten clients of 1 to 16 examples
PARTICIPATIONS = {
    "everyone": uniform_cohort(10),
    "six": uniform_cohort(6),
    "one": uniform_cohort(1),
    "all-equal": with_equal_weights(uniform_cohort(10)),
    "by-size": weighted_cohort(5),
    "equal-weights": with_equal_weights(uniform_cohort(7)),
    "drop-out": with_dropout(uniform_cohort(10), 0.4),
    "nobody-in-round-1": with_availability(uniform_cohort(10), np.array([[True] * 10, [False] * 10])),
}
FEDERATIONS = {"fedavg": weighted_mean(), "isolated": isolated(10)}


def make_method(federation):
    return Method(vector_generator(4), cross_entropy, descent(spsa(rademacher(), 2, 0.1), optax.adam(0.05)), federation)


def start(method):
    return method.federation.init(method.optimizer.init(method.generator.init(jax.random.key(0))))


def play(run_rounds, method, clients, key, rounds=(0, 1, 2)):
    box = jax.tree_util.Partial(linear_box)
    return jax.device_get(run_rounds(box, start(method), clients, key, np.asarray(rounds, np.int32)))


def sharded(method, participation, vectors, num_devices, chunk_size=4):
    mesh = make_mesh(num_devices)
    clients = place_clients(pack(vectors, PARTS, num_devices), mesh)
    return shard_rounds(method, participation, mesh, chunk_size=chunk_size, **SIZES), clients


def check_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if np.issubdtype(a.dtype, np.integer):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def check_placements(vectors, key, method, who, num_devices):
    expected = play(compile_rounds(method, who, **SIZES), method, pack(vectors, PARTS), key)
    assert any(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(expected[0]))
    for looped in (host_rounds(method, who, **SIZES), stream_rounds(method, who, **SIZES, group_size=3)):
        check_same(play(looped, method, pack(vectors, PARTS), key), expected)
    for number in num_devices:
        run_rounds, clients = sharded(method, who, vectors, number)
        check_same(play(run_rounds, method, clients, key), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("federation", "num_devices"), [("fedavg", [1, 2, 4, 8]), ("isolated", [4])])
def test_any_number_of_devices_gives_the_same(vectors, key, federation, num_devices):
    check_placements(vectors, key, make_method(FEDERATIONS[federation]), PARTICIPATIONS["drop-out"], num_devices)


@pytest.mark.slow
@pytest.mark.parametrize(("num_devices", "is_same"), [(5, True), (4, False)])
def test_pmean_is_right_for_devices_of_equal_weight_only(vectors, key, num_devices, is_same):
    who, axis = PARTICIPATIONS["all-equal"], CLIENTS
    run_rounds, clients = sharded(make_method(weighted_mean()), who, vectors, num_devices)
    (ours,) = jax.tree.leaves(play(run_rounds, make_method(weighted_mean()), clients, key, rounds=[0])[0].params)
    apart = make_method(isolated(10))  # ten clients after the same round, before anything is averaged
    played = play(compile_rounds(apart, who, **SIZES), apart, pack(vectors, PARTS), key, rounds=[0])
    (single,), held = jax.tree.leaves(played[0].params), -(-10 // num_devices)
    by_device = [single[i : i + held].mean(0) for i in range(0, 10, held)]
    mean = jax.shard_map(
        lambda x: jax.lax.pmean(x, axis),
        mesh=make_mesh(num_devices),
        in_specs=PartitionSpec(axis),
        out_specs=PartitionSpec(),
    )
    assert np.allclose(ours, mean(np.stack(by_device))[0], atol=1e-6) == is_same


@pytest.mark.slow
@pytest.mark.parametrize("participation", [name for name in PARTICIPATIONS if name != "drop-out"])
def test_any_participation_gives_the_same(vectors, key, participation):
    check_placements(vectors, key, make_method(weighted_mean()), PARTICIPATIONS[participation], [4])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spsa-one-sided", "spsa-orthogonal", "spsa-control-variate", "spsa-guided"])
def test_estimators_run_on_a_mesh(vectors, key, name):
    """The replication checks accept it: what an estimator makes of a state varies over devices as that does."""
    optimizer = descent(ESTIMATORS[name].build(2, 0.1), optax.sgd(0.05))
    method = make_method(weighted_mean())._replace(optimizer=optimizer)
    expected = play(compile_rounds(method, uniform_cohort(4), **SIZES), method, pack(vectors, PARTS), key, [0, 1])
    run_rounds, clients = sharded(method, uniform_cohort(4), vectors, 2)
    check_same(play(run_rounds, method, clients, key, [0, 1]), expected)


class TestHost:
    @pytest.mark.slow
    def test_clients_that_stay_away_are_not_asked(self, vectors, key):
        """One query for each local step, of those who came; the padded and the absent cost nothing."""
        method, asked = make_method(weighted_mean()), []

        def box(query):
            asked.append((query.prompt.shape[:2], query.inputs.shape[:2]))
            return linear_box(query)

        who = with_availability(uniform_cohort(10), np.arange(10)[None] < 3)
        run_rounds = host_rounds(method, who, **SIZES)
        _, info = run_rounds(box, start(method), pack(vectors, PARTS), key, [0, -1])
        assert asked == [((3, 4), (3, 3))] * 2
        assert list(map(int, info.num_requests)) == [3 * 4 * 3 * 2, 0]

    def test_what_the_box_raises_passes_through(self, vectors, key):
        method = make_method(weighted_mean())

        def box(query):
            raise ConnectionError("the line is dead")

        with pytest.raises(ConnectionError, match="the line is dead"):
            host_rounds(method, uniform_cohort(2), **SIZES)(box, start(method), pack(vectors, PARTS), key, [0])


def spoilt_twice(key, examples):
    """A minibatch and two copies of it whose inputs are noisy."""

    def copy(k):
        inputs = examples.inputs + jax.random.normal(jax.random.fold_in(key, k), examples.inputs.shape)
        return examples._replace(inputs=inputs)

    return jax.tree.map(lambda *x: jnp.concatenate(x), examples, copy(0), copy(1))


@pytest.mark.slow
def test_reports_and_views_on_any_placement(vectors, key):
    """Losses of the solutions, which here move the parameters; every request is counted."""

    def report(state, losses, valid):
        assert losses.shape == valid.shape == (9,)
        return state._replace(params=jax.tree.map(lambda x: x + jnp.where(valid, losses, 0).mean(), state.params))

    method = make_method(weighted_mean()._replace(report=report))._replace(view=spoilt_twice)
    check_placements(vectors, key, method, PARTICIPATIONS["drop-out"], [4])
    _, info = play(compile_rounds(method, uniform_cohort(3), **SIZES), method, pack(vectors, PARTS), key, [0])
    assert info.num_requests[0] == info.num_valid[0] == 3 * (4 * 2 + 1) * 9
    assert info.num_evaluations[0] == 3 * (4 * 2 + 1) * 3


@pytest.mark.slow
def test_a_report_is_of_the_solution_on_the_last_minibatch(vectors, key):
    """Worked out by hand: no optimizer moves, so that the loss is that of the start."""
    method = make_method(weighted_mean()._replace(report=lambda s, losses, valid: s._replace(params={"shift": losses})))
    optimizer = method.optimizer._replace(tell=lambda key, state, losses, valid: (state, EstimateInfo(*jnp.zeros(3))))
    method, clients, sizes = method._replace(optimizer=optimizer), pack(vectors, PARTS), {**SIZES, "batch_size": 4}
    server, _ = play(compile_rounds(method, uniform_cohort(1), **sizes), method, clients, key, [5])
    cohort_key, _ = jax.random.split(jax.random.fold_in(key, 5))
    rows = draw_cohort(cohort_key, 5, clients, uniform_cohort(1), **sizes).rows[0, -1]
    scores = linear_box(Query(jnp.zeros((1, 1, 4)), vectors.inputs[rows][None])).scores[0, 0]
    np.testing.assert_allclose(server.params["shift"], cross_entropy(scores, vectors.labels[rows]), rtol=1e-6)


class TestStream:
    @pytest.mark.parametrize("group_size", [1, 4, 64])
    @pytest.mark.slow
    def test_groups_change_memory_only(self, vectors, key, group_size):
        method, who = make_method(weighted_mean()), PARTICIPATIONS["drop-out"]
        expected = play(compile_rounds(method, who, **SIZES), method, pack(vectors, PARTS), key, [0, -1, 2])
        streamed = stream_rounds(method, who, **SIZES, group_size=group_size)
        check_same(play(streamed, method, pack(vectors, PARTS), key, [0, -1, 2]), expected)

    @pytest.mark.slow
    def test_examples_may_lie_in_a_file(self, vectors, key, tmp_path):
        """Of a memory map only the minibatches of a few groups are ever read."""
        clients = pack(vectors, PARTS)
        np.save(tmp_path / "inputs.npy", clients.examples.inputs)
        mapped = np.load(tmp_path / "inputs.npy", mmap_mode="r")
        method, who = make_method(weighted_mean()), uniform_cohort(4)
        found = play(
            stream_rounds(method, who, **SIZES),
            method,
            clients._replace(examples=clients.examples._replace(inputs=mapped)),
            key,
        )
        check_same(found, play(compile_rounds(method, who, **SIZES), method, clients, key))

    def test_only_the_minibatches_of_a_group_are_moved(self, vectors, key, monkeypatch):
        moved, device_put = [], jax.device_put
        monkeypatch.setattr("jax.device_put", lambda x: moved.append(x.shape) or device_put(x))
        method = make_method(weighted_mean())
        run_rounds = stream_rounds(method, uniform_cohort(10), **SIZES, group_size=4)
        play(run_rounds, method, pack(vectors, PARTS), key, [0])
        assert set(moved) == {(12, 4), (12, 0), (12,)}, "inputs, features and labels of 4 clients x 3 examples"
        assert len(moved) == 3 * 2 * 3, "three leaves, two steps, three groups"

    def test_work_is_done_ahead_and_no_further(self):
        begun = []
        results = prefetched(lambda x: begun.append(x) or -x, range(10), depth=2)
        assert next(results) == 0
        assert len(begun) <= 3
        assert list(results) == [-i for i in range(1, 10)]

    def test_an_error_is_raised_where_its_result_is_due(self):
        results = prefetched(lambda x: 1 // x, [1, 1, 0, 1], depth=3)
        assert [next(results), next(results)] == [1, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_clients_of_a_device_are_on_no_other(vectors):
    """Ten clients over four devices: 3, 3, 3 and 1; a shard repeats its own rows up to the longest one."""
    mesh = make_mesh(4)
    placed = place_clients(pack(vectors, PARTS, 4), mesh)
    for shard, device in enumerate(mesh.devices):
        held = {i for part in PARTS[3 * shard : 3 * shard + 3] for i in part}
        (own,) = (s.data for s in placed.examples.inputs.addressable_shards if s.device == device)
        rows = {int(np.flatnonzero((vectors.inputs == row).all(1))[0]) for row in np.asarray(own)}
        assert rows == held


def test_more_devices_than_clients_are_refused(vectors):
    with pytest.raises(ValueError, match="10 clients cannot be spread over 16 devices"):
        pack(vectors, PARTS, 16)


def test_one_program_for_every_cohort(vectors, key):
    """Cohorts, segments and weights change from round to round, what is compiled does not."""
    method = make_method(weighted_mean())
    run_rounds, clients = sharded(method, with_dropout(uniform_cohort(5), 0.3), vectors, 2)
    server, box = start(method), jax.tree_util.Partial(linear_box)
    server = replicate(server, make_mesh(2))
    for rounds in ([0, 1], [2, -1]):
        server, _ = run_rounds(box, server, clients, key, np.asarray(rounds, np.int32))
    assert run_rounds._cache_size() == 1
