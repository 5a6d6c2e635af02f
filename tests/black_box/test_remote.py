"""A served box: answers in order, paid once, retried by rule, and never past the budget; no network, no waiting."""

import asyncio
import io
import logging
import random
import signal
import threading
import traceback

import httpx2 as httpx
import numpy as np
import pytest
from fake_server import METADATA, FakeServer, FakeTime, N, broken, status
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.black_box.client.answers import LOG_PROBABILITIES
from fedbbpt_jax.black_box.client.connection import Terms
from fedbbpt_jax.black_box.client.pacing import Patience
from fedbbpt_jax.black_box.ledger.costs import Balance, Budget, Cost
from fedbbpt_jax.black_box.ledger.ledger import open_ledger, replay_ledger
from fedbbpt_jax.black_box.protocol import HEAD_LENGTH
from fedbbpt_jax.black_box.remote import connect, replayed
from fedbbpt_jax.errors import (
    BudgetExceededError,
    JournalError,
    ModelDriftError,
    QueryFailedError,
    QuotaError,
)
from fedbbpt_jax.types import Query

URL = "http://box.test:8000"
C, K, B = 3, 2, 5
SECRET = "sk-very-secret-0123456789"


def make_query(seed=0, c=C, k=K, b=B, *, per_example=False):
    rng = np.random.default_rng(seed)
    prompt = rng.normal(size=(c, k, b, N) if per_example else (c, k, N)).astype(np.float32)
    return Query(prompt, rng.normal(size=(c, b, N)).astype(np.float32))


def expected(query):
    prompt = query.prompt[:, :, None] if query.prompt.ndim == 3 else query.prompt
    return query.inputs[:, None] + prompt


def open_box(server, ledger=None, time=None, **options):
    """Connects to a fake server; a message takes at most 6 attempts."""
    ledger = open_ledger(None, "run") if ledger is None else ledger
    chosen = {"repeats": "charged once", "transport": server.transport, "clock": (time or FakeTime()).clock}
    terms = Terms(**chosen | {name: options.pop(name) for name in Terms._fields if name in options})
    return connect(URL, "vectors", ledger, num_classes=N, terms=terms, **options)


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def ledger():
    return open_ledger(None, "run")


# Answers


@pytest.mark.parametrize("per_example", [False, True])
def test_a_served_box_answers_as_the_model_does(server, per_example):
    query = make_query(per_example=per_example)
    with open_box(server) as box:
        scores, valid = box(query)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected(query))
    assert valid.shape == (C, K, B)
    assert valid.all()
    assert len(server.posts) == C


def test_answers_are_in_the_order_of_clients_whatever_order_they_come_in(server):
    query, order = make_query(c=8), random.Random(0)

    async def late(request):
        for _ in range(order.randrange(20)):
            await asyncio.sleep(0)

    server.faults = [late] * 8
    with open_box(server) as box:
        np.testing.assert_array_equal(box(query).scores, expected(query))


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize(("max_rows", "num_messages"), [(None, 1), (10, 1), (9, 2), (4, 3), (2, 5)])
def test_messages_are_split_between_examples_never_between_candidates(server, max_rows, num_messages, per_example):
    server.metadata = METADATA | {"parameters": {"max_rows": max_rows}}
    query = make_query(per_example=per_example)
    with open_box(server) as box:
        np.testing.assert_array_equal(box(query).scores, expected(query))
    assert len(server.posts) == C * num_messages
    assert server.billed == C * K * B


def test_candidates_that_do_not_fit_in_a_message_are_refused(server, ledger):
    with open_box(server, ledger, max_rows=1) as box, pytest.raises(ValueError, match="2 candidates do not fit"):
        box(make_query())
    assert not server.posts


