"""How client states come together by averaging: all of the state, the parameters alone, or what is shared of them.

Everything is built from `total`, so that each device may hold some of the clients and all come to the same server.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.types import Federation, Optimizer, PyTree, Total

Path = tuple[str, ...]
"""Where a leaf of a client's state is, such as `("params", "local", "picture")`."""

Merge = Callable[[Array, Array], Array]
"""`(server's leaf, clients' leaf [C, ...]) -> server's leaf`."""


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

    def aggregate(server: PyTree, ids: Array, clients: PyTree, weights: Array, total: Total) -> PyTree:
        del ids
        return jax.tree.map(_average(weights, total), server, clients)

    return Federation(
        init=lambda client: client,
        broadcast=lambda server, ids: _repeated(server, len(ids)),
        aggregate=aggregate,
        outcomes=lambda server: _repeated(server, 1),
        payload_bytes=lambda client: (num_bytes(client), num_bytes(client)),
    )


def weighted_mean_of_params(optimizer: Optimizer) -> Federation:
    """Returns FedAvg of the parameters alone: clients begin each round with the optimizer's initial state for them.

    Momenta, moments and an estimator's memory do not travel and last one round. Steps go on being counted, so that
    schedules do not restart; only the counts that correct the bias of moments (`optax.adam`'s) restart with these, or
    the first steps of a round would be 0.5 (after ten steps) to 6.5 times (after thousands) as long as Adam's. The
    server's state is a client's, whose leaves beside parameters and counters stay as they were at first, of no use.

    Source: McMahan et al., 2017, as `weighted_mean`; Wang et al., 2021, "Local Adaptivity in Federated Learning:
    Convergence and Consistency", which restarts the clients' optimizers each round.

    Args:
      optimizer: the clients', whose state has a field `params`.

    Example:
      >>> import optax
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> from fedbbpt_jax.estimators.spsa import spsa
      >>> from fedbbpt_jax.optimizers.descent import descent
      >>> optimizer = descent(spsa(rademacher(), 5, 0.05), optax.adam(0.03))
      >>> client = optimizer.init(jnp.zeros(7))
      >>> weighted_mean_of_params(optimizer).payload_bytes(client), weighted_mean().payload_bytes(client)
      ((28, 28), (84, 84))
    """

    def broadcast(server: PyTree, ids: Array) -> PyTree:
        fresh = jax.tree.map(_keep_counting, optimizer.init(server.params), server, is_leaf=_corrects_bias)
        return _repeated(fresh, len(ids))

    def aggregate(server: PyTree, ids: Array, clients: PyTree, weights: Array, total: Total) -> PyTree:
        del ids
        average = _average(weights, total)

        def merge(path: Path, old: Array, new: Array) -> Array:
            return average(old, new) if _in_params(path) or jnp.issubdtype(old.dtype, jnp.integer) else old

        return _map_with_path(merge, server, clients)

    def payload_bytes(client: PyTree) -> tuple[int, int]:
        return num_bytes(client.params), num_bytes(client.params)

    return Federation(
        init=lambda client: client,
        broadcast=broadcast,
        aggregate=aggregate,
        outcomes=lambda server: _repeated(server, 1),
        payload_bytes=payload_bytes,
    )


def partly_shared(num_clients: int, is_local: Callable[[Path], bool]) -> Federation:
    """Returns FedAvg of some leaves of the client's state, while the others stay with their client.

    Local leaves are `[num_clients, ...]` on the server and never travel; a client that has not taken part yet has the
    initial ones. Of those who take part in a round no two have the same id. With `is_local` one gets

    - `is_personal`: a prompt with a local part, and the optimizer's moments for it (`prompts/personal.py`);
    - `is_optimizer_state`: momenta, moments and counters that stay, so that schedules follow a client's own steps.

    Local moments of a client that joins late are young, while a counter that is averaged with the others' is old, and
    Adam corrects their bias by it: where not all clients take part in every round, give the local part a
    transformation of its own under that name, `optax.partition({"shared": ..., "local": ...}, ...)`.

    There is one outcome for each client if any of the parameters are local, otherwise one (with the first client's
    optimizer state, for want of a better).

    Source: Pillutla et al., 2022, "Federated Learning with Partial Model Personalization", FedSim (simultaneous
    updates); Arivazhagan et al., 2019, "Federated Learning with Personalization Layers".

    Args:
      num_clients: ids are 0 to num_clients - 1.
      is_local: of the path of a leaf, names from the root; "0", "1", ... within plain tuples.

    Raises:
      ValueError: there is no client.

    Example:
      >>> federation = partly_shared(3, is_local=is_personal)
      >>> server = federation.init({"shared": jnp.zeros(2), "local": jnp.zeros(2)})
      >>> server["shared"].shape, server["local"].shape
      ((2,), (3, 2))
    """
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")

    def init(client: PyTree) -> PyTree:
        return _map_with_path(lambda path, x: _rows(x, num_clients) if is_local(path) else x, client)

    def broadcast(server: PyTree, ids: Array) -> PyTree:
        return _map_with_path(lambda path, x: x[ids] if is_local(path) else _rows(x, len(ids)), server)

    def aggregate(server: PyTree, ids: Array, clients: PyTree, weights: Array, total: Total) -> PyTree:
        average, replace = _average(weights, total), _replace_rows(num_clients, ids, weights, total)
        return _map_with_path(
            lambda path, old, new: replace(old, new) if is_local(path) else average(old, new), server, clients
        )

    def outcomes(server: PyTree) -> PyTree:
        paths = _paths(server)
        apart = any(map(is_local, [p for p in paths if _in_params(p)] or paths))
        num_outcomes = num_clients if apart else 1
        return _map_with_path(lambda path, x: x[:num_outcomes] if is_local(path) else _rows(x, num_outcomes), server)

    def payload_bytes(client: PyTree) -> tuple[int, int]:
        leaves = zip(_paths(client), jax.tree.leaves(client), strict=True)
        size = num_bytes([leaf for path, leaf in leaves if not is_local(path)])
        return size, size

    return Federation(init, broadcast, aggregate, outcomes, payload_bytes)


