"""What the records of a ledger say, and the state that follows from them, live or read again."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedbbpt_jax.black_box.ledger.costs import Balance, Cost, total
from fedbbpt_jax.black_box.ledger.journal import Record
from fedbbpt_jax.errors import JournalError

FORMAT = 1
START, MODEL, RESERVE, ANSWER, RELEASE, GIVE_UP = b"S", b"M", b"R", b"A", b"L", b"G"

_CHARGE = struct.Struct("<32sQQ")
_ACCOUNT = struct.Struct("<H")


class Model(NamedTuple):
    """What the answers of a journal come from.

    Attributes:
      endpoint: the path that is asked, without the server's address: the same weights elsewhere answer the same.
      fingerprint: of the model, "" where the server tells none.
      form: of its queries and answers, as JSON carries it.
    """

    endpoint: str
    fingerprint: str
    form: Mapping[str, Any]


class Charge(NamedTuple):
    """What is reserved for a query, and the account that it counts in."""

    cost: Cost
    account: str


def start_payload(run: str | None) -> bytes:
    """Returns the payload of a first record: the format, and what the journal is of."""
    return json.dumps({"format": FORMAT, "run": run}).encode()


def model_payload(model: Model) -> bytes:
    """Returns the payload of a record that names the model."""
    return json.dumps(model._asdict(), sort_keys=True).encode()


def reserve_payload(account: str, charges: Mapping[bytes, Cost]) -> bytes:
    """Returns the payload of one reservation of many queries: a torn one reserves none of them."""
    name = account.encode()
    return b"".join([_ACCOUNT.pack(len(name)), name, *(_CHARGE.pack(key, *cost) for key, cost in charges.items())])


def answer_payload(key: bytes, cost: Cost, answer: bytes) -> bytes:
    """Returns the payload of an answer; those of RELEASE and GIVE_UP are the key."""
    return _CHARGE.pack(key, *cost) + answer


def answer_of(record: Record) -> bytes:
    """Returns the answer that a record holds, empty where it says that none will come."""
    return record.payload[_CHARGE.size :] if record.kind == ANSWER else b""


class Book:
    """State of a ledger; changed by `apply` only, so that a resumed run has the state of the undisturbed one.

    Attributes:
      started: whether the first record was seen.
      models: that were named, in order.
      open: what is reserved and neither answered, released nor given up, by key.
      found: where the record of an answered or given-up query begins, by key.
    """

    def __init__(self, run: str | None):
        self._run = run
        self.started = False
        self.models: list[Model] = []
        self.open: dict[bytes, Charge] = {}
        self.found: dict[bytes, int] = {}
        self._settled: dict[str, Balance] = {}

    def apply(self, record: Record) -> None:
        """Changes the state as a record says.

        Raises:
          JournalError: it is of another run or format, or makes no sense here.
        """
        try:
            if self.started == (record.kind == START):
                raise ValueError("a journal starts once")
            self._apply(record)
        except (KeyError, ValueError, TypeError, struct.error) as error:
            raise JournalError(f"the record at byte {record.offset} makes no sense: {error}") from error

    def balance(self, account: str | None, doubtful: Iterable[bytes]) -> Balance:
        """Returns where the budget has gone.

        Args:
          account: the one to look at; all, if None.
          doubtful: keys of open charges that may have been billed.
        """
        doubtful = frozenset(doubtful)
        settled = [b for name, b in self._settled.items() if account in (None, name)]
        pending = {key: charge.cost for key, charge in self.open.items() if account in (None, charge.account)}
        lost = [cost for key, cost in pending.items() if key in doubtful]
        return Balance(
            total(b.answered for b in settled),
            total([*(b.in_doubt for b in settled), *lost]),
            total(cost for key, cost in pending.items() if key not in doubtful),
        )

    def _apply(self, record: Record) -> None:
        kind, payload = record.kind, record.payload
        if kind == START:
            head = json.loads(payload)
            if head["format"] != FORMAT or (self._run is not None and head["run"] != self._run):
                raise JournalError(f"is of format {head['format']} and run {head['run']!r}, not {self._run!r}")
            self.started = True
        elif kind == MODEL:
            self.models.append(Model(**json.loads(payload)))
        elif kind == RESERVE:
            start = _ACCOUNT.size + _ACCOUNT.unpack_from(payload)[0]
            account = payload[_ACCOUNT.size : start].decode()
            for key, *cost in _CHARGE.iter_unpack(payload[start:]):
                self._lose(key)
                self.open[key] = Charge(Cost(*cost), account)
        elif kind == ANSWER:
            key, *cost = _CHARGE.unpack_from(payload)
            self._settle(self.open.pop(key).account, Balance(answered=Cost(*cost)))
            self.found[key] = record.offset
        elif kind == RELEASE:
            del self.open[payload]
        elif kind == GIVE_UP:
            self._lose(payload)
            self.found[payload] = record.offset
        else:
            raise ValueError(f"its kind is {kind!r}")

    def _lose(self, key: bytes) -> None:
        """Leaves what was charged for a query, if anything, in doubt for good."""
        charge = self.open.pop(key, None)
        if charge is not None:
            self._settle(charge.account, Balance(in_doubt=charge.cost))

    def _settle(self, account: str, more: Balance) -> None:
        before = self._settled.get(account, Balance())
        self._settled[account] = Balance(*(total(pair) for pair in zip(before, more, strict=True)))
