"""The compiled round against a slow round written in plain Python, and its counts against a counting box."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import linear_box, vector_generator

from fedbbpt_jax.estimators.directions import rademacher
from fedbbpt_jax.estimators.policy_gradient import bdpl, gumbel, leave_one_out, policy_gradient
from fedbbpt_jax.estimators.spsa import one_sided_spsa, spsa
from fedbbpt_jax.federated.averaging import isolated, weighted_mean
from fedbbpt_jax.federated.cohort import draw_cohort, pack
from fedbbpt_jax.federated.participation import uniform_cohort
from fedbbpt_jax.federated.placement import compile_rounds
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.optimizers.descent import descent
from fedbbpt_jax.prompts.tokens import at_least, on_simplex, tokens
from fedbbpt_jax.types import Cohort, Method, Query, Response

SIZES = {"local_steps": 3, "batch_size": 4}


def make_method(federation=None, estimator=None):
    estimator = estimator or spsa(rademacher(), 2, 0.1)
    optimizer = descent(estimator, optax.adam(0.05))
    return Method(vector_generator(4), cross_entropy, optimizer, federation or weighted_mean())


@pytest.fixture
def clients(vectors):
    return pack(vectors, [np.arange(0, 10), np.arange(10, 35), np.arange(35, 60)])


def start(method, key):
    return method.federation.init(method.optimizer.init(method.generator.init(key)))


def play(method, clients, key, rounds, *, cohort_size=3, chunk_size=8, box=None):
    run_rounds = compile_rounds(method, uniform_cohort(cohort_size), chunk_size=chunk_size, **SIZES)
    box = box or jax.tree_util.Partial(linear_box)
    return run_rounds(box, start(method, key), clients, key, jnp.asarray(rounds, jnp.int32))


def slow_round(key, params, adam, cohort: Cohort, examples):
    """One FedAvg round of two-sided SPSA and Adam, one client, candidate and example at a time, in float64."""
    finished = []
    for i, client in enumerate(np.asarray(cohort.ids)):
        x, (m, v, t) = params.copy(), (adam[0].copy(), adam[1].copy(), adam[2])
        client_key = jax.random.fold_in(key, client)
        for step in range(SIZES["local_steps"]):
            step_key = jax.random.fold_in(client_key, step)
            inputs, labels = (np.asarray(x[cohort.rows[i, step]], "d") for x in (examples.inputs, examples.labels))
            g = np.zeros(4)
            for j in range(2):
                tree = {"shift": jnp.zeros(4)}
                delta = np.asarray(rademacher().sample(step_key, j, tree)["shift"], "d")
                sides = []
                for candidate in (x + 0.1 * delta, x - 0.1 * delta):
                    losses = []
                    for example, label in zip(inputs, labels.astype(int), strict=True):
                        scores = example + candidate
                        scores = scores + 0.3 * np.sin(scores)
                        losses.append(np.log(np.exp(scores).sum()) - scores[label])
                    sides.append(np.mean(losses))
                g += (sides[0] - sides[1]) / 0.2 * delta / 2
            t += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            x = x - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        finished.append((x, m, v))
    w = np.asarray(cohort.weights, "d")
    x, m, v = (np.average([f[n] for f in finished], axis=0, weights=w) for n in range(3))
    return x, (m, v, t)


@pytest.mark.parametrize(("cohort_size", "num_rounds"), [(3, 2), (1, 3)], ids=["fedavg", "fedone"])
def test_equals_a_slow_round_in_plain_python(clients, key, cohort_size, num_rounds):
    """Of one client a round, the server takes over what that client came to: FedOne's sequence."""
    method = make_method()
    server, _ = play(method, clients, key, range(num_rounds), cohort_size=cohort_size)
    params, adam = np.zeros(4), (np.zeros(4), np.zeros(4), 0)
    for index in range(num_rounds):
        cohort_key, client_key = jax.random.split(jax.random.fold_in(key, index))
        cohort = draw_cohort(cohort_key, index, clients, uniform_cohort(cohort_size), **SIZES)
        params, adam = slow_round(client_key, params, adam, cohort, clients.examples)
    assert np.abs(params).max() > 0.1
    # Six to nine Adam steps of 0.05 whose float32 gradients are right to about 1e-6 (losses of size 1 over 2c = 0.2)
    np.testing.assert_allclose(method.optimizer.solution(server)["shift"], params, atol=3e-6)


