"""Who takes part in a round: functions of a key, the round's number and the clients' sizes.

A participation is `(key, round, sizes [clients]) -> (ids [C], weights [C])` with C fixed; weight 0 is a client that was
drawn and did not come: it asks nothing and counts for nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Draw(Protocol):
    """Draws a cohort."""

    def __call__(self, key: Array, index: Array, sizes: Array, /) -> tuple[Array, Array]:
        """Returns ids int32 `[C]`, increasing, and weights float32 `[C]`."""
        ...


class Participation(NamedTuple):
    """Who takes part.

    Attributes:
      draw: `(key, round, sizes [clients]) -> (ids [C], weights [C])`.
      cohort_size: C.
    """

    draw: Draw
    cohort_size: int


def uniform_cohort(cohort_size: int) -> Participation:
    """Returns C clients drawn uniformly without replacement, weighted by their number of examples.

    C = number of clients is full participation; C = 1 is FedOne's.

    Source: McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".

    Raises:
      ValueError: the cohort is empty; on use, it is larger than the number of clients.

    Example:
      >>> uniform_cohort(2).draw(jax.random.key(0), 0, jnp.array([5, 7, 9]))[0].shape
      (2,)
    """
    _check(cohort_size)

    def draw(key: Array, index: Array, sizes: Array, /) -> tuple[Array, Array]:
        del index
        num_clients = _check_population(cohort_size, sizes)
        ids = jnp.arange(num_clients)
        if cohort_size < num_clients:
            ids = jnp.sort(jax.random.choice(key, num_clients, (cohort_size,), replace=False))
        return ids, sizes[ids].astype(jnp.float32)

    return Participation(draw, cohort_size)


def weighted_cohort(cohort_size: int) -> Participation:
    """Returns C clients drawn one after the other by their number of examples, without replacement, of equal weight.

    Large clients come more often instead of counting more.

    Raises:
      ValueError: as for `uniform_cohort`.

    Example:
      >>> weighted_cohort(2).draw(jax.random.key(0), 0, jnp.array([5, 7, 9]))[1]
      Array([1., 1.], dtype=float32)
    """
    _check(cohort_size)

    def draw(key: Array, index: Array, sizes: Array, /) -> tuple[Array, Array]:
        del index
        _check_population(cohort_size, sizes)
        # The largest of log-sizes with Gumbel noise are a draw without replacement (Kool et al., 2019).
        chances = jnp.log(sizes.astype(jnp.float32)) + jax.random.gumbel(key, sizes.shape)
        return jnp.sort(jax.lax.top_k(chances, cohort_size)[1]), jnp.ones(cohort_size)

    return Participation(draw, cohort_size)


def with_equal_weights(participation: Participation) -> Participation:
    """Returns the participation with weight 1 for every client that came, whatever its size.

    Example:
      >>> with_equal_weights(uniform_cohort(2)).draw(jax.random.key(0), 0, jnp.array([5, 7]))[1]
      Array([1., 1.], dtype=float32)
    """

    def draw(key: Array, index: Array, sizes: Array, /) -> tuple[Array, Array]:
        ids, weights = participation.draw(key, index, sizes)
        return ids, (weights > 0).astype(jnp.float32)

    return Participation(draw, participation.cohort_size)


def with_dropout(participation: Participation, rate: float) -> Participation:
    """Returns the participation whose clients stay away, each independently, with probability `rate`.

    Raises:
      ValueError: the rate is not in [0, 1).

    Example:
      >>> ids, weights = with_dropout(uniform_cohort(2), 0.5).draw(jax.random.key(0), 0, jnp.array([5, 7]))
      >>> ids
      Array([0, 1], dtype=int32)
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the drop-out rate must be in [0, 1), got {rate}")

    def draw(key: Array, index: Array, sizes: Array, /) -> tuple[Array, Array]:
        ids, weights = participation.draw(key, index, sizes)
        # By id, so that whether a client comes does not depend on who else was drawn.
        draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 1), i)))(ids)
        return ids, jnp.where(draws < rate, 0.0, weights)

    return Participation(draw, participation.cohort_size)


def with_availability(participation: Participation, trace: np.ndarray) -> Participation:
    """Returns the participation whose clients come only in the rounds that a trace names.

    Args:
      participation: who is drawn.
      trace: bool `[rounds, clients]`; after its last round it begins anew.

    Raises:
      ValueError: the trace is not such an array; on use, it is of another number of clients.

    Example:
      >>> trace = np.array([[True, False]])
      >>> with_availability(uniform_cohort(2), trace).draw(jax.random.key(0), 0, jnp.array([5, 7]))[1]
      Array([5., 0.], dtype=float32)
    """
    if trace.ndim != 2 or trace.dtype != bool or len(trace) == 0:
        raise ValueError(f"a trace must be bool [rounds, clients], got {trace.dtype} {list(trace.shape)}")

    def draw(key: Array, index: Array, sizes: Array, /) -> tuple[Array, Array]:
        if trace.shape[1] != len(sizes):
            raise ValueError(f"the trace has {trace.shape[1]} clients, the data {len(sizes)}")
        ids, weights = participation.draw(key, index, sizes)
        return ids, jnp.where(jnp.asarray(trace)[index % len(trace), ids], weights, 0.0)

    return Participation(draw, participation.cohort_size)


def read_availability(file: str | Path, num_clients: int) -> np.ndarray:
    """Returns the trace in a file .npy, bool `[rounds, clients]`.

    Raises:
      ValueError: the file is not there, or holds something else, or the trace of another number of clients.
    """
    try:
        trace = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read a trace of availability from {str(file)!r}: {error}") from error
    is_trace = isinstance(trace, np.ndarray) and trace.dtype.kind == "b" and trace.ndim == 2 and len(trace) > 0
    if not is_trace or trace.shape[1] != num_clients:
        held = f"{trace.dtype} {list(trace.shape)}" if isinstance(trace, np.ndarray) else "several arrays"
        raise ValueError(f"{str(file)!r} holds {held}; expected bool [rounds, {num_clients}], a column for each client")
    return trace


def _check(cohort_size: int) -> None:
    if cohort_size < 1:
        raise ValueError(f"cohort_size must be at least 1, got {cohort_size}")


def _check_population(cohort_size: int, sizes: Array) -> int:
    if cohort_size > len(sizes):
        raise ValueError(f"a cohort of {cohort_size} is larger than the population of {len(sizes)} clients")
    return len(sizes)