def test_the_same_query_is_answered_from_the_ledger(server, ledger):
    query = make_query()
    with open_box(server, ledger) as box:
        first, again = box(query), box(query)
        np.testing.assert_array_equal(first.scores, again.scores)
        assert len(server.posts) == C
        box(make_query(1))
    assert len(server.posts) == 2 * C
    assert ledger.balance() == Balance(answered=Cost(2 * C * K * B))
    assert server.billed == 2 * C * K * B


def test_equal_clients_are_asked_once(server, ledger):
    one = make_query(c=1)
    with open_box(server, ledger) as box:
        scores, _ = box(Query(np.repeat(one.prompt, 3, 0), np.repeat(one.inputs, 3, 0)))
    np.testing.assert_array_equal(scores, np.repeat(expected(one), 3, 0))
    assert len(server.posts) == 1


def test_a_resumed_run_asks_for_nothing_that_was_answered(server, tmp_path):
    query, path = make_query(), tmp_path / "j"
    with open_ledger(path, "run") as ledger, open_box(server, ledger) as box:
        first = box(query)
    server.metadata = METADATA | {"parameters": {"system_fingerprint": "v1", "max_rows": 4}}  # it splits otherwise now
    with open_ledger(path, "run") as ledger, open_box(server, ledger) as box:
        again = box(query)
    assert len(server.posts) == C
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_is_replayed_bit_for_bit_without_a_server(server, tmp_path):
    query, path = make_query(), tmp_path / "j"
    server.faults = [status(500)] * 6 + [lambda r: server.answer(r, lambda s: s * np.float32(np.nan))]
    with open_ledger(path, "run") as ledger, open_box(server, ledger, patience=Patience(max_attempts=2)) as box:
        first, counts = box(query), box.counts
    assert not first.valid.all()
    with replay_ledger(path) as ledger:
        box = replayed(ledger)
        again = box(query)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
        assert box.counts.items() <= counts.items()
        with pytest.raises(JournalError, match="no answer to 3 of 3 messages"):
            box(make_query(1))


def test_there_is_nothing_to_replay_without_a_model():
    with pytest.raises(JournalError, match="not bound"):
        replayed(open_ledger(None, "run"))


# What a query must be


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (make_query()._replace(prompt=np.zeros((C, K, N + 1), "f")), r"not prompt \(FP32 \[2, 5\]\)"),
        (make_query()._replace(prompt=np.zeros((C, K, N), "i4")), r"not prompt \(INT32 \[2, 4\]\)"),
        (make_query()._replace(prompt=np.zeros((C, K, N), "c8")), r"not prompt \(complex64"),
        (make_query()._replace(prompt=np.zeros((C, K, B + 1, N), "f")), r"not prompt \(FP32 \[2, 6, 4\]\)"),
        (make_query()._replace(prompt=np.zeros((C + 1, K, N), "f")), r"must start with axes \[3, 2\]"),
        (make_query()._replace(inputs=np.zeros((C, B, N, 1), "f")), r"not inputs \(FP32 \[5, 4, 1\]\)"),
        (make_query()._replace(prompt={"a": np.zeros((C, K, N), "f")}), r"not prompt\.a"),
    ],
)
def test_a_query_that_the_model_does_not_take_is_not_sent(server, ledger, query, words):
    with open_box(server, ledger) as box, pytest.raises(ValueError, match=words):
        box(query)
    assert not server.posts
    assert ledger.balance() == Balance()


# Retries

RETRIED = [
    status(408),
    status(409),
    status(424),
    status(425),
    status(429),
    status(500),
    status(502),
    status(503),
    broken(httpx.ConnectError),
    broken(httpx.ConnectTimeout),
    broken(httpx.ReadTimeout),
    broken(httpx.ReadError),
    broken(httpx.WriteError),
    broken(httpx.RemoteProtocolError),
    broken(httpx.DecodingError),
    lambda request: httpx.Response(200, content=b"<html>"),
    lambda request: httpx.Response(200, content=b""),
]
NOT_BILLED = (4, 8, 9)