WORD_SCORES = np.sin(np.arange(7 * 4.0)).reshape(7, 4).astype("f")


def word_box(query):
    """Scores of inputs `[C, B, 4]` after the words of a prompt `[C, K, P]`."""
    scores = jnp.asarray(WORD_SCORES)[query.prompt].sum(2)[:, :, None] + query.inputs[:, None]
    return Response(scores, jnp.ones(scores.shape[:3], bool))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "start_at", "bound"),
    [(bdpl(5), None, on_simplex()), (policy_gradient(gumbel(1.0), 5, leave_one_out), 1.0, at_least(1e-3))],
    ids=["bdpl", "gumbel"],
)
def test_one_client_a_round_hands_the_policy_on(clients, key, estimator, start_at, bound):
    """FedOne for words: the policy and its moments go from client to client, as if one party had walked on."""
    # A larger eps, because Adam makes steps of rounding errors where a gradient is as small as these.
    optimizer = descent(estimator, optax.chain(optax.adam(0.02, eps=1e-3), bound))
    method = Method(tokens(range(7), 3, start_at), cross_entropy, optimizer, weighted_mean())
    server, _ = play(method, clients, key, range(8), cohort_size=1, box=jax.tree_util.Partial(word_box))
    tell = jax.jit(optimizer.tell)
    state, seen = optimizer.init(method.generator.init(key)), set()
    for index in range(8):
        cohort_key, client_key = jax.random.split(jax.random.fold_in(key, index))
        cohort = draw_cohort(cohort_key, index, clients, uniform_cohort(1), **SIZES)
        seen.add(int(cohort.ids[0]))
        for step in range(SIZES["local_steps"]):
            step_key = jax.random.fold_in(jax.random.fold_in(client_key, cohort.ids[0]), step)
            rows = np.asarray(cohort.rows[0, step])
            prompts = [method.generator.generate(optimizer.ask(step_key, state, k), None) for k in range(5)]
            scores = WORD_SCORES[np.stack(prompts)].sum(1)[:, None] + clients.examples.inputs[rows]
            losses = cross_entropy(jnp.asarray(scores), jnp.asarray(clients.examples.labels[rows])[None].repeat(5, 0))
            state, _ = tell(step_key, state, losses, jnp.ones(losses.shape, bool))
    assert len(seen) > 1
    assert np.abs(state.params - method.generator.init(key)).max() > 0.05
    np.testing.assert_allclose(server.params, state.params, atol=1e-5)


def test_same_seed_same_bits(clients, key):
    first, second = (play(make_method(), clients, key, [0, 1, 2])[0] for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))
    other, _ = play(make_method(), clients, jax.random.key(8), [0, 1, 2])
    assert not jnp.array_equal(first.params["shift"], other.params["shift"])


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 12])
def test_chunks_change_speed_only(clients, key, chunk_size):
    expected, _ = play(make_method(), clients, key, [0, 1])
    found, _ = play(make_method(), clients, key, [0, 1], chunk_size=chunk_size)
    np.testing.assert_allclose(found.params["shift"], expected.params["shift"], atol=1e-6)


