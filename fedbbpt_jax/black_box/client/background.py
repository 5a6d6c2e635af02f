"""An event loop in a thread of its own, so that code that waits can be called from code that does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
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
        ended = threading.Event()

        async def whole() -> T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(whole(), self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                ended.wait(_SECONDS_TO_STOP)
            raise

    def close(self) -> None:
        """Ends the thread; nothing happens at a second call."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SECONDS_TO_STOP)
        self._loop.close()