@pytest.mark.parametrize("fault", RETRIED)
def test_what_may_pass_is_tried_again(server, ledger, fault):
    query, time = make_query(c=1), FakeTime()
    server.faults = [fault, fault]
    with open_box(server, ledger, time) as box:
        response = box(query)
    np.testing.assert_array_equal(response.scores, expected(query))
    assert response.valid.all()
    assert len(server.posts) == 3
    assert len(time.slept) == 2
    assert len({request.headers["Idempotency-Key"] for request in server.posts}) == 1
    assert server.billed == ledger.balance().charged.num_requests == K * B


@pytest.mark.parametrize("index", range(len(RETRIED)))
def test_a_server_that_charges_again_is_charged_for_all_that_is_in_doubt(index):
    server, ledger = FakeServer(idempotent=False), open_ledger(None, "run")
    server.faults = [RETRIED[index]] * 2
    with open_box(server, ledger, repeats="charged again") as box:
        box(make_query(c=1))
    num_charges = 1 if index in NOT_BILLED else 3
    assert ledger.balance() == Balance(answered=Cost(K * B), in_doubt=Cost((num_charges - 1) * K * B))


@pytest.mark.parametrize("index", range(len(RETRIED)))
def test_what_never_gets_through_has_no_answer(server, ledger, index):
    """The others of the same step have theirs; and only what was surely not billed costs nothing."""
    query = make_query()
    first = open_box(server, ledger)
    first.close()
    lost = None

    def fault(request):
        nonlocal lost
        lost = lost or request.headers["Idempotency-Key"]
        return RETRIED[index](request) if request.headers["Idempotency-Key"] == lost else None

    server.faults = [fault] * 100
    with open_box(server, ledger) as box:
        scores, valid = box(query)
        assert box.counts["unanswered"] == K * B
        assert box.counts["attempts"] == 6 + C - 1
        sent = len(server.posts)
        again = box(query)
        assert len(server.posts) == sent
    (client,) = np.flatnonzero(~valid.any((1, 2)))
    others = np.delete(np.arange(C), client)
    assert valid[others].all()
    assert (scores[client] == 0).all()
    np.testing.assert_array_equal(scores[others], expected(query)[others])
    np.testing.assert_array_equal(again.valid, valid)
    in_doubt = 0 if index in NOT_BILLED else K * B
    assert ledger.balance() == Balance(answered=Cost(2 * K * B), in_doubt=Cost(in_doubt))


@pytest.mark.parametrize("code", [301, 400, 401, 403, 404, 413, 422])
def test_what_will_never_work_is_not_tried_again(server, ledger, code):
    server.faults = [status(code, message="because of this")]
    with open_box(server, ledger) as box:
        with pytest.raises(QueryFailedError, match=rf"{URL}/v2/models/vectors/infer: status {code}: because of this"):
            box(make_query(c=1))
        assert len(server.posts) == 1
        assert ledger.balance() == Balance()
        box(make_query(c=1))  # nothing of it is left behind


@pytest.mark.parametrize(
    "fault",
    [status(402), status(429, code="insufficient_quota", message="Pay."), status(429, type="insufficient_quota")],
)
def test_money_is_not_asked_for_twice(server, ledger, fault):
    server.faults = [fault]
    with open_box(server, ledger) as box, pytest.raises(QuotaError, match=r"status (402|429).*0 requests spent"):
        box(make_query(c=1))
    assert len(server.posts) == 1
    assert ledger.balance() == Balance()


@pytest.mark.parametrize(("headers", "wait"), [({"Retry-After": "90"}, 90), ({"retry-after-ms": "2500"}, 2.5)])
def test_a_server_says_how_long_to_wait(server, headers, wait):
    time = FakeTime()
    server.faults = [status(429, headers)]
    with open_box(server, time=time) as box:
        box(make_query(c=1))
    assert wait <= time.slept[0] <= wait + 0.5


