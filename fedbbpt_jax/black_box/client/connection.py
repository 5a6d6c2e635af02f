"""The line to one server: its address, its secret, its thread, and what is paid over it."""

from __future__ import annotations

import os
import threading
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx

from fedbbpt_jax.black_box.client.background import BackgroundLoop
from fedbbpt_jax.black_box.client.delivery import Delivery, Message
from fedbbpt_jax.black_box.client.description import Visit
from fedbbpt_jax.black_box.client.pacing import SYSTEM_CLOCK, Clock, Patience
from fedbbpt_jax.black_box.ledger.ledger import Ledger, Repeats

TOKEN_VARIABLE = "FEDBBPT_TOKEN"

T = TypeVar("T")


class Terms(NamedTuple):
    """How a server is spoken to.

    Attributes:
      repeats: whether the server charges a query again that comes again under the same `Idempotency-Key`, which all
        attempts of a query share. The project's own server charges once.
      patience: how long to try.
      seed: of the random part of waiting, which reaches no result.
      token_variable: of the environment, whose value is sent as a bearer token if there is one.
      transport: in place of the network, for tests.
      clock: in place of the system's, for tests.
    """

    repeats: Repeats = "charged again"
    patience: Patience = Patience()
    seed: int = 0
    token_variable: str = TOKEN_VARIABLE
    transport: httpx.AsyncBaseTransport | None = None
    clock: Clock = SYSTEM_CLOCK


CAREFUL = Terms()


class Connection:
    """Sends messages that a ledger pays for. Made by `open_connection`; one call at a time."""

    def __init__(self, client: httpx.AsyncClient, delivery: Delivery, visit: Visit, ledger: Ledger, repeats: Repeats):
        self.visit, self.url = visit, str(client.base_url).rstrip("/")
        self._client, self._delivery, self._ledger = client, delivery, ledger
        self._repeats: Repeats = repeats
        self._loop, self._one_call = BackgroundLoop(), threading.Lock()

    def answer(self, messages: Sequence[Message]) -> None:
        """Sees to it that the ledger has the answers of messages with different keys, durably, or that there are none.

        Raises:
          BudgetExceededError: the budget does not pay for them; nothing was sent.
          QueryFailedError: the server refuses, or everything has failed for long.
          QuotaError: the server says that there is no money.
          ModelDriftError: the model has changed.
        """
        with self._one_call:
            unknown = [message for message in messages if self._ledger.find(message.key) is None]
            self._ledger.reserve({message.key: message.cost for message in unknown}, self._repeats)
            for key in self.run(self._delivery.deliver(unknown)) if unknown else ():
                self._ledger.give_up(key)
            self._ledger.sync()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns what a coroutine returns that uses this connection."""
        return self._loop.run(coroutine)

    @property
    def counts(self) -> dict[str, int]:
        """How many attempts there were, and how they failed, by kind."""
        return dict(self._delivery.counts)

    @property
    def concurrency(self) -> int:
        """How many messages may be in flight now."""
        return self._delivery.concurrency

    def close(self) -> None:
        """Closes the connections; nothing happens at a second call. The ledger stays open."""
        with self._one_call:
            if not self._client.is_closed:
                self.run(self._client.aclose())
            self._loop.close()

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"


def open_connection(url: str, ledger: Ledger, terms: Terms) -> Connection:
    """Returns a connection to a server; nothing is sent yet.

    Args:
      url: such as "http://127.0.0.1:8000".
      ledger: which pays.
      terms: how the server is spoken to.

    Raises:
      ValueError: the address is none, or holds a password; or the token cannot be one.
    """
    parts, patience = urlsplit(url), terms.patience
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ValueError("url must be like http://host:port, without name, password or question mark")
    token = _token(terms.token_variable)
    size = patience.max_concurrency
    client = httpx.AsyncClient(
        base_url=url,
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {}),
        timeout=patience.attempt_seconds,
        limits=httpx.Limits(max_connections=size, max_keepalive_connections=size),
        transport=terms.transport,
    )
    redact = partial(_without, token)
    delivery = Delivery(client, ledger, terms.repeats, patience, terms.clock, terms.seed, redact)
    variable = terms.token_variable
    advice = f"that of {variable} is not the right one" if token else f"set the variable {variable}"
    return Connection(client, delivery, Visit(client, patience, terms.clock, advice, redact), ledger, terms.repeats)


def _token(variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"the environment variable {variable} holds characters that no token has")
    return token


def _without(token: str, text: str) -> str:
    return text.replace(token, "***") if token else text
