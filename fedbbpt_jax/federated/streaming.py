"""Rounds over clients whose data, or those of one cohort alone, do not fit on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedbbpt_jax.federated.host import looped_rounds
from fedbbpt_jax.federated.participation import Participation
from fedbbpt_jax.federated.placement import RunRounds, check_sizes, evaluation_in_chunks
from fedbbpt_jax.federated.round import Evaluate
from fedbbpt_jax.types import BlackBox, Cohort, Examples, Method, Optimizer, PyTree

Job = TypeVar("Job")
Found = TypeVar("Found")


def stream_rounds(
    method: Method,
    participation: Participation,
    *,
    local_steps: int,
    batch_size: int,
    chunk_size: int = 16,
    group_size: int = 64,
) -> RunRounds:
    """Returns rounds over clients whose examples stay in the host's memory, or in a file that is mapped into it.

    The minibatches of `group_size` clients at a time are gathered on the host by a thread and moved to the device while
    it evaluates those of the group before. So the device holds the minibatches of four groups at most, and of every
    client in the cohort its state, which is small.

    Args:
      method: as for `compile_rounds`, and so are the sizes.
      participation: who takes part.
      local_steps: T.
      batch_size: B.
      chunk_size: candidates in flight at once.
      group_size: clients whose minibatches are moved at once.

    Raises:
      ValueError: a size is not positive.
    """
    check_sizes(chunk_size=chunk_size, group_size=group_size)

    reports = method.federation.report is not None

    @partial(jax.jit, static_argnums=0)
    def evaluate_group(optimizer: Optimizer, box: BlackBox, batches: Examples, keys: Array, *rest):
        rows = jnp.arange(len(keys) * batch_size).reshape(-1, batch_size)
        states, taking_part = rest
        return evaluation_in_chunks(method, box, batches, chunk_size)(optimizer, keys, states, rows, taking_part)

    def evaluation(box: BlackBox, examples: Examples, cohorts: Sequence[Cohort]) -> Evaluate:
        batches = prefetched(lambda rows: _gather(examples, rows), _groups_of_rows(cohorts, group_size, reports))

        def evaluate(optimizer: Optimizer, keys: Array, states: PyTree, rows: Array, taking_part: Array):
            found = []
            for places in _groups(len(rows), group_size):
                group = jax.tree.map(lambda x, places=places: x[places], (keys, states, taking_part))
                # The host waits here, or it would run ahead of the device and fill it with minibatches.
                found.append(jax.block_until_ready(evaluate_group(optimizer, box, next(batches), *group)))
            return jax.tree.map(lambda *x: jnp.concatenate(x)[: len(rows)], *found)

        return evaluate

    return looped_rounds(method, participation, evaluation, local_steps=local_steps, batch_size=batch_size)


def prefetched(work: Callable[[Job], Found], jobs: Iterable[Job], depth: int = 2) -> Iterator[Found]:
    """Yields the results of `work` in the order of `jobs`, up to `depth` of them done ahead by a thread.

    An error in a job is raised where its result is due.

    Example:
      >>> list(prefetched(lambda x: x + 1, [3, 1, 2]))
      [4, 2, 3]
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = deque()
        for job in jobs:
            pending.append(thread.submit(work, job))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _groups(num_clients: int, group_size: int) -> list[np.ndarray]:
    """Returns the places of clients in groups of one size; the last is filled up with a client, whose losses go away.

    >>> [places.tolist() for places in _groups(5, 2)]
    [[0, 1], [2, 3], [4, 4]]
    """
    size = min(group_size, num_clients)
    return [np.minimum(np.arange(start, start + size), num_clients - 1) for start in range(0, num_clients, size)]


def _groups_of_rows(cohorts: Sequence[Cohort], group_size: int, reports: bool) -> Iterator[np.ndarray]:
    """Yields the rows `[group, B]` of each group of each step of each cohort, as they will be asked for.

    Those of the last step come twice if clients report what their solution costs on them.
    """
    for cohort in cohorts:
        rows = np.asarray(cohort.rows)  # [C, T, B]
        for step in [*range(rows.shape[1]), *[-1] * reports]:
            for places in _groups(len(rows), group_size):
                yield rows[places, step]


def _gather(examples: Examples, rows: np.ndarray) -> Examples:
    """Returns the examples of rows `[group, B]` on the device, one client after the other."""
    return jax.tree.map(lambda x: jax.device_put(x[rows.ravel()]), examples)