def isolated(num_clients: int) -> Federation:
    """Returns the federation of clients that never talk: each keeps its own state from round to round.

    Raises:
      ValueError: there is no client.

    Example:
      >>> federation = isolated(3)
      >>> federation.payload_bytes(jnp.zeros(7))
      (0, 0)
    """
    return partly_shared(num_clients, is_local=lambda path: True)


def is_personal(path: Path) -> bool:
    """Returns whether a leaf belongs to the local part of a personal prompt, as parameters or moments of them.

    >>> is_personal(("params", "local", "picture")), is_personal(("transformation", "0", "mu", "shared", "picture"))
    (True, False)
    """
    return "local" in path


def is_optimizer_state(path: Path) -> bool:
    """Returns whether a leaf of a client's state is anything else than parameters.

    >>> is_optimizer_state(("params", "picture")), is_optimizer_state(("transformation", "0", "mu", "picture"))
    (False, True)
    """
    return not _in_params(path)


def num_bytes(tree: PyTree) -> int:
    """Returns the size of a state's numbers as raw bytes, without its integers: whoever knows the round can count."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in numbers)


def _average(weights: Array, total: Total) -> Merge:
    """Returns the mean by weight, `(old [...], new [C, ...]) -> [...]`; the old value if all weights are 0."""
    # The ratio of two sums, not a mean of means: right for unequal weights on any number of devices.
    all_weights = total(weights)

    def average(old: Array, new: Array) -> Array:
        weighted = jnp.where(_to_rank(weights > 0, new), _to_rank(weights, new) * new.astype(jnp.float32), 0.0)
        averaged = total(weighted) / jnp.where(all_weights > 0, all_weights, 1.0)
        if jnp.issubdtype(new.dtype, jnp.integer):
            averaged = jnp.round(averaged)
        return jnp.where(all_weights > 0, averaged.astype(new.dtype), old)

    return average


def _replace_rows(num_clients: int, ids: Array, weights: Array, total: Total) -> Merge:
    """Returns `(old [num_clients, ...], new [C, ...]) -> old` with the rows of those who took part replaced."""

    def gather(x: Array) -> Array:
        """Returns the sum over all clients of `[C, ...]`, each in the row of its id."""
        rows = jnp.zeros((num_clients, *x.shape[1:]), x.dtype).at[ids].add(x)
        return total(rows[None]).astype(x.dtype)

    took_part = weights > 0
    present = gather(took_part.astype(jnp.int32)) > 0

    def replace(old: Array, new: Array) -> Array:
        # Bits are added, not numbers: nothing is rounded and zeros keep their sign.
        bits = new.view(f"uint{8 * new.dtype.itemsize}")
        rows = gather(jnp.where(_to_rank(took_part, bits), bits, 0)).view(new.dtype)
        return jnp.where(_to_rank(present, rows), rows, old)

    return replace


def _keep_counting(fresh: PyTree, old: PyTree) -> PyTree:
    """Returns the old state's leaf if it is a step counter, otherwise the fresh one's."""
    return old if not _corrects_bias(fresh) and jnp.issubdtype(fresh.dtype, jnp.integer) else fresh


def _corrects_bias(state: PyTree) -> bool:
    """Returns whether a part of an optimizer's state is one of optax's that count the steps their moments have seen."""
    fields = set(getattr(state, "_fields", ()))
    return "count" in fields and not fields.isdisjoint({"mu", "nu", "ema"})


def _in_params(path: Path) -> bool:
    return path[:1] == ("params",)


def _repeated(tree: PyTree, times: int) -> PyTree:
    return jax.tree.map(lambda x: _rows(x, times), tree)


def _rows(x: Array, times: int) -> Array:
    return jnp.broadcast_to(x, (times, *x.shape))


def _paths(tree: PyTree) -> list[Path]:
    return [_names(path) for path, _ in jax.tree.leaves_with_path(tree)]


def _names(path: jax.tree_util.KeyPath) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _map_with_path(function: Callable[..., Array], *trees: PyTree) -> PyTree:
    return jax.tree.map_with_path(lambda path, *leaves: function(_names(path), *leaves), *trees)


def _to_rank(vector: Array, like: Array) -> Array:
    """Returns `vector` `[C]` as `[C, 1, ...]` of the rank of `like`."""
    return vector.reshape(-1, *[1] * (like.ndim - 1))
