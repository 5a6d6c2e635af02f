"""How client states come together: FedAvg, and clients that stay apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.types import Federation, PyTree, Total


def weighted_mean() -> Federation:
    r"""Returns FedAvg: $\sum_i w_i x_i / \sum_i w_i$ over every leaf of the client's state.

    Momenta and moments are averaged with the parameters and travel with them; step counters, equal on all clients, are
    their own mean and need not travel. A round whose weights are all 0 leaves the server as it was.

    Source: McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    Algorithm 1.

    Example:
      >>> federation, total = weighted_mean(), lambda x: x.sum(0)
      >>> clients, weights = jnp.array([1.0, 5.0]), jnp.array([3.0, 1.0])
      >>> federation.aggregate(jnp.zeros(()), jnp.arange(2), clients, weights, total)
      Array(2., dtype=float32)
    """

    def broadcast(server: PyTree, ids: Array) -> PyTree:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(ids), *x.shape)), server)

    def aggregate(server: PyTree, ids: Array, clients: PyTree, weights: Array, total: Total) -> PyTree:
        del ids
        # The ratio of two sums, not a mean of means: right for unequal weights on any number of devices.
        all_weights = total(weights)

        def mean(old: Array, x: Array) -> Array:
            weighted = jnp.where(_to_rank(weights > 0, x), _to_rank(weights, x) * x.astype(jnp.float32), 0.0)
            averaged = total(weighted) / jnp.where(all_weights > 0, all_weights, 1.0)
            if jnp.issubdtype(x.dtype, jnp.integer):
                averaged = jnp.round(averaged)
            return jnp.where(all_weights > 0, averaged.astype(x.dtype), old)

        return jax.tree.map(mean, server, clients)

    return Federation(
        init=lambda client: client,
        broadcast=broadcast,
        aggregate=aggregate,
        outcomes=lambda server: jax.tree.map(lambda x: x[None], server),
        payload_bytes=lambda client: (num_bytes(client), num_bytes(client)),
    )


def isolated(num_clients: int) -> Federation:
    """Returns the federation of clients that never talk: each keeps its own state from round to round.

    Example:
      >>> federation = isolated(3)
      >>> federation.payload_bytes(jnp.zeros(7))
      (0, 0)
    """

    def aggregate(server: PyTree, ids: Array, clients: PyTree, weights: Array, total: Total) -> PyTree:
        del total
        took_part = weights > 0
        return jax.tree.map(
            lambda old, new: old.at[ids].set(jnp.where(_to_rank(took_part, new), new, old[ids])), server, clients
        )

    return Federation(
        init=lambda client: jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)), client),
        broadcast=lambda server, ids: jax.tree.map(lambda x: x[ids], server),
        aggregate=aggregate,
        outcomes=lambda server: server,
        payload_bytes=lambda client: (0, 0),
    )


def num_bytes(tree: PyTree) -> int:
    """Returns the size of a state's numbers as raw bytes, without its integers: whoever knows the round can count."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in numbers)


def _to_rank(vector: Array, like: Array) -> Array:
    """Returns `vector` `[C]` as `[C, 1, ...]` of the rank of `like`."""
    return vector.reshape(-1, *[1] * (like.ndim - 1))
