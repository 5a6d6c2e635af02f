"""What was asked of a paid model, what it answered and what that cost: no query is paid twice, no budget is exceeded.

A query is known by its content: the SHA-256 of the model, the endpoint and the request's canonical bytes. It is
*reserved*, durably, before it is sent; then it is answered, or released (it was surely not billed), or nobody knows: it
is *in doubt* and stays charged. A process that is killed leaves what it had reserved in doubt. The same query asked
again, in this run or after a resume, is answered from here.

The journal never holds inputs, prompts, labels or secrets: hashes, costs, the model's name and its answers only.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedbbpt_jax.black_box.ledger import book
from fedbbpt_jax.black_box.ledger.book import Book, Model
from fedbbpt_jax.black_box.ledger.costs import FREE, UNLIMITED, Balance, Budget, Cost, Price, check_budget, total
from fedbbpt_jax.black_box.ledger.journal import (
    Journal,
    Position,
    Record,
    journal_in_memory,
    open_journal,
    read_journal,
)
from fedbbpt_jax.errors import JournalError, ModelDriftError

Repeats = Literal["charged once", "charged again"]
"""What a server does when a query comes again under the same `Idempotency-Key`."""


class Ledger:
    """Answers and costs of a run's queries. Made by `open_ledger` or `replay_ledger`; thread-safe."""

    def __init__(
        self, journal: Callable[[Callable[[Record], None]], Journal], run: str | None, budget: Budget, price: Price
    ):
        self._budget, self._price, self._account = budget, price, "training"
        self._lock = threading.RLock()
        self._book = Book(run)
        self._journal = journal(self._book.apply)
        self._doubtful = set(self._book.open)
        if not self._book.started:
            self._write(book.START, book.start_payload(run))
            self._journal.sync()

    @property
    def torn_bytes(self) -> int:
        """How much of a last record a kill had left, which was cut off at opening."""
        return self._journal.torn_bytes

    @property
    def model(self) -> Model | None:
        """What the answers come from, with the fingerprint that was told last; None before the first `bind`."""
        models = self._book.models
        return models[0]._replace(fingerprint=models[-1].fingerprint) if models else None

    def bind(self, endpoint: str, fingerprint: str, form: Mapping[str, Any]) -> Model:
        """Returns the model that this ledger is of: the first that it was bound to.

        Args:
          endpoint: the path that is asked.
          fingerprint: of the model; "" where it is not known, or not yet.
          form: of queries and answers; the first one stays, so that a resumed run asks in the same form.

        Raises:
          ModelDriftError: another fingerprint was told before.
          JournalError: another endpoint was bound before, or this is a replay and nothing was.
        """
        with self._lock:
            bound = self.model or Model(endpoint, "", dict(form))
            if bound.endpoint != endpoint:
                raise JournalError(f"{self._journal.name}: holds answers of {bound.endpoint}, not of {endpoint}")
            if bound.fingerprint and fingerprint and bound.fingerprint != fingerprint:
                raise ModelDriftError(f"{endpoint}: the model was {bound.fingerprint!r} and is now {fingerprint!r}")
            if not self._book.models or (fingerprint and not bound.fingerprint):
                bound = bound._replace(fingerprint=fingerprint)
                self._write(book.MODEL, book.model_payload(bound))
            return bound

    def key(self, request: bytes) -> bytes:
        """Returns the key of a request's canonical bytes, 32 bytes.

        Raises:
          JournalError: the ledger is not bound to a model.
        """
        if not self._book.models:
            raise JournalError(f"{self._journal.name}: is not bound to a model")
        digest = hashlib.sha256(json.dumps(self._book.models[0][:2]).encode() + b"\0")
        digest.update(request)
        return digest.digest()

    def find(self, key: bytes) -> bytes | None:
        """Returns the answer to a query; empty if it was given up, None if it is unknown or in doubt.

        Raises:
          JournalError: the answer cannot be read.
        """
        with self._lock:
            offset = self._book.found.get(key)
            return None if offset is None else book.answer_of(self._journal.read(offset))

    def reserve(self, charges: Mapping[bytes, Cost], repeats: Repeats = "charged again") -> None:
        """Charges queries that are about to be sent, durably: all of them, or none.

        What is answered, or reserved and not in doubt, is charged already.

        Args:
          charges: costs by key; tokens are an upper bound.
          repeats: what the server does with what is in doubt and now comes again.

        Raises:
          BudgetExceededError: the budget does not pay for it; nothing was charged.
          JournalError: it could not be written, or this is a replay.
        """
        with self._lock:
            due = {key: cost for key, cost in charges.items() if self._is_due(key, repeats)}
            if not due:
                return
            more = total(due.values())
            if not self._journal.writable:
                raise JournalError(
                    f"{self._journal.name}: a replay asks nobody, and {more.num_requests} requests are not answered"
                )
            check_budget(self._budget, self._price, self.balance(), more)
            self._write(book.RESERVE, book.reserve_payload(self._account, due))
            self._doubtful -= due.keys()
            self._journal.sync()

    def doubt(self, key: bytes) -> None:
        """Remembers that what is reserved for a query may have been billed."""
        with self._lock:
            if key in self._book.open:
                self._doubtful.add(key)

    def answer(self, key: bytes, payload: bytes, cost: Cost | None = None) -> None:
        """Writes down an answer; `sync` before it is used.

        Args:
          key: of a reserved query.
          payload: the answer, not empty.
          cost: what was billed; what was reserved, if left out.

        Raises:
          JournalError: nothing is reserved for it, or it cannot be written.
          ValueError: the answer is empty.
        """
        if not payload:
            raise ValueError("an answer must not be empty")
        with self._lock:
            if key not in self._book.open:
                raise JournalError(f"{self._journal.name}: nothing is reserved for the query {key.hex()[:16]}")
            charge = self._book.open[key]
            self._write(book.ANSWER, book.answer_payload(key, cost or charge.cost, payload))
            self._doubtful.discard(key)

    def release(self, key: bytes) -> None:
        """Takes back what is reserved, if anything, for a query that was not billed; what is in doubt stays charged.

        Raises:
          JournalError: it cannot be written.
        """
        with self._lock:
            if key in self._book.open and key not in self._doubtful:
                self._write(book.RELEASE, key)

    def give_up(self, key: bytes) -> None:
        """Writes down that a query gets no answer: from now on it has an empty one, as it has in a replay.

        Raises:
          JournalError: it is answered already, or it cannot be written.
        """
        with self._lock:
            if key in self._book.found:
                raise JournalError(f"{self._journal.name}: the query {key.hex()[:16]} is answered already")
            self.release(key)
            self._write(book.GIVE_UP, key)
            self._doubtful.discard(key)

    def sync(self) -> None:
        """Makes all answers survive a power cut.

        Raises:
          JournalError: the disk does not take them.
        """
        with self._lock:
            self._journal.sync()

    def position(self) -> Position:
        """Returns how far the journal is written, durably: what a checkpoint keeps, to ask for `at_least` as much."""
        with self._lock:
            self._journal.sync()
            return self._journal.position()

    def balance(self, account: str | None = None) -> Balance:
        """Returns where the budget has gone.

        Args:
          account: such as "training" or "evaluation"; all of them, if left out.
        """
        with self._lock:
            return self._book.balance(account, self._doubtful)

    @contextmanager
    def counted_as(self, account: str) -> Iterator[None]:
        """Counts what is reserved within in an account of its own, such as "evaluation"; the budget is one."""
        before, self._account = self._account, account
        try:
            yield
        finally:
            self._account = before

    def close(self) -> None:
        """Makes all durable and lets other processes open the journal."""
        with self._lock:
            try:
                self._journal.sync()
            finally:
                self._journal.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_due(self, key: bytes, repeats: Repeats) -> bool:
        if key in self._book.found:
            return False
        return key not in self._book.open or (key in self._doubtful and repeats == "charged again")

    def _write(self, kind: bytes, payload: bytes) -> None:
        self._book.apply(self._journal.append(kind, payload))


