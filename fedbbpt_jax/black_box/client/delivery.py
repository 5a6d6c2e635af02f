"""The way of a paid message: reserved, sent, tried again where that helps, and its answer written down.

| what comes | what it means | what happens |
|---|---|---|
| no connection, 429 | surely not billed | waits as told, tries again; released if it never gets through |
| 408, 409, 424, 425, 5xx, a time limit, a broken connection or answer | perhaps billed | tries again; stays charged |
| 402, or 429 with `insufficient_quota` | no money | `QuotaError` at once |
| 400 for the length or the contents of a text | this example | no answer, not tried again, released |
| any other status, such as 400, 401, 404, 413 | it will never work | `QueryFailedError` at once, with the reason |

Where one message ends all, what else is in flight is cancelled: it is in doubt, and asked again by who resumes.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import httpx2 as httpx

from fedbbpt_jax.black_box.client.answers import RejectedAnswerError
from fedbbpt_jax.black_box.client.pacing import Clock, Pace, Patience, told_delay
from fedbbpt_jax.black_box.ledger.costs import Cost
from fedbbpt_jax.black_box.ledger.ledger import Ledger, Repeats
from fedbbpt_jax.errors import FedBBPTError, ModelDriftError, QueryFailedError, QuotaError

RETRIED = frozenset({408, 409, 424, 425, 429})
CROWDED = frozenset({429, 503})
REFUSED_TEXTS = frozenset(
    {"context_length_exceeded", "string_above_max_length", "content_filter", "content_policy_violation"}
)

_MOST_WORDS = 1 << 16  # bytes that are read of an error


class Reply(NamedTuple):
    """What a server sent back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Kept(NamedTuple):
    """What is kept of a reply, and what the server billed, None where that is what was reserved."""

    payload: bytes
    cost: Cost | None = None


class Message(NamedTuple):
    """A query on its way.

    Attributes:
      key: in the ledger.
      cost: to be reserved.
      path: that it is sent to.
      headers: beside those of every message.
      content: its bytes.
      most_bytes: that an answer can have.
      read: reply of status 200 to what is kept of it; raises `RejectedAnswerError`, or `ModelDriftError`.
    """

    key: bytes
    cost: Cost
    path: str
    headers: Mapping[str, str]
    content: bytes
    most_bytes: int
    read: Callable[[Reply], Kept]


class _Failure(NamedTuple):
    kind: str
    reason: str
    wait: float | None = None
    is_final: bool = False


