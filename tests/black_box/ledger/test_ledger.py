"""No query is paid twice, no budget is exceeded by one request, and a kill at any moment changes neither."""

import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fedbbpt_jax.black_box.ledger.book import FORMAT
from fedbbpt_jax.black_box.ledger.costs import Balance, Budget, Cost, Price
from fedbbpt_jax.black_box.ledger.journal import open_journal, read_journal
from fedbbpt_jax.black_box.ledger.ledger import open_ledger, replay_ledger
from fedbbpt_jax.errors import BudgetExceededError, JournalError, ModelDriftError

KEYS = [bytes([i]) * 32 for i in range(8)]
A, B = KEYS[:2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "queries.journal"


def killed(path, ledger, num_bytes=None):
    """Ends a ledger as a kill does, with `num_bytes` of its file written."""
    ledger._journal.close()
    os.truncate(path, path.stat().st_size if num_bytes is None else num_bytes)


def test_an_answer_is_found_again(path):
    with open_ledger(path, "run") as ledger:
        assert ledger.find(A) is None
        ledger.reserve({A: Cost(6), B: Cost(2)})
        assert ledger.balance() == Balance(reserved=Cost(8))
        ledger.answer(A, b"scores")
        assert ledger.find(A) == b"scores"
    with open_ledger(path, "run") as ledger:
        assert ledger.find(A) == b"scores"
        assert ledger.find(B) is None
        assert ledger.balance() == Balance(answered=Cost(6), in_doubt=Cost(2))


def test_what_is_answered_is_not_charged_again(path):
    with open_ledger(path, "run", Budget(num_requests=6)) as ledger:
        ledger.reserve({A: Cost(6)})
        ledger.reserve({A: Cost(6)})  # reserved, not yet in doubt
        ledger.answer(A, b"scores")
        ledger.reserve({A: Cost(6)})
        assert ledger.balance().charged == Cost(6)


@pytest.mark.parametrize(("repeats", "charged"), [("charged once", 6), ("charged again", 12)])
def test_what_is_in_doubt_is_charged_by_what_the_server_does(path, repeats, charged):
    ledger = open_ledger(path, "run")
    ledger.reserve({A: Cost(6)}, repeats)
    killed(path, ledger)
    with open_ledger(path, "run") as ledger:
        ledger.reserve({A: Cost(6)}, repeats)
        ledger.answer(A, b"scores")
        assert ledger.balance().charged == Cost(charged)
        assert ledger.balance().answered == Cost(6)


def test_doubt_within_a_process_is_the_same():
    ledger = open_ledger(None, "run")
    ledger.reserve({A: Cost(6)})
    ledger.doubt(A)
    ledger.doubt(B)  # of which nothing is reserved
    assert ledger.balance() == Balance(in_doubt=Cost(6))
    ledger.reserve({A: Cost(6)}, "charged once")
    assert ledger.balance() == Balance(in_doubt=Cost(6))
    ledger.reserve({A: Cost(6)}, "charged again")
    assert ledger.balance() == Balance(in_doubt=Cost(6), reserved=Cost(6))


def test_what_was_not_billed_is_released(path):
    with open_ledger(path, "run", Budget(num_requests=6)) as ledger:
        ledger.reserve({A: Cost(6)})
        ledger.release(A)
        ledger.release(A)
        assert ledger.balance() == Balance()
        ledger.reserve({B: Cost(6)})
    with open_ledger(path, "run") as ledger:
        assert ledger.balance().charged == Cost(6)


def test_what_is_in_doubt_is_not_released():
    ledger = open_ledger(None, "run")
    ledger.reserve({A: Cost(6)})
    ledger.doubt(A)
    ledger.release(A)
    assert ledger.balance().charged == Cost(6)


def test_a_second_charge_is_released_without_the_first():
    ledger = open_ledger(None, "run")
    ledger.reserve({A: Cost(6)})
    ledger.doubt(A)
    ledger.reserve({A: Cost(6)}, "charged again")
    ledger.release(A)
    assert ledger.balance() == Balance(in_doubt=Cost(6))


@pytest.mark.parametrize("doubtful", [False, True])
def test_what_is_given_up_stays_so(path, doubtful):
    with open_ledger(path, "run") as ledger:
        ledger.reserve({A: Cost(6)})
        if doubtful:
            ledger.doubt(A)
        ledger.give_up(A)
    for again in (lambda: open_ledger(path, "run"), lambda: replay_ledger(path)):
        with again() as ledger:
            assert ledger.find(A) == b""
            ledger.reserve({A: Cost(6)})
            assert ledger.balance() == Balance(in_doubt=Cost(6 * doubtful))


def test_a_budget_is_met_exactly():
    ledger = open_ledger(None, "run", Budget(num_requests=10))
    ledger.reserve({A: Cost(6)})
    ledger.answer(A, b"scores")
    ledger.reserve({B: Cost(3)})
    words = "the budget of 10 requests does not pay for 2 more: 6 are spent and 3 reserved"
    with pytest.raises(BudgetExceededError, match=words):
        ledger.reserve({KEYS[2]: Cost(2)})
    ledger.reserve({KEYS[2]: Cost(1)})
    assert ledger.balance().charged == Cost(10)


def test_a_step_is_reserved_wholly_or_not_at_all(path):
    with open_ledger(path, "run", Budget(num_requests=10)) as ledger:
        before = ledger.position()
        with pytest.raises(BudgetExceededError):
            ledger.reserve({key: Cost(6) for key in (A, B)})
        assert ledger.balance() == Balance()
        assert ledger.position() == before


@pytest.mark.parametrize(
    ("budget", "price", "words"),
    [
        (Budget(num_tokens=900), Price(), "900 tokens does not pay for 501 more: 0 are spent and 400 reserved"),
        (Budget(money=0.85), Price(per_request=0.1), "0.85 in money does not pay for 0.5 more"),
        (Budget(money=0.9), Price(per_million_tokens=1000.0), "0.9 in money does not pay for 0.501 more"),
    ],
)
def test_tokens_and_money_are_budgets_too(budget, price, words):
    ledger = open_ledger(None, "run", budget, price)
    ledger.reserve({A: Cost(4, 400)})
    with pytest.raises(BudgetExceededError, match=words):
        ledger.reserve({B: Cost(5, 501)})
    ledger.reserve({B: Cost(4, 450)})


def test_the_server_says_what_it_billed():
    ledger = open_ledger(None, "run", Budget(num_tokens=100))
    ledger.reserve({A: Cost(1, 90)})
    ledger.answer(A, b"scores", Cost(1, 40))
    ledger.reserve({B: Cost(1, 60)})
    assert ledger.balance() == Balance(answered=Cost(1, 40), reserved=Cost(1, 60))


def test_evaluation_is_counted_apart(path):
    with open_ledger(path, "run", Budget(num_requests=10)) as ledger:
        ledger.reserve({A: Cost(6)})
        with ledger.counted_as("evaluation"):
            ledger.reserve({B: Cost(4)})
        ledger.answer(B, b"scores")
        with pytest.raises(BudgetExceededError):
            ledger.reserve({KEYS[2]: Cost(1)})
    with open_ledger(path, "run") as ledger:
        assert ledger.balance("training") == Balance(in_doubt=Cost(6))
        assert ledger.balance("evaluation") == Balance(answered=Cost(4))
        assert ledger.balance().charged == Cost(10)


def test_a_ledger_is_of_one_run(path):
    open_ledger(path, "run").close()
    for wrong in (lambda: open_ledger(path, "other"), lambda: replay_ledger(path, "other")):
        with pytest.raises(JournalError, match=rf"{path}: is of format {FORMAT} and run 'run', not 'other'"):
            wrong()
    replay_ledger(path, "run").close()


def test_a_ledger_is_of_one_model(path):
    with open_ledger(path, "run") as ledger:
        with pytest.raises(JournalError, match="not bound"):
            ledger.key(b"request")
        assert ledger.bind("/infer", "", {"n": 1}) == ("/infer", "", {"n": 1})
        key = ledger.key(b"request")
        assert ledger.bind("/infer", "v1", {"n": 2}) == ("/infer", "v1", {"n": 1})
        assert ledger.key(b"request") == key  # a fingerprint that comes later changes no key
    with open_ledger(path, "run") as ledger:
        assert ledger.model == ("/infer", "v1", {"n": 1})
        assert ledger.bind("/infer", "", {}).fingerprint == "v1"
        assert ledger.key(b"request") == key
        with pytest.raises(ModelDriftError, match="was 'v1' and is now 'v2'"):
            ledger.bind("/infer", "v2", {})
        with pytest.raises(JournalError, match="answers of /infer, not of /other"):
            ledger.bind("/other", "v1", {})


def test_a_key_is_of_model_endpoint_and_request():
    keys = set()
    for endpoint, fingerprint in [("/a", "1"), ("/b", "1"), ("/a", "2"), ("/a1", "")]:
        ledger = open_ledger(None, "run")
        ledger.bind(endpoint, fingerprint, {})
        keys |= {ledger.key(b"one"), ledger.key(b"two")}
    assert len(keys) == 8
    assert {len(key) for key in keys} == {32}


def test_a_replay_asks_nobody(path):
    with open_ledger(path, "run") as ledger:
        ledger.bind("/infer", "v1", {})
        ledger.reserve({A: Cost(6)})
        ledger.answer(A, b"scores")
    before = path.read_bytes()
    with replay_ledger(path) as ledger:
        ledger.reserve({A: Cost(6)})
        assert ledger.find(A) == b"scores"
        assert ledger.bind("/infer", "v1", {}).fingerprint == "v1"
        with pytest.raises(JournalError, match="a replay asks nobody, and 2 requests are not answered"):
            ledger.reserve({A: Cost(6), B: Cost(2)})
    assert path.read_bytes() == before


def test_an_answer_needs_a_reservation():
    ledger = open_ledger(None, "run")
    with pytest.raises(JournalError, match="nothing is reserved"):
        ledger.answer(A, b"scores")
    ledger.reserve({A: Cost(1)})
    with pytest.raises(ValueError, match="must not be empty"):
        ledger.answer(A, b"")
    ledger.answer(A, b"scores")
    with pytest.raises(JournalError, match="nothing is reserved"):
        ledger.answer(A, b"others")
    with pytest.raises(JournalError, match="answered already"):
        ledger.give_up(A)


def test_a_checkpoint_knows_how_much_there_must_be(path):
    with open_ledger(path, "run") as ledger:
        ledger.reserve({A: Cost(6)})
        shorter = ledger.position()
        ledger.answer(A, b"scores")
        position = ledger.position()
    open_ledger(path, "run", at_least=position).close()
    os.truncate(path, shorter.num_bytes)
    with pytest.raises(JournalError, match=f"what stood at byte {position.num_bytes}"):
        open_ledger(path, "run", at_least=position)
    open_ledger(path, "run", at_least=shorter).close()


def test_a_torn_reservation_charges_nothing(path):
    ledger = open_ledger(path, "run")
    before = ledger.position()
    ledger.reserve({key: Cost(1) for key in KEYS})
    killed(path, ledger, path.stat().st_size - 1)
    with open_ledger(path, "run") as ledger:
        assert ledger.torn_bytes > 0
        assert ledger.balance() == Balance()
        assert ledger.position() == before


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (b"?", b""),
        (b"S", b"{}"),
        (b"M", b"[1]"),
        (b"M", b'{"a": 1}'),
        (b"R", b"\xff"),
        (b"R", b"\x05\x00abcde123"),
        (b"A", A),
        (b"A", A + bytes(16) + b"scores"),
        (b"L", A),
    ],
)
def test_a_well_sealed_record_that_makes_no_sense_is_refused(path, kind, payload):
    open_ledger(path, "run").close()
    journal = open_journal(path, lambda record: None)
    offset = journal.append(kind, payload).offset
    journal.close()
    with pytest.raises(JournalError, match=rf"{path}: the record at byte {offset} makes no sense"):
        open_ledger(path, "run")


