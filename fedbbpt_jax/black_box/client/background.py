"""An event loop in a thread of its own, so that code that waits can be called from code that does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_SECONDS_TO_STOP = 10.0


class BackgroundLoop:
    """Runs coroutines in its thread; works within a notebook, too, whose own loop is running."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fedbbpt-remote", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns what a coroutine returns, or raises what it raises.

        Whoever interrupts the wait (Ctrl-C) cancels the coroutine, and goes on once that has cleaned up.
        """
        answer: Future[T] = Future()
        ended = threading.Event()
        answer.add_done_callback(lambda _: ended.set())
        tasks: list[asyncio.Task[None]] = []

        async def whole() -> None:
            try:
                answer.set_result(await coroutine)
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                answer.set_exception(error)

        def end(_: object = None) -> None:
            coroutine.close()  # of one that was cancelled before it began
            answer.cancel()

        def begin() -> None:
            tasks.append(self._loop.create_task(whole()))
            tasks[0].add_done_callback(end)

        def give_up() -> None:
            for task in tasks:
                task.cancel()
            if not tasks:
                end()

        try:  # begins within, so that no interrupt falls between the beginning and its end
            self._loop.call_soon_threadsafe(begin)
            return answer.result()
        except BaseException:
            if not answer.done():
                self._loop.call_soon_threadsafe(give_up)
                ended.wait(_SECONDS_TO_STOP)
            raise

    def close(self) -> None:
        """Ends the thread; nothing happens at a second call."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SECONDS_TO_STOP)
        self._loop.close()
