"""Who takes part in a round, and on which minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedbbpt_jax.types import Cohort, Examples


class ClientData(NamedTuple):
    """The private data of all clients, packed to one shape.

    Attributes:
      examples: `[clients, n, ...]`; rows past a client's size repeat its own.
      sizes: int32 `[clients]`.
    """

    examples: Examples
    sizes: Array


def pack(examples: Examples, parts: Sequence[np.ndarray]) -> ClientData:
    """Returns the data of clients that hold the rows `parts[i]` of `examples`.

    Clients are padded to the longest one, rounded up to a multiple of 32, so that the splits of other seeds mostly
    share one compilation.

    Raises:
      ValueError: a client holds nothing.
    """
    for i, part in enumerate(parts):
        if len(part) == 0:
            raise ValueError(f"client {i} holds no example")
    longest = max(len(part) for part in parts)
    capacity = -(-longest // 32) * 32
    rows = np.stack([np.resize(part, capacity) for part in parts])  # [clients, n]
    sizes = jnp.asarray([len(part) for part in parts], jnp.int32)
    return ClientData(jax.tree.map(lambda x: jnp.asarray(x)[rows], examples), sizes)


def draw_cohort(key: Array, clients: ClientData, cohort_size: int, local_steps: int, batch_size: int) -> Cohort:
    """Returns a uniform cohort without replacement, weighted by data size.

    Within a round each client's examples come in shuffled passes: none a second time before all came once.

    Args:
      key: of this round.
      clients: all of them.
      cohort_size: C.
      local_steps: T.
      batch_size: B.
    """
    cohort_key, data_key = jax.random.split(key)
    num_clients = len(clients.sizes)
    ids = jnp.arange(num_clients)
    if cohort_size < num_clients:
        ids = jnp.sort(jax.random.choice(cohort_key, num_clients, (cohort_size,), replace=False))

    def batches(client: Array) -> Examples:
        size = clients.sizes[client]
        capacity = clients.examples.labels.shape[1]
        draws = jax.random.uniform(jax.random.fold_in(data_key, client), (capacity,))
        order = jnp.argsort(jnp.where(jnp.arange(capacity) < size, draws, jnp.inf))  # own rows first, shuffled
        chosen = order[jnp.arange(local_steps * batch_size) % size].reshape(local_steps, batch_size)
        return jax.tree.map(lambda x: x[client, chosen], clients.examples)

    return Cohort(ids, clients.sizes[ids].astype(jnp.float32), jax.vmap(batches)(ids))
