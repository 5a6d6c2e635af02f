"""Requests that come at one time are answered in one batch: rows wait in a queue of bounded length for the next one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from fedbbpt_jax.black_box.rows import Cut, rows_of
from fedbbpt_jax.black_box.server.served_model import ServedRows


class QueueFullError(Exception):
    """More rows wait than the queue holds.

    Attributes:
      retry_after: seconds until there will be room, about.
    """

    def __init__(self, retry_after: float):
        super().__init__("too many rows wait for an answer")
        self.retry_after = retry_after


class Batch(NamedTuple):
    """What one batch was: rows that counted, of how many, and how long they took."""

    count: int
    size: int
    seconds: float


@dataclass(eq=False)
class _Job:
    cut: Cut
    scores: np.ndarray  # [n, b, N]
    done: asyncio.Future
    taken: int = 0
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.scores)


class Batcher:
    """Answers cuts of queries: rows of all that wait are computed together, first come first served.

    Threads compute, so that the loop that reads and writes messages goes on. A batch is not waited for: the first row
    that finds a thread idle is computed at once, and what comes meanwhile is the next batch.
    """

    def __init__(
        self,
        rows: ServedRows,
        max_waiting: int,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        num_threads: int = 1,
    ):
        """Takes what is served, the most rows that wait, who is told of each batch, and how many compute at a time."""
        self._rows, self._max_waiting, self._on_batch, self._num_threads = rows, max_waiting, on_batch, num_threads
        self._jobs: deque[_Job] = deque()
        self._threads = ThreadPoolExecutor(num_threads, "fedbbpt-rows")
        self._seconds_per_row = 1e-3
        self._busy: set[asyncio.Task] = set()
        self._not_taken = 0
        self.num_waiting = 0

    async def answer(self, cut: Cut) -> np.ndarray:
        """Returns the scores of a cut's rows, float32 `[n, b, N]`.

        Raises:
          QueueFullError: too many rows wait already.
        """
        n = len(cut.prompt_of_row)
        if self.num_waiting and self.num_waiting + n > self._max_waiting:
            raise QueueFullError(self.num_waiting * self._seconds_per_row)
        block = jax.tree.leaves(cut.blocks)[0].shape[1]
        job = _Job(cut, np.empty((n, block, self._rows.num_classes), np.float32), asyncio.Future())
        self._jobs.append(job)
        self.num_waiting += n
        self._not_taken += n
        while len(self._busy) < min(self._num_threads, self._not_taken):
            self._busy.add(task := asyncio.create_task(self._work()))
            task.add_done_callback(self._busy.discard)
        return await asyncio.shield(job.done)

    async def close(self) -> None:
        """Answers all that wait, and ends the threads."""
        await asyncio.gather(*self._busy)
        self._threads.shutdown()

    async def _work(self) -> None:
        while self._jobs:
            taken, count = self._next_batch()
            started = time.perf_counter()
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, taken, count)
            except Exception as error:
                self._fail(taken, error)
                continue
            finally:
                self.num_waiting -= count
            seconds = time.perf_counter() - started
            self._seconds_per_row += 0.1 * (seconds / count / self._num_threads - self._seconds_per_row)
            self._on_batch(Batch(count, self._rows.num_rows, seconds))
            self._hand_out(taken, found)

    def _next_batch(self) -> tuple[list[tuple[_Job, slice]], int]:
        """Returns the next rows to compute, a fair share of them for each thread, and how many they are."""
        count = min(self._rows.num_rows, -(-self._not_taken // self._num_threads))
        taken, room = [], count
        while room:
            job = self._jobs[0]
            some = slice(job.taken, min(job.taken + room, len(job.scores)))
            taken.append((job, some))
            room -= some.stop - some.start
            job.taken = some.stop
            if job.taken == len(job.scores):
                self._jobs.popleft()
        self._not_taken -= count
        return taken, count

    def _compute(self, taken: list[tuple[_Job, slice]], count: int) -> np.ndarray:
        cuts = [(job.cut, job.cut.prompt_of_row[some], job.cut.block_of_row[some]) for job, some in taken]
        return self._rows.compute(*rows_of(cuts, self._rows.num_rows), count)

    def _hand_out(self, taken: list[tuple[_Job, slice]], found: np.ndarray) -> None:
        start = 0
        for job, some in taken:
            size = some.stop - some.start
            job.scores[some] = found[start : start + size]
            start, job.left = start + size, job.left - size
            if job.left == 0 and not job.done.done():
                job.done.set_result(job.scores)

    def _fail(self, taken: list[tuple[_Job, slice]], error: Exception) -> None:
        for job, _ in taken:
            if job in self._jobs:
                self._jobs.remove(job)
                self.num_waiting -= len(job.scores) - job.taken
                self._not_taken -= len(job.scores) - job.taken
            if not job.done.done():
                job.done.set_exception(error)
