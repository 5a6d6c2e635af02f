"""The private data of all clients, and the minibatches of those who take part in a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedbbpt_jax.federated.participation import Participation
from fedbbpt_jax.types import Cohort, Examples


class ClientData(NamedTuple):
    """The private data of all clients, one after the other: no example is stored twice, none is padded.

    Attributes:
      examples: `[shards·n, ...]`, one shard for each device that holds clients.
      starts: int32 `[clients]`, the row of its shard where a client's examples begin.
      sizes: int32 `[clients]`.
      places: int32 `[capacity]`, 0, 1, ...; as long as the longest client, rounded up to a multiple of 32, so that
        the splits of other seeds mostly share one compilation.
    """

    examples: Examples
    starts: Array
    sizes: Array
    places: Array


def pack(examples: Examples, parts: Sequence[np.ndarray], num_shards: int = 1) -> ClientData:
    """Returns the data of clients that hold the rows `parts[i]` of `examples`; these stay in the host's memory.

    Shards hold clients in their order, `clients_per_shard` each, and are padded to the longest shard.

    Raises:
      ValueError: a client holds nothing, or there are more shards than clients.
    """
    sizes = np.array([len(part) for part in parts], np.int32)
    if not sizes.all():
        raise ValueError(f"client {np.argmin(sizes)} holds no example")
    if num_shards > len(parts):
        raise ValueError(f"{len(parts)} clients cannot be spread over {num_shards} devices")
    held = clients_per_shard(len(parts), num_shards)
    shards = [list(parts[s * held : (s + 1) * held]) for s in range(num_shards)]
    length = max(sum(map(len, shard)) for shard in shards)
    rows = np.concatenate([np.resize(np.concatenate(shard or parts[:1]), length) for shard in shards])
    starts = np.concatenate([np.cumsum([0, *map(len, shard[:-1])]) for shard in shards if shard]).astype(np.int32)
    places = np.arange(-(-sizes.max() // 32) * 32, dtype=np.int32)
    held_by_clients = jax.tree.map(lambda x: np.asarray(x)[rows], examples)
    return ClientData(held_by_clients, *map(jnp.asarray, (starts, sizes, places)))


def clients_per_shard(num_clients: int, num_shards: int) -> int:
    """Returns how many clients a shard holds at most; client i is in shard i // this."""
    return -(-num_clients // num_shards)


def own_rows(clients: ClientData, client: Array) -> Array:
    """Returns the rows of its shard that a client holds, `[capacity]`; those past its size repeat its own."""
    return clients.starts[client] + clients.places % clients.sizes[client]


def draw_cohort(
    key: Array, index: Array, clients: ClientData, participation: Participation, local_steps: int, batch_size: int
) -> Cohort:
    """Returns the cohort of a round with its minibatches.

    Args:
      key: of this round.
      index: of this round.
      clients: all of them.
      participation: who takes part.
      local_steps: T.
      batch_size: B.
    """
    cohort_key, data_key = jax.random.split(key)
    ids, weights = participation.draw(cohort_key, index, clients.sizes)
    return Cohort(ids, weights, draw_rows(data_key, clients, ids, local_steps, batch_size))


def draw_rows(key: Array, clients: ClientData, ids: Array, local_steps: int, batch_size: int) -> Array:
    """Returns the rows of clients' minibatches in their shards, int32 `[C, T, B]`.

    Within a round each client's examples come in shuffled passes: none a second time before all came once. What a
    client draws depends on its id alone, not on who else takes part.
    """

    def rows(client: Array) -> Array:
        size = clients.sizes[client]
        draws = jax.random.uniform(jax.random.fold_in(key, client), clients.places.shape)
        order = jnp.argsort(jnp.where(clients.places < size, draws, jnp.inf))  # own rows first, shuffled
        return clients.starts[client] + order[jnp.arange(local_steps * batch_size) % size]

    return jax.vmap(rows)(ids).reshape(len(ids), local_steps, batch_size)
