"""Answers that were paid for once and are given again: a bounded store by the key that the client chose."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class KeyReusedError(Exception):
    """A key came with another body than before."""


@dataclass(eq=False)
class _Entry(Generic[T]):
    digest: bytes
    answer: asyncio.Future[T]
    num_bytes: int = 0


class Answers(Generic[T]):
    """Answers by key, the oldest forgotten where they are too many or too large; none is forgotten while it is made."""

    def __init__(self, max_answers: int, max_bytes: int):
        """Takes the most answers and the most bytes that are kept."""
        self._max_answers, self._max_bytes = max_answers, max_bytes
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def once(
        self, key: str, digest: bytes, make: Callable[[], Awaitable[T]], size: Callable[[T], int]
    ) -> tuple[T, bool]:
        """Returns the answer to a key, and whether it was made now. Who comes while it is made waits for it.

        A failure is not kept: it goes to all who wait, and the next one tries again.

        Args:
          key: chosen by the client.
          digest: of the request; a key belongs to one.
          make: makes the answer. It goes on where the client leaves.
          size: bytes of an answer.

        Raises:
          KeyReusedError: the key came with another request before.
        """
        known = self._entries.get(key)
        if known is not None:
            if known.digest != digest:
                raise KeyReusedError
            self._entries.move_to_end(key)
            return await asyncio.shield(known.answer), False
        entry = _Entry(digest, asyncio.ensure_future(make()))
        self._entries[key] = entry
        entry.answer.add_done_callback(lambda answer: self._settle(key, entry, answer, size))
        return await asyncio.shield(entry.answer), True

    def _settle(self, key: str, entry: _Entry[T], answer: asyncio.Future[T], size: Callable[[T], int]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            self._entries.pop(key, None)
            return
        entry.num_bytes = size(answer.result()) + len(key) + 256
        self.num_bytes += entry.num_bytes
        for old in list(self._entries):
            if len(self._entries) <= self._max_answers and self.num_bytes <= self._max_bytes:
                break
            if self._entries[old].answer.done():
                self.num_bytes -= self._entries.pop(old).num_bytes
