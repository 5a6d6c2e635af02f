"""A loop in a thread of its own."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from fedbbpt_jax.black_box.client import background
from fedbbpt_jax.black_box.client.background import BackgroundLoop


async def double(number):
    await asyncio.sleep(0)
    if number < 0:
        raise KeyError(number)
    return 2 * number


def test_it_returns_and_raises_what_the_coroutine_does():
    loop = BackgroundLoop()
    assert loop.run(double(3)) == 6
    with pytest.raises(KeyError):
        loop.run(double(-3))
    assert loop.run(double(4)) == 8
    loop.close()
    loop.close()
    assert not any(thread.name == "fedbbpt-remote" for thread in threading.enumerate())


def test_it_works_within_a_running_loop():
    """As in a notebook."""

    async def cell():
        loop = BackgroundLoop()
        try:
            return loop.run(double(3))
        finally:
            loop.close()

    assert asyncio.run(cell()) == 6


def test_an_interrupt_before_the_wait_leaves_nothing_running(monkeypatch):
    """It falls between the beginning of the coroutine and the wait for it."""

    async def endless():
        await asyncio.Event().wait()

    async def others():
        return len(asyncio.all_tasks()) - 1

    class Interrupting(Future):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    monkeypatch.setattr(background, "Future", Interrupting)
    loop = BackgroundLoop()
    with pytest.raises(KeyboardInterrupt):
        loop.run(endless())
    monkeypatch.undo()
    assert loop.run(others()) == 0
    loop.close()
