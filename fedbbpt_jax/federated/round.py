"""The only round body: broadcast, [ask, generate, query, lose, tell] x T, aggregate.

It has one hole, `evaluate`; what it sums with and loops with, `total` and `scan`, depend on where it runs. A placement
fills them; it never changes this text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.types import Cohort, EstimateInfo, Method, Optimizer, PyTree, Response, Total

Evaluate = Callable[[Optimizer, Array, PyTree, Array, Array], tuple[Array, Array]]
"""`(optimizer, keys [C], states [C, ...], rows [C, B], taking part [C]) -> losses [C, K, B'], valid [C, K, B']` of the
optimizer's candidates on the B' examples of the method's view; those who do not take part need not be asked."""
Scan = Callable[[Callable, PyTree, PyTree], tuple[PyTree, PyTree]]
"""`jax.lax.scan`, or the same as a loop where the evaluation cannot be traced."""


class RoundInfo(NamedTuple):
    """What happened in one round.

    Attributes:
      step: estimates' diagnostics, mean over the cohort by weight.
      num_clients: that took part, int32; each was sent the server's payload and sent its own back.
      num_evaluations: prompts tried on B examples, int32.
      num_requests: prompts tried on an example, int32; what an API bills.
      num_valid: requests that had a usable answer, int32.
    """

    step: EstimateInfo
    num_clients: Array
    num_evaluations: Array
    num_requests: Array
    num_valid: Array


def sum_over_clients(x: Array) -> Array:
    """Returns the sum over the leading axis."""
    return x.sum(0)


def federated_round(
    method: Method,
    evaluate: Evaluate,
    key: Array,
    server: PyTree,
    cohort: Cohort,
    *,
    total: Total = sum_over_clients,
    scan: Scan = jax.lax.scan,
) -> tuple[PyTree, RoundInfo]:
    """Returns the server's state after one round, and what happened.

    Args:
      method: generator, objective, optimizer and federation.
      evaluate: the hole: losses of every candidate of every client.
      key: of this round; client i uses `fold_in(key, id of i)`.
      server: the server's state.
      cohort: who takes part and on what.
      total: sums over all clients, wherever they are.
      scan: loops over the local steps.
    """
    optimizer, federation = method.optimizer, method.federation
    taking_part = cohort.weights > 0
    client_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, cohort.ids)

    def ask_about(optimizer: Optimizer, step: Array | int, states: PyTree, rows: Array):
        keys = jax.vmap(jax.random.fold_in, (0, None))(client_keys, step)
        losses, valid = evaluate(optimizer, keys, states, rows, taking_part)
        asked = jnp.broadcast_to(taking_part[:, None, None], valid.shape)
        return keys, losses, valid, jnp.stack([asked, valid & asked]).sum((2, 3))  # counts [2, C]

    def local_step(states: PyTree, row: tuple[Array, Array]) -> tuple[PyTree, tuple[EstimateInfo, Array]]:
        keys, losses, valid, counts = ask_about(optimizer, row[0], states, row[1])
        states, info = jax.vmap(optimizer.tell)(keys, states, losses, valid)
        return states, (info, counts)

    rows = jnp.moveaxis(cohort.rows, 1, 0)  # [T, C, B]
    num_steps, _, batch_size = rows.shape
    clients, (info, counts) = scan(local_step, federation.broadcast(server, cohort.ids), (jnp.arange(num_steps), rows))
    counts = counts.sum(0)
    if federation.report is not None:
        _, losses, valid, more = ask_about(_solution_alone(optimizer), num_steps, clients, rows[-1])
        clients, counts = jax.vmap(federation.report)(clients, losses[:, 0], valid[:, 0]), counts + more
    server = federation.aggregate(server, cohort.ids, clients, cohort.weights, total)

    share = cohort.weights / jnp.maximum(total(cohort.weights), 1e-9)
    step = jax.tree.map(lambda x: total(x.mean(0) * share), info)
    num_requests, num_valid = total(counts.T)
    num_clients = total(taking_part.astype(jnp.int32))
    return server, RoundInfo(step, num_clients, num_requests // batch_size, num_requests, num_valid)


@functools.lru_cache(maxsize=16)  # so that what was compiled for it is found again
def _solution_alone(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer whose only candidate is its solution."""
    return optimizer._replace(ask=lambda key, state, k: optimizer.solution(state), num_candidates=1)


def candidate_prompt(method: Method, key: Array, state: PyTree, k: Array, features: Array) -> PyTree:
    """Returns the prompt of candidate k of one client, for the features `[B, F]` of its minibatch."""
    return method.generator.generate(method.optimizer.ask(key, state, k), features)


def response_losses(method: Method, response: Response, labels: Array) -> tuple[Array, Array]:
    """Returns the losses float32 `[C, K, B]` of a response to labels `[C, B]`, and where they are valid, bool."""
    scores, valid = response
    # A score that is not valid may be anything; the inner `where` keeps it out of the loss, the outer out of sums.
    labels = jnp.broadcast_to(labels[:, None], valid.shape)
    losses = method.objective(jnp.where(valid[..., None], scores, 0.0), labels)
    return jnp.where(valid, losses, 0.0), valid
