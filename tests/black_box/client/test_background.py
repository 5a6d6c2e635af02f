"""A loop in a thread of its own."""

import asyncio
import threading

import pytest

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