def test_there_is_an_end_to_waiting(server):
    time = FakeTime()
    server.faults = [status(429, {"Retry-After": "200"})] * 10
    with open_box(server, time=time) as box:
        assert not box(make_query(c=1)).valid.any()
    assert len(server.posts) == 2
    assert time.now < 300


def test_a_server_that_is_asked_too_much_is_asked_less(server):
    with open_box(server) as box:
        box(make_query(c=30))
        assert server.most_in_flight > 8
        before = box.concurrency
        server.faults = [status(503)] * 4
        box(make_query(1, c=4))
        assert box.concurrency <= before // 2 + 1


def test_when_everything_fails_there_is_a_pause_and_then_an_end(server, ledger):
    time, patience = FakeTime(), Patience(breaker_failures=4, breaker_seconds=100.0)
    server.faults = [status(500, message="down")] * 1000
    query = make_query(c=4)
    with open_box(server, ledger, time, patience=patience) as box:
        with pytest.raises(QueryFailedError, match=r"status 500: down, and so for all queries \(\d attempts, \d+ requ"):
            box(query)
        assert len(server.posts) <= 8 + 3
        assert time.now >= 100
        assert ledger.balance().charged.num_requests == 4 * K * B
        server.faults = []
        assert box(query).valid.all()  # nothing was given up
    assert ledger.balance() == Balance(answered=Cost(4 * K * B))


def test_a_server_that_is_down_is_noticed_by_a_single_client(server, ledger):
    """Whose messages each have fewer attempts than it takes."""
    server.faults = [status(500)] * 1000
    with open_box(server, ledger, patience=Patience(max_attempts=3, breaker_failures=5)) as box:
        assert not box(make_query(0, c=1)).valid.any()
        with pytest.raises(QueryFailedError, match="and so for all queries"):
            box(make_query(1, c=1))
        server.faults = []
        assert box(make_query(1, c=1)).valid.all()
        assert not box(make_query(0, c=1)).valid.any()


def test_a_fifth_of_failures_costs_a_third_more_attempts():
    """10 % 429, 5 % 500, 3 % time limits, 2 % malformed; every example gets its answer."""
    server, draw = FakeServer(), random.Random(0)
    kinds = [status(429)] * 10 + [status(500)] * 5 + [broken(httpx.ReadTimeout)] * 3 + [RETRIED[-2]] * 2 + [None] * 80
    server.faults = [draw.choice(kinds) or (lambda request: None) for _ in range(10_000)]
    with open_box(server) as box:
        for seed in range(20):
            query = make_query(seed, c=10)
            response = box(query)
            np.testing.assert_array_equal(response.scores, expected(query))
        assert box.counts["attempts"] <= 1.35 * 200


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_no_mood_of_the_network_reaches_a_result(seed):
    """Where every query gets its answer in the end: the same bits as without faults."""
    server, draw = FakeServer(), random.Random(seed)
    server.faults = [draw.choice([*RETRIED, *[lambda request: None] * 30]) for _ in range(100)]
    query = make_query(c=6)
    with open_box(server, seed=seed, patience=Patience(max_attempts=100, max_seconds=1e9)) as box:
        response = box(query)
    np.testing.assert_array_equal(response.scores, expected(query))
    assert response.valid.all()


# Garbage


