"""Rounds as one compiled program: on one device, over a mesh of devices, or many runs at once.

All play the same round body with the same draws, and so do `host.py` and `streaming.py`: client i's keys, minibatches
and directions are functions of its id. So they agree to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from fedbbpt_jax.federated.cohort import ClientData, clients_per_shard, draw_cohort, draw_rows
from fedbbpt_jax.federated.mesh import CLIENTS, RUNS
from fedbbpt_jax.federated.participation import Participation
from fedbbpt_jax.federated.round import (
    Evaluate,
    RoundInfo,
    candidate_prompt,
    federated_round,
    response_losses,
)
from fedbbpt_jax.types import BlackBox, Cohort, Examples, Method, Optimizer, PyTree, Query

RunRounds = Callable[[BlackBox, PyTree, ClientData, Array, Array], tuple[PyTree, RoundInfo]]
"""`(box, server, clients, key, rounds [R]) -> (server, RoundInfo [R])`; a negative round number is skipped, so that
segments of unequal length share one compilation."""
RunSweep = Callable[[BlackBox, PyTree, PyTree, ClientData, Array, Array], tuple[PyTree, RoundInfo]]
"""`(box, choices [S, ...], servers [S, ...], clients [S, ...], keys [S], rounds [R]) -> (servers, RoundInfo [S, R])`"""
OneRound = Callable[[BlackBox, ClientData, Array, PyTree, Array], tuple[PyTree, RoundInfo]]


def compile_rounds(
    method: Method, participation: Participation, *, local_steps: int, batch_size: int, chunk_size: int = 16
) -> RunRounds:
    """Returns rounds as one compiled program on one device.

    Clients are vmapped, candidates of all clients are mapped in chunks, local steps and rounds are scanned. The box's
    weights and the clients' data enter as arguments.

    Args:
      method: generator, objective, optimizer and federation.
      participation: who takes part.
      local_steps: T, steps between two aggregations.
      batch_size: B, examples per step.
      chunk_size: candidates in flight at once. Memory grows with chunk_size·B, not with C·K; the default is the
        fastest of those measured on CPU, where the work of a chunk should stay in the cache.

    Raises:
      ValueError: a size is not positive.
    """
    check_sizes(local_steps=local_steps, batch_size=batch_size, chunk_size=chunk_size)

    one_round = _one_round(method, participation, local_steps, batch_size, chunk_size)

    @jax.jit
    def run_rounds(box: BlackBox, server: PyTree, clients: ClientData, key: Array, rounds: Array):
        return _scan_rounds(one_round, box, server, clients, key, rounds)

    return run_rounds


def sweep_rounds(
    build: Callable[[PyTree], Method],
    participation: Participation,
    mesh: Mesh,
    *,
    local_steps: int,
    batch_size: int,
    chunk_size: int = 16,
) -> RunSweep:
    """Returns rounds of S runs as one compiled program, over as many devices as divide S.

    Runs may differ in their data, their seeds and the numbers that `build` makes a method from, such as a step size.

    Args:
      build: `choices -> method`; the choices are arrays.
      participation: who takes part.
      mesh: of one axis "runs" (`make_mesh`), over which the runs are spread.
      local_steps: as for `compile_rounds`, and so is the other size.
      chunk_size: candidates in flight at once, of all runs of a device.

    Raises:
      ValueError: a size is not positive.
    """
    check_sizes(local_steps=local_steps, batch_size=batch_size, chunk_size=chunk_size)

    def run_all(box: BlackBox, choices: PyTree, servers: PyTree, clients: ClientData, keys: Array, rounds: Array):
        own_chunk = max(1, chunk_size // len(keys))

        def run_one(choice: PyTree, server: PyTree, clients: ClientData, key: Array):
            one_round = _one_round(build(choice), participation, local_steps, batch_size, own_chunk)
            return _scan_rounds(one_round, box, server, clients, key, rounds)

        return jax.vmap(run_one)(choices, servers, clients, keys)

    alike, apart = PartitionSpec(), PartitionSpec(RUNS)
    specs = alike, apart, apart, apart, apart, alike
    # Runs know nothing of each other: nothing is summed over them, so there is no replication to be checked.
    return jax.jit(jax.shard_map(run_all, mesh=mesh, in_specs=specs, out_specs=apart, check_vma=False))


def shard_rounds(
    method: Method,
    participation: Participation,
    mesh: Mesh,
    *,
    local_steps: int,
    batch_size: int,
    chunk_size: int = 16,
) -> RunRounds:
    """Returns rounds as one compiled program over a mesh; the clients' examples never leave their device.

    Every device draws the same cohort and plays those of its clients that are in it, at most as many as it holds; the
    free places are of weight 0 and are not asked. Sums over clients are sums over devices too, so that unequal weights
    come out right: a weighted mean is the ratio of two `jax.lax.psum`s. `jax.lax.pmean` of the devices' own means is
    that number only where all devices play clients of the same weight in all, which a program cannot know beforehand,
    since cohorts, drop-out and sizes are data. The server's state is the same everywhere, which JAX's replication
    check proves.

    Args:
      method: as for `compile_rounds`, and so are the sizes.
      participation: who takes part.
      mesh: of one axis "clients" (`make_mesh`); `place_clients` and `replicate` put data and weights on it.

    Raises:
      ValueError: a size is not positive.
    """
    check_sizes(local_steps=local_steps, batch_size=batch_size, chunk_size=chunk_size)

    def total(x: Array) -> Array:
        return jax.lax.psum(x.sum(0), CLIENTS)

    def broadcast(server: PyTree, ids: Array) -> PyTree:
        return jax.tree.map(_varying, method.federation.broadcast(server, ids))

    spread = method._replace(federation=method.federation._replace(broadcast=broadcast))

    def one_round(box: BlackBox, clients: ClientData, key: Array, server: PyTree, index: Array):
        cohort_key, client_key = jax.random.split(jax.random.fold_in(key, index))
        cohort = draw_own_cohort(cohort_key, index, clients)
        evaluate = evaluation_in_chunks(method, box, clients.examples, chunk_size, _varying)
        return federated_round(spread, evaluate, client_key, server, cohort, total=total)

    def draw_own_cohort(key: Array, index: Array, clients: ClientData) -> Cohort:
        cohort_key, data_key = jax.random.split(key)
        ids, weights = participation.draw(cohort_key, index, clients.sizes)
        held = clients_per_shard(len(clients.sizes), mesh.shape[CLIENTS])
        own = (ids // held == jax.lax.axis_index(CLIENTS)) & (weights > 0)
        places = jnp.nonzero(own, size=min(held, len(ids)), fill_value=len(ids))[0]
        # A free place repeats a client; whose rows it names is of no matter, nobody is asked.
        ids, weights = ids.at[places].get(mode="clip"), weights.at[places].get(mode="fill", fill_value=0.0)
        return Cohort(ids, weights, draw_rows(data_key, clients, ids, local_steps, batch_size))

    everywhere = PartitionSpec()
    spread_out = ClientData._make([PartitionSpec(CLIENTS), everywhere, everywhere, everywhere])
    specs = everywhere, everywhere, spread_out, everywhere, everywhere

    def run_rounds(box: BlackBox, server: PyTree, clients: ClientData, key: Array, rounds: Array):
        return _scan_rounds(one_round, box, server, clients, key, rounds)

    return jax.jit(jax.shard_map(run_rounds, mesh=mesh, in_specs=specs, out_specs=everywhere))


def _one_round(
    method: Method, participation: Participation, local_steps: int, batch_size: int, chunk_size: int
) -> OneRound:
    def one_round(box: BlackBox, clients: ClientData, key: Array, server: PyTree, index: Array):
        cohort_key, client_key = jax.random.split(jax.random.fold_in(key, index))
        cohort = draw_cohort(cohort_key, index, clients, participation, local_steps, batch_size)
        evaluate = evaluation_in_chunks(method, box, clients.examples, chunk_size)
        return federated_round(method, evaluate, client_key, server, cohort)

    return one_round


def _scan_rounds(one_round: OneRound, box: BlackBox, server: PyTree, clients: ClientData, key: Array, rounds: Array):
    def play(server: PyTree, index: Array) -> tuple[PyTree, RoundInfo]:
        return one_round(box, clients, key, server, index)

    def skip(server: PyTree, index: Array) -> tuple[PyTree, RoundInfo]:
        _, info = jax.eval_shape(play, server, index)
        return server, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info)

    def play_or_skip(server: PyTree, index: Array) -> tuple[PyTree, RoundInfo]:
        return jax.lax.cond(index >= 0, play, skip, server, index)

    return jax.lax.scan(play_or_skip, server, rounds)


def evaluation_in_chunks(
    method: Method, box: BlackBox, examples: Examples, chunk_size: int, vary: Callable[[Array], Array] = lambda x: x
) -> Evaluate:
    """Returns an evaluation that makes candidates, turns them into prompts and queries them chunk by chunk.

    A chunk of which nobody takes part is skipped; `vary` gives its zeros the type of what the others answer.
    """

    def evaluate(optimizer: Optimizer, keys: Array, states: PyTree, rows: Array, taking_part: Array):
        num_candidates, asking = optimizer.num_candidates, method._replace(optimizer=optimizer)

        def one(place: Array) -> tuple[Array, Array]:
            client, k = place // num_candidates, place % num_candidates
            state = jax.tree.map(lambda x: x[client], states)
            batch = method.view(keys[client], jax.tree.map(lambda x: x[rows[client]], examples))
            prompt = candidate_prompt(asking, keys[client], state, k, batch.features)
            # One client and one candidate: the box's axes C and K are 1 here, and JAX batches over the chunk.
            batch, prompt = jax.tree.map(lambda x: x[None], (batch, jax.tree.map(lambda x: x[None], prompt)))
            losses = response_losses(method, box(Query(prompt, batch.inputs)), batch.labels)
            return jax.tree.map(lambda x: x[0, 0], losses)

        def nobody(places: Array) -> tuple[Array, Array]:
            answers = jax.eval_shape(jax.vmap(one), places)
            return jax.tree.map(lambda x: vary(jnp.zeros(x.shape, x.dtype)), answers)

        def chunk(places: Array) -> tuple[Array, Array]:
            return jax.lax.cond(taking_part[places // num_candidates].any(), jax.vmap(one), nobody, places)

        places = jnp.arange(len(keys) * num_candidates)
        found = jax.lax.map(chunk, places.reshape(-1, _even_chunk(len(places), chunk_size)))
        return jax.tree.map(lambda x: x.reshape(len(keys), num_candidates, -1), found)

    return evaluate


def _varying(x: Array) -> Array:
    """Returns an array that may differ between devices, as the local steps' states do."""
    return jnp.where(jax.lax.axis_index(CLIENTS) >= 0, x, x)  # `jax.lax.pcast` refuses what varies already


def _even_chunk(num_rows: int, chunk_size: int) -> int:
    """Returns the chunk size up to `chunk_size` that splits the rows into fewest, most even chunks.

    An exact division compiles one body instead of a second one for the remainder.

    >>> _even_chunk(50, 8), _even_chunk(50, 16), _even_chunk(7, 8)
    (5, 10, 7)
    """
    return max(size for size in range(1, min(chunk_size, num_rows) + 1) if num_rows % size == 0)


def check_sizes(**sizes: int) -> None:
    """Raises ValueError where a size is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