def open_ledger(
    path: Path | None,
    run: str,
    budget: Budget = UNLIMITED,
    price: Price = FREE,
    *,
    at_least: Position | None = None,
) -> Ledger:
    """Returns the ledger of a run, new or continued; one process at a time has it.

    What was reserved and neither answered nor released is in doubt.

    Args:
      path: of the journal; None keeps it in memory only.
      run: what the journal must be of, such as a hash of the experiment's description.
      budget: what may be spent, all that was spent before included.
      price: what the budget's money is counted by, for all of the journal.
      at_least: what a checkpoint relies on: the journal must hold all up to here, unchanged.

    Raises:
      JournalError: another process has the journal open, it is damaged, shorter than `at_least` or of another run.

    Example:
      >>> ledger = open_ledger(None, "example", Budget(num_requests=10))
      >>> ledger.bind("/v2/models/m/infer", "weights 1", {}).fingerprint
      'weights 1'
      >>> key = ledger.key(b"a request")
      >>> ledger.reserve({key: Cost(num_requests=8)})
      >>> ledger.answer(key, b"its answer")
      >>> ledger.find(key), ledger.balance().answered.num_requests
      (b'its answer', 8)
    """
    if path is None:
        return Ledger(lambda _: journal_in_memory(), run, budget, price)
    return Ledger(partial(open_journal, path, at_least=at_least), run, budget, price)


def replay_ledger(path: Path, run: str | None = None) -> Ledger:
    """Returns a finished run's ledger for reading: what it does not answer raises, nothing is written or sent.

    Args:
      path: of the journal.
      run: what it must be of; any, if left out.

    Raises:
      JournalError: it is not there, damaged, being written or of another run.
    """
    return Ledger(partial(read_journal, path), run, UNLIMITED, FREE)
