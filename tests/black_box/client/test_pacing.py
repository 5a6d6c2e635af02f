"""How long a client waits, how many messages it has in flight and when it stops; without waiting."""

import asyncio
import itertools

import pytest

from fedbbpt_jax.black_box.client.pacing import Clock, Pace, Patience, told_delay

PATIENCE = Patience(first_delay=1.0, longest_delay=10.0, breaker_failures=3, breaker_seconds=60.0, max_concurrency=16)


class Time:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now, self.sleep, lambda: 0.0)


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def pace(time):
    return Pace(PATIENCE, time.clock, seed=0)


def test_waits_are_random_and_grow_to_a_limit(pace):
    for attempt, most in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (60, 10)]:
        waits = [pace.delay(attempt, None) for _ in range(200)]
        assert 0 <= min(waits) < most / 10
        assert most * 0.9 < max(waits) <= most


def test_waits_are_those_of_the_seed(time):
    waits = [[Pace(PATIENCE, time.clock, seed).delay(5, None) for _ in range(2)] for seed in (0, 0, 1)]
    assert waits[0] == waits[1] != waits[2]


def test_a_server_is_obeyed(pace):
    """And not by all clients at the same moment."""
    waits = [pace.delay(1, 300.0) for _ in range(100)]
    assert min(waits) >= 300
    assert len(set(waits)) == 100


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 60.0),
        ({"retry-after": "Wed, 31 Dec 1969 00:00:00 GMT"}, 0.0),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e999"}, None),
        ({"retry-after-ms": "inf"}, None),
    ],
)
def test_what_a_server_asks_for_is_read(time, headers, seconds):
    assert told_delay(headers, time.clock) == seconds


def test_concurrency_is_halved_once_for_all_that_was_in_flight(pace):
    before = pace.concurrency
    pace.crowded(0)
    pace.crowded(0)
    assert pace.concurrency == before // 2
    pace.crowded(1)
    assert pace.concurrency == before // 4
    for turn in itertools.count(2):
        pace.crowded(turn)
        if turn > 10:
            break
    assert pace.concurrency == 1


def test_concurrency_grows_slowly_to_its_limit(pace):
    before = pace.concurrency
    for _ in range(before + 1):
        pace.succeeded()
    assert pace.concurrency == before + 1
    for _ in range(1000):
        pace.succeeded()
    assert pace.concurrency == PATIENCE.max_concurrency


def test_no_more_are_in_flight_than_allowed(pace):
    most = 0

    async def send(running):
        nonlocal most
        async with pace.turn():
            running.append(1)
            most = max(most, len(running))
            await asyncio.sleep(0)
            running.pop()

    async def all_of_them():
        running = []
        await asyncio.gather(*(send(running) for _ in range(50)))

    asyncio.run(all_of_them())
    assert most == pace.concurrency == 8


def test_everybody_waits_after_many_failures(pace, time):
    for _ in range(3):
        assert time.slept == []
        pace.failed()

    async def send():
        async with pace.turn():
            return time.now

    async def both():
        return await asyncio.gather(send(), send())

    assert min(asyncio.run(both())) >= 160.0
    assert not pace.is_broken


def test_an_answer_forgives_failures(pace):
    for _ in range(5):
        pace.failed()
    pace.succeeded()
    assert not pace.is_broken
    for _ in range(6):
        assert not pace.is_broken
        pace.failed()
    assert pace.is_broken
    pace.forgive()
    assert not pace.is_broken


def test_who_is_cancelled_leaves_room(pace):
    async def cancel():
        async def hold():
            async with pace.turn():
                await asyncio.Event().wait()

        tasks = [asyncio.ensure_future(hold()) for _ in range(8)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with pace.turn() as turn:
            return turn

    assert asyncio.run(cancel()) == 0