def garbled(server, kind):
    """Returns a fault of an answer that is none, by the kind that it is counted as."""
    return {
        "body": [
            lambda r: httpx.Response(200, content=server.answer(r).content[:-3], headers={HEAD_LENGTH: "30"}),
            lambda r: httpx.Response(200, content=b"\0" * 1_000_000),
            lambda r: httpx.Response(200, content=b"{}", headers={HEAD_LENGTH: "many"}),
            lambda r: httpx.Response(200, content=b"{" * 10_000),
        ],
        "id": [lambda r: server.answer(r, id="another"), lambda r: server.answer(r, id=None)],
        "shape": [
            lambda r: server.answer(r, lambda s: s[:, :-1]),
            lambda r: server.answer(r, lambda s: s[:1]),
            lambda r: server.answer(r, lambda s: s[..., :-1]),
            lambda r: server.answer(r, lambda s: s.swapaxes(0, 1)),
        ],
        "datatype": [lambda r: server.answer(r, lambda s: s.astype(np.float16))],
        "fingerprint": [
            lambda r: server.answer(r, parameters={}),
            lambda r: server.answer(r, parameters={"system_fingerprint": 7}),
        ],
    }[kind]


@pytest.mark.parametrize("kind", ["body", "id", "shape", "datatype", "fingerprint"])
def test_a_garbled_answer_is_rejected_counted_and_asked_for_again(server, ledger, kind):
    query = make_query(c=1)
    server.faults = garbled(server, kind)
    num_faults = len(server.faults)
    with open_box(server, ledger) as box:
        np.testing.assert_array_equal(box(query).scores, expected(query))
        assert box.counts == {"attempts": num_faults + 1, kind: num_faults}
    assert ledger.balance() == Balance(answered=Cost(K * B))


@pytest.mark.parametrize(
    ("value", "kind"), [(np.nan, "nan"), (np.inf, "infinite"), (-9999.0, "missing"), (0.5, "too high")]
)
def test_a_wrong_number_masks_its_row_and_is_not_asked_for_again(server, value, kind):
    query = make_query(c=1)
    query = query._replace(inputs=query.inputs - 20)

    def change(scores):
        scores[1, 3, 2] = value
        return scores

    server.faults = [lambda request: server.answer(request, change)]
    with open_box(server, scale=LOG_PROBABILITIES) as box:
        scores, valid = box(query)
        assert box.counts == {"attempts": 1, kind: 1}
    assert np.argwhere(~valid).tolist() == [[0, 1, 3]]
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores[valid], expected(query)[valid])


# Drift


def test_a_model_that_changes_stops_the_run_at_its_first_answer(server, tmp_path):
    path = tmp_path / "j"
    with open_ledger(path, "run") as ledger, open_box(server, ledger) as box:
        box(make_query())
        server.fingerprint = "v2"
        with pytest.raises(ModelDriftError, match="was 'v1' and is now 'v2'"):
            box(make_query(1, c=1))
        assert len(server.posts) == C + 1
        assert ledger.balance() == Balance(answered=Cost(C * K * B), in_doubt=Cost(K * B))
    server.metadata = METADATA | {"parameters": {"system_fingerprint": "v2"}}
    with open_ledger(path, "run") as ledger, pytest.raises(ModelDriftError):
        open_box(server, ledger)


def test_a_model_that_tells_its_fingerprint_with_its_answers_only_is_watched_too(server, tmp_path):
    server.metadata = METADATA | {"parameters": {}}
    path = tmp_path / "j"
    with open_ledger(path, "run") as ledger, open_box(server, ledger) as box:
        box(make_query())
    server.fingerprint = "v2"
    with open_ledger(path, "run") as ledger, open_box(server, ledger) as box:
        box(make_query())  # answered before
        with pytest.raises(ModelDriftError):
            box(make_query(1))


def test_a_server_without_fingerprints_is_no_drift(server):
    server.metadata, server.fingerprint = METADATA | {"parameters": {}}, ""
    with open_box(server) as box:
        assert box(make_query()).valid.all()
        assert box(make_query(1)).valid.all()


# Budget