class Delivery:
    """Delivers messages over one client's connections; lives in one event loop.

    Attributes:
      counts: of attempts, and of their failures by kind.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        ledger: Ledger,
        repeats: Repeats,
        patience: Patience,
        clock: Clock,
        seed: int,
        redact: Callable[[str], str],
    ):
        self._client, self._ledger, self._redact = client, ledger, redact
        self._repeats: Repeats = repeats
        self._patience, self._clock = patience, clock
        self._pace = Pace(patience, clock, seed)
        self._is_over = False
        self.counts: Counter[str] = Counter()

    @property
    def concurrency(self) -> int:
        """How many messages may be in flight now."""
        return self._pace.concurrency

    async def deliver(self, messages: Sequence[Message]) -> dict[bytes, str]:
        """Returns why messages were not answered, by key; the answers of all others are in the ledger.

        Args:
          messages: with different keys, reserved.

        Raises:
          QueryFailedError: the server refuses, or everything has failed for long.
          QuotaError: the server says that there is no money.
          ModelDriftError: the model has changed.
          BudgetExceededError: the budget does not pay for another attempt.
        """
        self._is_over = False
        tasks = [asyncio.ensure_future(self._deliver_one(message)) for message in messages]
        try:
            reasons = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for message in messages:
                self._ledger.release(message.key)
            self._pace.forgive()
            raise
        return {m.key: reason for m, reason in zip(messages, reasons, strict=True) if reason is not None}

    async def _deliver_one(self, message: Message) -> str | None:
        """Returns None once the answer is in the ledger, or why there is none."""
        started, patience = self._clock.now(), self._patience
        for attempt in range(1, patience.max_attempts + 1):
            async with self._pace.turn() as turn:
                if self._is_over:
                    return "not sent, because another message ended all"
                failure = await self._attempt(message, attempt, turn)
            if failure is None:
                return None
            self.counts[failure.kind] += 1
            if failure.is_final:
                return failure.reason
            if self._pace.is_broken:
                raise self._failed(message, attempt, f"{failure.reason}, and so for all queries")
            wait = self._pace.delay(attempt, failure.wait)
            if attempt == patience.max_attempts or self._clock.now() + wait - started > patience.max_seconds:
                if self._pace.is_down:
                    raise self._failed(message, attempt, f"{failure.reason}, and so for all queries")
                return f"{failure.reason}, at attempt {attempt}"
            await self._clock.sleep(wait)
        raise ValueError(f"max_attempts must be positive, got {patience.max_attempts}")

    async def _attempt(self, message: Message, attempt: int, turn: int) -> _Failure | None:
        self._ledger.reserve({message.key: message.cost}, self._repeats)
        self.counts["attempts"] += 1
        try:
            async with asyncio.timeout(self._patience.attempt_seconds):
                reply = await self._send(message)
            failure = self._judge(message, reply, attempt, turn)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            failure = _Failure("connection", f"no connection ({type(error).__name__})")
        except (httpx.RequestError, TimeoutError) as error:
            self._ledger.doubt(message.key)
            failure = _Failure("transport", f"the connection broke ({type(error).__name__})")
        except RejectedAnswerError as error:
            self._ledger.doubt(message.key)
            failure = _Failure(error.kind, self._redact(str(error)))
        except FedBBPTError as error:
            self._is_over = True
            if isinstance(error, ModelDriftError):
                self._ledger.doubt(message.key)
            raise
        except BaseException:  # cancelled while it was on its way, perhaps
            self._ledger.doubt(message.key)
            raise
        if failure is None or failure.is_final:
            self._pace.succeeded()
        else:
            self._pace.failed()
        return failure

    async def _send(self, message: Message) -> Reply:
        headers = {**message.headers, "Idempotency-Key": message.key.hex()}
        request = self._client.stream("POST", message.path, content=message.content, headers=headers)
        async with request as response:
            body, most_bytes = bytearray(), message.most_bytes if response.status_code == 200 else _MOST_WORDS
            async for part in response.aiter_bytes():
                body += part
                if len(body) > most_bytes:
                    break
            if response.status_code == 200 and len(body) > most_bytes:
                raise RejectedAnswerError("body", f"the answer is longer than {most_bytes} bytes")
            return Reply(response.status_code, response.headers, bytes(body))

    def _judge(self, message: Message, reply: Reply, attempt: int, turn: int) -> _Failure | None:
        """Returns None and writes the answer down, or how the attempt failed; raises what needs no second attempt."""
        status = reply.status
        if status == 200:
            self._ledger.answer(message.key, *message.read(reply))
            return None
        code, reason = explanation(reply.body)
        reason = self._redact(f"status {status}{': ' if reason else ''}{reason}")
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            self._ledger.release(message.key)
            raise QuotaError(self._told(message, attempt, reason))
        if status == 400 and code in REFUSED_TEXTS:
            return _Failure(code, reason, is_final=True)
        if status not in RETRIED and status < 500:
            self._ledger.release(message.key)
            raise self._failed(message, attempt, reason)
        if status in CROWDED:
            self._pace.crowded(turn)
        if status != 429:
            self._ledger.doubt(message.key)
        return _Failure(f"status {status}", reason, told_delay(reply.headers, self._clock))

    def _failed(self, message: Message, attempts: int, reason: str) -> QueryFailedError:
        return QueryFailedError(self._told(message, attempts, reason))

    def _told(self, message: Message, attempts: int, reason: str) -> str:
        spent = self._ledger.balance().spent.num_requests
        times = "attempt" if attempts == 1 else "attempts"
        url = str(self._client.base_url).rstrip("/")
        return f"{url}{message.path}: {reason} ({attempts} {times}, {spent} requests spent)"


def explanation(body: bytes) -> tuple[str, str]:
    """Returns the code (or type) of an error and the server's words, each "" where there are none; at most a line.

    Example:
      >>> explanation(b'{"error": {"type": "insufficient_quota", "message": "Pay first."}}')
      ('insufficient_quota', 'Pay first.')
      >>> explanation(b'{"error": "no such model"}'), explanation(b"<html>")
      (('', 'no such model'), ('', ''))
    """
    try:
        head = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    error = head.get("error", head.get("detail")) if isinstance(head, dict) else None
    if not isinstance(error, dict):
        return "", " ".join(error.split())[:200] if isinstance(error, str) else ""
    codes = [str(error.get(name) or "") for name in ("code", "type")]
    code = "insufficient_quota" if "insufficient_quota" in codes else codes[0] or codes[1]
    return code, " ".join(str(error.get("message") or "").split())[:200]