def test_the_file_tells_nothing_but_hashes_costs_and_answers(path):
    with open_ledger(path, "run") as ledger:
        ledger.bind("/infer", "v1", {})
        key = ledger.key(b"a private text")
        ledger.reserve({key: Cost(1)})
        ledger.answer(key, b"scores")
    assert b"private" not in path.read_bytes()
    kinds = []
    read_journal(path, lambda record: kinds.append(record.kind)).close()
    assert kinds == [b"S", b"M", b"R", b"A"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_256_threads_share_a_budget(path, on_disk):
    """Each asks for three requests of 500: 166 get them."""
    ledger, barrier, refused = open_ledger(path if on_disk else None, "run", Budget(500)), threading.Barrier(256), []

    def race(number):
        key = number.to_bytes(32, "little")
        barrier.wait()
        try:
            ledger.reserve({key: Cost(3)})
        except BudgetExceededError:
            refused.append(key)
        else:
            ledger.answer(key, b"scores")

    threads = [threading.Thread(target=race, args=(number,)) for number in range(256)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 256 - 166
    assert ledger.balance() == Balance(answered=Cost(498))
    ledger.close()
    if on_disk:
        with open_ledger(path, "run") as ledger:
            assert ledger.balance() == Balance(answered=Cost(498))


class Killed(RuleBasedStateMachine):
    """A client, a server that counts what it bills, and a process that dies at any moment."""

    limit = 20

    @initialize(repeats=st.sampled_from(["charged once", "charged again"]))
    def start(self, repeats):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "journal"
        self.repeats, self.billed, self.seen = repeats, 0, set()
        self.safe, self.unsafe = {}, {}
        self.open()
        self.durable = self.ledger.position()

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    def open(self, at_least=None):
        self.ledger = open_ledger(self.path, "run", Budget(self.limit), at_least=at_least)

    def now_durable(self):
        self.durable = self.ledger._journal.position()
        self.safe |= self.unsafe
        self.unsafe = {}

    @rule(
        chosen=st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True),
        outcomes=st.lists(
            st.sampled_from(["answered", "answered", "lost", "not even sent", "refused", "given up"]),
            min_size=3,
            max_size=3,
        ),
    )
    def ask(self, chosen, outcomes):
        if self.reserve(chosen):
            for i, outcome in zip(chosen, outcomes, strict=False):
                if self.ledger.find(KEYS[i]) is None:
                    self.send(KEYS[i], i, outcome)

    def reserve(self, chosen) -> bool:
        """Reserves; a refusal must be right, and nothing is sent then."""
        due = [i for i in chosen if self.ledger._is_due(KEYS[i], self.repeats)]
        before = self.ledger.balance().charged.num_requests
        try:
            self.ledger.reserve({KEYS[i]: Cost(i % 4 + 1) for i in chosen}, self.repeats)
        except BudgetExceededError:
            assert before + sum(i % 4 + 1 for i in due) > self.limit
            assert self.ledger.balance().charged.num_requests == before
            return False
        assert self.ledger.balance().charged.num_requests == before + sum(i % 4 + 1 for i in due)
        if due:
            self.now_durable()
        return True

    def send(self, key, i, outcome):
        if outcome in ("answered", "lost"):
            assert key not in self.safe, "an answered query was sent again"
            if self.repeats == "charged again" or key not in self.seen:
                self.billed += i % 4 + 1
            self.seen.add(key)
        if outcome == "answered":
            self.ledger.answer(key, key[:3])
            self.unsafe[key] = key[:3]
        elif outcome == "refused":
            self.ledger.release(key)
        elif outcome == "given up":
            self.ledger.give_up(key)
            self.unsafe[key] = b""
        else:
            self.ledger.doubt(key)

    @rule()
    def sync(self):
        self.ledger.sync()
        self.now_durable()

    @rule(part=st.floats(0, 1), chosen=st.integers(0, 7), sent=st.booleans())
    def kill(self, part, chosen, sent):
        """Perhaps with a query on its way, and with any part of what was not yet durable."""
        if self.reserve([chosen]) and sent and self.ledger.find(KEYS[chosen]) is None:
            self.send(KEYS[chosen], chosen, "lost")
        size, least = self.path.stat().st_size, self.durable.num_bytes
        killed(self.path, self.ledger, least + round(part * (size - least)))
        self.unsafe = {}
        self.open(self.durable)
        for key in KEYS:
            if key not in self.safe and (found := self.ledger.find(key)) is not None:
                self.unsafe[key] = found
        self.sync()

    @invariant()
    def what_is_billed_is_charged_and_paid_for(self):
        if hasattr(self, "ledger"):
            assert self.billed <= self.ledger.balance().charged.num_requests <= self.limit

    @invariant()
    def answers_stay(self):
        if hasattr(self, "ledger"):
            for key, answer in (self.safe | self.unsafe).items():
                assert self.ledger.find(key) == answer


TestKilled = Killed.TestCase
TestKilled.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@pytest.mark.slow
def test_killed_for_longer():
    run_state_machine_as_test(Killed, settings=settings(max_examples=300, stateful_step_count=40, deadline=None))