@pytest.mark.parametrize("missing", [1, C * K * B])
def test_what_the_budget_does_not_pay_for_is_not_sent(server, missing):
    ledger = open_ledger(None, "run", Budget(2 * C * K * B - missing))
    with open_box(server, ledger) as box:
        box(make_query())
        with pytest.raises(BudgetExceededError):
            box(make_query(1))
        assert box(make_query()).valid.all()  # already paid
    assert server.billed == C * K * B


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 400))
def test_no_fault_leads_past_the_budget(seed, idempotent, budget):
    """Also where faults come after the server has computed, and billed, its answer."""
    server, draw = FakeServer(idempotent=idempotent), random.Random(seed)
    ledger = open_ledger(None, "run", Budget(budget))

    def lost(request):
        server.answer(request)
        raise httpx.ReadError("broken")

    server.faults = [draw.choice([lost, status(429), status(500), lambda request: None]) for _ in range(200)]
    with open_box(server, ledger, repeats="charged once" if idempotent else "charged again") as box:
        try:
            for query_seed in range(10):
                box(make_query(query_seed))
        except (BudgetExceededError, QueryFailedError):
            pass
    assert server.billed <= ledger.balance().charged.num_requests <= budget
    assert ledger.balance().reserved == Cost(0)


# Interruption


