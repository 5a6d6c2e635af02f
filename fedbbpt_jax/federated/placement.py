"""Where the stages of a round run. One placement so far: everything compiled into one program on one device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.federated.cohort import ClientData, draw_cohort
from fedbbpt_jax.federated.round import RoundInfo, candidate_loss, federated_round
from fedbbpt_jax.types import BlackBox, Examples, Method, PyTree

RunRounds = Callable[[BlackBox, PyTree, ClientData, Array, Array], tuple[PyTree, RoundInfo]]


def compile_rounds(
    method: Method, *, cohort_size: int, local_steps: int, batch_size: int, chunk_size: int = 16
) -> RunRounds:
    """Returns a compiled `(box, server, clients, key, rounds [R]) -> (server, RoundInfo [R])`.

    Clients are vmapped, candidates of all clients are mapped in chunks, local steps and rounds are scanned. The box's
    weights and the clients' data enter as arguments. A negative round number is skipped, so that segments of unequal
    length share one compilation.

    Args:
      method: generator, objective, optimizer and federation.
      cohort_size: C, clients per round.
      local_steps: T, steps between two aggregations.
      batch_size: B, examples per step.
      chunk_size: candidates in flight at once. Memory grows with chunk_size·B, not with C·K; the default is the
        fastest of those measured on CPU, where the work of a chunk should stay in the cache.

    Raises:
      ValueError: a size is not positive.
    """
    sizes = {"cohort_size": cohort_size, "local_steps": local_steps, "batch_size": batch_size, "chunk_size": chunk_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")

    @jax.jit
    def run_rounds(box: BlackBox, server: PyTree, clients: ClientData, key: Array, rounds: Array):
        evaluate = partial(_evaluate_in_chunks, method, box, chunk_size)

        def play(server: PyTree, index: Array) -> tuple[PyTree, RoundInfo]:
            round_key = jax.random.fold_in(key, index)
            cohort_key, client_key = jax.random.split(round_key)
            cohort = draw_cohort(cohort_key, clients, cohort_size, local_steps, batch_size)
            return federated_round(method, evaluate, lambda x: x.sum(0), client_key, server, cohort)

        def skip(server: PyTree, index: Array) -> tuple[PyTree, RoundInfo]:
            _, info = jax.eval_shape(play, server, index)
            return server, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info)

        def play_or_skip(server: PyTree, index: Array) -> tuple[PyTree, RoundInfo]:
            return jax.lax.cond(index >= 0, play, skip, server, index)

        return jax.lax.scan(play_or_skip, server, rounds)

    return run_rounds


def _evaluate_in_chunks(
    method: Method, box: BlackBox, chunk_size: int, keys: Array, states: PyTree, batches: Examples
) -> tuple[Array, Array]:
    """Returns losses and validity `[C, K, B]`; candidates are made, turned into prompts and queried chunk by chunk."""
    num_clients, num_candidates = len(keys), method.optimizer.num_candidates

    def one(row: Array) -> tuple[Array, Array]:
        client, k = row // num_candidates, row % num_candidates
        state, batch = jax.tree.map(lambda x: x[client], (states, batches))
        return candidate_loss(method, box, keys[client], state, k, batch)

    rows = jnp.arange(num_clients * num_candidates)
    losses, valid = jax.lax.map(one, rows, batch_size=_even_chunk(len(rows), chunk_size))
    return tuple(x.reshape(num_clients, num_candidates, -1) for x in (losses, valid))


def _even_chunk(num_rows: int, chunk_size: int) -> int:
    """Returns the chunk size up to `chunk_size` that splits the rows into fewest, most even chunks.

    An exact division compiles one body instead of a second one for the remainder.

    >>> _even_chunk(50, 8), _even_chunk(50, 16), _even_chunk(7, 8)
    (5, 10, 7)
    """
    return max(size for size in range(1, min(chunk_size, num_rows) + 1) if num_rows % size == 0)
