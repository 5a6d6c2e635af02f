"""Federated rounds against a served box that fails, with runs that die and go on: the bits of the undisturbed run."""

import random

import httpx2 as httpx
import jax
import numpy as np
import optax
import pytest
from conftest import vector_generator
from fake_server import METADATA, FakeServer, FakeTime, N, broken, status

from fedbbpt_jax.black_box.client.connection import Terms
from fedbbpt_jax.black_box.client.pacing import Patience
from fedbbpt_jax.black_box.ledger.ledger import open_ledger, replay_ledger
from fedbbpt_jax.black_box.remote import connect, replayed
from fedbbpt_jax.errors import JournalError
from fedbbpt_jax.estimators.directions import rademacher
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.federated.averaging import weighted_mean
from fedbbpt_jax.federated.cohort import pack
from fedbbpt_jax.federated.host import host_rounds
from fedbbpt_jax.federated.participation import uniform_cohort
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.optimizers.descent import descent
from fedbbpt_jax.types import Method

METHOD = Method(
    vector_generator(N), cross_entropy, descent(spsa(rademacher(), 2, 0.1), optax.adam(0.05)), weighted_mean()
)
RUN_ROUNDS = host_rounds(METHOD, uniform_cohort(4), local_steps=2, batch_size=3)
NUM_REQUESTS = 3 * 2 * 4 * 4 * 3  # rounds × steps × clients × candidates × examples


class KilledError(BaseException):
    """What a kill looks like from within: nobody catches it."""


def play(box, vectors, key):
    """Returns the parameters after three rounds, as bytes."""
    clients = pack(vectors, np.split(np.arange(60), 5))
    start = METHOD.federation.init(METHOD.optimizer.init(METHOD.generator.init(jax.random.key(0))))
    server, _ = RUN_ROUNDS(box, start, clients, key, np.arange(3))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(server)]


def open_box(server, ledger, seed=0):
    patience = Patience(max_attempts=50, max_seconds=1e9, breaker_failures=10**6)
    terms = Terms("charged once", patience, seed, transport=server.transport, clock=FakeTime().clock)
    return connect("http://box.test", "vectors", ledger, num_classes=N, terms=terms)


@pytest.fixture
def undisturbed(vectors, key):
    server = FakeServer()
    with open_box(server, open_ledger(None, "run")) as box:
        found = play(box, vectors, key)
    assert server.billed == NUM_REQUESTS
    return found


@pytest.mark.slow
def test_a_run_that_dies_again_and_again_ends_as_the_undisturbed_one(tmp_path, vectors, key, undisturbed):
    server, path, draw, num_kills = FakeServer(metadata=METADATA), tmp_path / "j", random.Random(0), 0

    def lost(request):
        server.answer(request)
        raise httpx.ReadError("broken")

    def kill(request):
        if draw.random() < 0.5:
            server.answer(request)
        raise KilledError

    bad = [status(429), status(500), broken(httpx.ConnectError), lost]
    for run in range(100):
        server.faults = [draw.choice(bad) if draw.random() < 0.2 else lambda request: None for _ in range(500)]
        if num_kills < 4:
            server.faults[draw.randrange(2, 6)] = kill
        ledger = open_ledger(path, "run")
        try:
            with open_box(server, ledger, seed=run) as box:
                found = play(box, vectors, key)
        except KilledError:
            num_kills += 1
            ledger._journal.close()
            continue
        break
    assert num_kills == 4
    assert found == undisturbed
    assert server.billed == NUM_REQUESTS
    assert ledger.balance().charged.num_requests == NUM_REQUESTS
    ledger.close()
    with replay_ledger(path, "run") as ledger:
        assert play(replayed(ledger), vectors, key) == undisturbed
        with pytest.raises(JournalError, match="not the same run"):
            play(replayed(ledger), vectors, jax.random.key(8))