@pytest.fixture
def interruptible():
    """Lets SIGINT interrupt, which a job in a shell's background inherits as ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_the_ledger_in_order(server, tmp_path):
    """What was answered is kept, what was on its way is in doubt, what was not sent is released."""
    path = tmp_path / "j"

    async def interrupt(request):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        await asyncio.Event().wait()

    server.faults = [lambda request: None, interrupt]
    patience = Patience(max_concurrency=1)
    with open_ledger(path, "run") as ledger, open_box(server, ledger, patience=patience) as box:
        with pytest.raises(KeyboardInterrupt):
            box(make_query())
        assert server.in_flight == 0
        assert ledger.balance() == Balance(answered=Cost(K * B), in_doubt=Cost(K * B))
        assert box(make_query()).valid.all()
        assert ledger.balance() == Balance(answered=Cost(C * K * B))
    assert len(server.posts) == C + 1


def test_a_box_can_be_closed_twice(server):
    box = open_box(server)
    box.close()
    box.close()


# Connecting


def served(path, response):
    """Returns a transport that answers `response` at `path`, and what the fake server does elsewhere."""
    server = FakeServer()

    async def handle(request):
        if request.url.path == path:
            return response(request) if callable(response) else response
        return await server.handle(request)

    return httpx.MockTransport(handle)


@pytest.mark.parametrize(
    ("path", "response", "words"),
    [
        ("/v2/health/ready", broken(httpx.ConnectError), f"{URL}: nothing answers there"),
        ("/v2/health/ready", httpx.Response(404), "does not speak the Open Inference Protocol"),
        ("/v2/health/ready", httpx.Response(401), "wants a token .*: set the variable FEDBBPT_TOKEN"),
        ("/v2/health/ready", httpx.Response(503), "is not ready .status 503"),
        ("/v2/health/ready", broken(httpx.ReadTimeout), "is not ready .ReadTimeout"),
        ("/v2/health/ready", httpx.Response(302), "is not ready .status 302"),
        ("/v2/models/vectors", httpx.Response(404), "has no model 'vectors'; it has vectors, digits"),
        ("/v2/models/vectors", httpx.Response(200, content=b"<html>"), "no description of a model"),
        ("/v2/models/vectors", httpx.Response(200, json={"inputs": 3}), "no list of inputs"),
        ("/v2/models/vectors", httpx.Response(200, json=METADATA | {"inputs": []}), "takes no tensor 'prompt'"),
        ("/v2/models/vectors", httpx.Response(200, json=METADATA | {"outputs": []}), "answers none"),
        (
            "/v2/models/vectors",
            httpx.Response(
                200, json=METADATA | {"outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 7]}]}
            ),
            "answers 7 classes, and 4 are needed",
        ),
        ("/v2/models/vectors", httpx.Response(200, json=METADATA | {"parameters": {"system_fingerprint": 1}}), "text"),
    ],
)
def test_what_is_wrong_with_a_server_is_said_before_anything_is_paid(ledger, path, response, words):
    with pytest.raises(QueryFailedError, match=words):
        connect(
            URL, "vectors", ledger, num_classes=N, terms=Terms(transport=served(path, response), clock=FakeTime().clock)
        )


def test_a_model_that_is_still_loading_is_waited_for(ledger):
    answers, time = (
        [httpx.Response(503, headers={"Retry-After": "7"}), httpx.Response(503), httpx.Response(200)],
        FakeTime(),
    )
    transport = served("/v2/health/ready", lambda request: answers.pop(0))
    connect(URL, "vectors", ledger, num_classes=N, terms=Terms(transport=transport, clock=time.clock)).close()
    assert time.now >= 7


@pytest.mark.parametrize(
    "url", ["box", "ftp://box", "http://", "http://user:word@box", f"http://{SECRET}@box", "http://box?key=1"]
)
def test_an_address_is_one_and_holds_no_secret(ledger, url):
    with pytest.raises(ValueError, match="url must be like") as error:
        connect(url, "vectors", ledger, num_classes=N)
    assert SECRET not in str(error.value)


def test_a_ledger_of_other_answers_is_refused(server, ledger):
    open_box(server, ledger).close()
    with pytest.raises(JournalError, match="not of this experiment"):
        open_box(server, ledger, scale=LOG_PROBABILITIES)


# Secrets


def test_a_secret_is_sent_and_stands_nowhere_else(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FEDBBPT_TOKEN", SECRET)
    path, texts = tmp_path / "j", io.StringIO()
    caplog.set_level(logging.DEBUG)
    with open_ledger(path, "run") as ledger, open_box(server, ledger) as box:
        texts.write(f"{box!r} {box} {vars(box)} {box.counts} {ledger!r} {vars(ledger)}")
        box(make_query())
        faults = [status(code, message=f"wrong key: {SECRET}") for code in (400, 402, 429, 500)]
        for i, fault in enumerate([*faults, broken(httpx.ReadError), broken(httpx.ConnectError)]):
            server.faults = [fault] * 100
            try:
                box(make_query(i + 1, c=8))
            except (QueryFailedError, QuotaError) as error:
                texts.write("".join(traceback.format_exception(error)))
    assert all(request.headers["Authorization"] == f"Bearer {SECRET}" for request in server.requests)
    refused = served("/v2/health/ready", httpx.Response(401, json={"error": f"wrong key {SECRET}"}))
    with pytest.raises(QueryFailedError, match="FEDBBPT_TOKEN is not the right one") as error:
        connect(
            URL,
            "vectors",
            open_ledger(None, "run"),
            num_classes=N,
            terms=Terms(transport=refused, clock=FakeTime().clock),
        )
    texts.write("".join(traceback.format_exception(error.value)))
    assert "wrong key" in texts.getvalue()
    for text in (texts.getvalue(), caplog.text, path.read_bytes().decode("latin-1")):
        assert SECRET not in text


def test_another_variable_can_hold_the_secret(server, monkeypatch):
    monkeypatch.setenv("FEDBBPT_TOKEN", "not this one")
    monkeypatch.setenv("OTHER_TOKEN", f" {SECRET}\n")
    open_box(server, token_variable="OTHER_TOKEN").close()
    assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"


def test_a_token_that_cannot_be_sent_is_refused_without_showing_it(server, monkeypatch):
    monkeypatch.setenv("FEDBBPT_TOKEN", f"{SECRET}\r\nX-Other: 1")
    with pytest.raises(ValueError, match="FEDBBPT_TOKEN holds characters") as error:
        open_box(server)
    assert SECRET not in str(error.value)


def test_without_a_secret_none_is_sent(server, monkeypatch):
    monkeypatch.delenv("FEDBBPT_TOKEN", raising=False)
    open_box(server).close()
    assert "Authorization" not in server.requests[0].headers