def test_scanned_rounds_equal_single_ones_and_negative_ones_are_skipped(clients, key):
    method = make_method()
    scanned, info = play(method, clients, key, [0, 1, -1, -1])
    run_rounds = compile_rounds(method, uniform_cohort(3), **SIZES)
    server = start(method, key)
    for index in range(2):
        server, _ = run_rounds(jax.tree_util.Partial(linear_box), server, clients, key, jnp.array([index]))
    np.testing.assert_allclose(scanned.params["shift"], server.params["shift"], atol=1e-6)
    np.testing.assert_array_equal(info.num_requests, [144, 144, 0, 0])  # 3 clients, 4 candidates, 3 steps, 4 examples


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("seen",))
@dataclass(frozen=True)
class CountingBox:
    """Adds the number of (prompt, example) pairs of every query to a list, as the program runs."""

    seen: "Log"

    def __call__(self, query: Query) -> Response:
        pairs = query.prompt.shape[0] * query.prompt.shape[1] * query.inputs.shape[1]
        # An argument that is batched makes the callback run once for each query of a chunk.
        jax.debug.callback(lambda _: self.seen.pairs.append(pairs), query.prompt.sum())
        return linear_box(query)


class Log:
    def __init__(self):
        self.pairs = []


@pytest.mark.parametrize(
    "estimator", [spsa(rademacher(), 2, 0.1), one_sided_spsa(rademacher(), 4, 0.1)], ids=["two-sided", "one-sided"]
)
@pytest.mark.parametrize("cohort_size", [3, 2])
def test_reported_requests_are_those_a_counting_box_saw(clients, key, estimator, cohort_size):
    log = Log()
    method = make_method(estimator=estimator)
    _, info = play(method, clients, key, [0, 1], cohort_size=cohort_size, box=CountingBox(log))
    jax.effects_barrier()
    assert int(info.num_requests.sum()) == sum(log.pairs) == 2 * cohort_size * estimator.num_candidates * 3 * 4
    assert int(info.num_evaluations.sum()) == len(log.pairs)
    assert int(info.num_valid.sum()) == sum(log.pairs)


def silent_box(query: Query) -> Response:
    response = linear_box(query)
    return Response(jnp.full_like(response.scores, jnp.nan), jnp.zeros_like(response.valid))


def test_a_box_that_never_answers_moves_nothing(clients, key):
    method = make_method()
    server, info = play(method, clients, key, [0], box=jax.tree_util.Partial(silent_box))
    np.testing.assert_array_equal(server.params["shift"], np.zeros(4))
    assert int(info.num_valid[0]) == 0
    assert int(info.num_requests[0]) == 144


@pytest.mark.slow
def test_isolated_clients_learn_from_their_own_data_only(clients, key):
    method = make_method(federation=isolated(3))
    server, _ = play(method, clients, key, [0, 1])
    poisoned = clients._replace(
        examples=clients.examples._replace(inputs=np.where(np.arange(60)[:, None] < 35, clients.examples.inputs, -5.0))
    )
    after, _ = play(method, poisoned, key, [0, 1])
    np.testing.assert_array_equal(server.params["shift"][:2], after.params["shift"][:2])
    assert not jnp.array_equal(server.params["shift"][2], after.params["shift"][2])


def test_one_client_federation_is_the_client_alone(vectors, key):
    clients = pack(vectors, [np.arange(60)])
    together, _ = play(make_method(), clients, key, [0, 1], cohort_size=1)
    alone, _ = play(make_method(federation=isolated(1)), clients, key, [0, 1], cohort_size=1)
    np.testing.assert_allclose(together.params["shift"], alone.params["shift"][0], atol=1e-6)


def test_compiles_once_for_segments_of_any_length(clients, key):
    method = make_method()
    run_rounds = compile_rounds(method, uniform_cohort(3), **SIZES)
    server = start(method, key)
    for rounds in ([0, 1], [2, 3], [4, -1]):
        server, _ = run_rounds(jax.tree_util.Partial(linear_box), server, clients, key, jnp.array(rounds))
    assert run_rounds._cache_size() == 1


@pytest.mark.parametrize("name", ["local_steps", "batch_size", "chunk_size"])
def test_sizes_must_be_positive(name):
    sizes = {"chunk_size": 8, **SIZES, name: 0}
    with pytest.raises(ValueError, match=name):
        compile_rounds(make_method(), uniform_cohort(3), **sizes)
