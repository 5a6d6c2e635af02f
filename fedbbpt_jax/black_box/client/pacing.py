"""How often, how fast and how long a served model is asked: retries, concurrency, and when to stop.

Waiting is random, to keep clients apart, but nothing that is random here reaches a result.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import NamedTuple


class Patience(NamedTuple):
    """How long to try.

    Attributes:
      max_attempts: for one message, the first included.
      max_seconds: for one message, after which it is not tried again.
      attempt_seconds: for one attempt.
      first_delay: seconds; the longest wait after the first failure, doubled after each.
      longest_delay: seconds; a server that asks for longer gets longer.
      max_concurrency: messages in flight.
      breaker_failures: in a row, of all messages, after which everybody waits, and no message is given up alone any
        more; after as many more all is over.
      breaker_seconds: of that wait.
    """

    max_attempts: int = 6
    max_seconds: float = 300.0
    attempt_seconds: float = 60.0
    first_delay: float = 0.5
    longest_delay: float = 20.0
    max_concurrency: int = 32
    breaker_failures: int = 20
    breaker_seconds: float = 30.0


class Clock(NamedTuple):
    """Time, so that a test need not wait.

    Attributes:
      now: seconds, from any start.
      sleep: waits for seconds.
      date: seconds since 1970.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    date: Callable[[], float] = time.time


SYSTEM_CLOCK = Clock()


class Pace:
    """Concurrency and pauses of all messages to one server; lives in one event loop.

    Concurrency is additive increase, multiplicative decrease: halved when the server says that it is too much, and
    raised by one after as many successes as it is.
    """

    def __init__(self, patience: Patience, clock: Clock, seed: int):
        self._patience, self._clock = patience, clock
        self._random = random.Random(seed)
        self._limit = float(min(8, patience.max_concurrency))
        self._in_flight, self._turn, self._failures = 0, 0, 0
        self._pause_until = clock.now()
        self._freed = asyncio.Condition()

    @property
    def concurrency(self) -> int:
        """How many messages may be in flight now."""
        return int(self._limit)

    @property
    def is_down(self) -> bool:
        """Whether so much has failed in a row that it is the server's fault, not a message's."""
        return self._failures >= self._patience.breaker_failures

    @property
    def is_broken(self) -> bool:
        """Whether so much has failed in a row that there is no point in going on."""
        return self._failures >= 2 * self._patience.breaker_failures

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[int]:
        """Waits until one more message may be in flight; yields what `crowded` is told."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._in_flight < self.concurrency)
            self._in_flight += 1
        try:
            while (wait := self._pause_until - self._clock.now()) > 0:
                await self._clock.sleep(wait)
            yield self._turn
        finally:
            self._in_flight -= 1
            async with self._freed:
                self._freed.notify_all()

    def succeeded(self) -> None:
        """Notes an answer."""
        self._failures = 0
        self._limit = min(self._limit + 1 / self._limit, self._patience.max_concurrency)

    def failed(self) -> None:
        """Notes a failure; after many in a row everybody waits."""
        self._failures += 1
        if self._failures == self._patience.breaker_failures:
            self._pause_until = self._clock.now() + self._patience.breaker_seconds

    def crowded(self, turn: int) -> None:
        """Notes that the server was asked too much at once; what was sent before the last halving tells nothing new."""
        if turn == self._turn:
            self._limit = max(1.0, self._limit / 2)
            self._turn += 1

    def forgive(self) -> None:
        """Forgets failures: somebody tries again."""
        self._failures = 0

    def delay(self, attempt: int, told: float | None) -> float:
        """Returns how long to wait after the attempt of this number, from 1 on: full jitter, seconds.

        Args:
          attempt: that failed.
          told: seconds that the server asks for; None if it does not.
        """
        most = min(self._patience.longest_delay, self._patience.first_delay * 2.0 ** (attempt - 1))
        jitter = self._random.uniform(0, most)
        return jitter if told is None else told + self._random.uniform(0, self._patience.first_delay)


def told_delay(headers: Mapping[str, str], clock: Clock = SYSTEM_CLOCK) -> float | None:
    """Returns how long a server asks to wait, seconds; None where it does not say, or nothing that can be read.

    Args:
      headers: of its answer, whose names are in lower case or do not care.
      clock: for a date.

    Example:
      >>> told_delay({"retry-after": "3"}), told_delay({"retry-after-ms": "250"}), told_delay({})
      (3.0, 0.25, None)
    """
    milliseconds, seconds = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            wait = float(milliseconds) / 1000
        elif seconds is not None and not seconds[:1].isalpha():
            wait = float(seconds)
        elif seconds is not None:
            wait = parsedate_to_datetime(seconds).timestamp() - clock.date()
        else:
            return None
    except (ValueError, OverflowError):
        return None
    return max(wait, 0.0) if wait < float("inf") else None
