"""The only round body: broadcast, [ask, generate, query, lose, tell] x T, aggregate.

It has one hole, `evaluate`, and one sum, `total`. A placement fills both; it never changes this text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.types import BlackBox, Cohort, EstimateInfo, Examples, Method, PyTree, Query, Total

Evaluate = Callable[[Array, PyTree, Examples], tuple[Array, Array]]
"""`(keys [C], optimizer states [C, ...], batches [C, B, ...]) -> losses [C, K, B], valid [C, K, B]`."""


class RoundInfo(NamedTuple):
    """What happened in one round.

    Attributes:
      step: estimates' diagnostics, mean over the cohort by weight.
      num_evaluations: prompts tried on a minibatch, int32.
      num_requests: prompts tried on an example, int32; what an API bills.
      num_valid: requests that had a usable answer, int32.
    """

    step: EstimateInfo
    num_evaluations: Array
    num_requests: Array
    num_valid: Array


def federated_round(
    method: Method, evaluate: Evaluate, total: Total, key: Array, server: PyTree, cohort: Cohort
) -> tuple[PyTree, RoundInfo]:
    """Returns the server's state after one round, and what happened.

    Args:
      method: generator, objective, optimizer and federation.
      evaluate: the hole: losses of every candidate of every client.
      total: sums over all clients.
      key: of this round; client i uses `fold_in(key, id of i)`.
      server: the server's state.
      cohort: who takes part and on what.
    """
    optimizer, federation = method.optimizer, method.federation
    taking_part = cohort.weights > 0
    client_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, cohort.ids)

    def local_step(states: PyTree, row: tuple[Array, Examples]) -> tuple[PyTree, tuple[EstimateInfo, Array]]:
        step, batches = row
        keys = jax.vmap(jax.random.fold_in, (0, None))(client_keys, step)
        losses, valid = evaluate(keys, states, batches)
        states, info = jax.vmap(optimizer.tell)(keys, states, losses, valid)
        return states, (info, (valid & taking_part[:, None, None]).sum((1, 2)))

    batches = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), cohort.batches)  # [T, C, B, ...]
    num_steps, _, batch_size = batches.labels.shape
    clients, (info, num_valid) = jax.lax.scan(
        local_step, federation.broadcast(server, cohort.ids), (jnp.arange(num_steps), batches)
    )
    server = federation.aggregate(server, cohort.ids, clients, cohort.weights, total)

    num_evaluations = total(taking_part.astype(jnp.int32)) * num_steps * optimizer.num_candidates
    share = cohort.weights / jnp.maximum(total(cohort.weights), 1e-9)
    step = jax.tree.map(lambda x: total(x.mean(0) * share), info)
    return server, RoundInfo(step, num_evaluations, num_evaluations * batch_size, total(num_valid.sum(0)))


def candidate_loss(
    method: Method, box: BlackBox, key: Array, state: PyTree, k: Array, batch: Examples
) -> tuple[Array, Array]:
    """Returns the losses float32 `[B]` of candidate k of one client, and where they are valid, bool `[B]`."""
    prompt = method.generator.generate(method.optimizer.ask(key, state, k), batch.features)
    response = box(Query(jax.tree.map(lambda x: x[None, None], prompt), jax.tree.map(lambda x: x[None], batch.inputs)))
    scores, valid = response.scores[0, 0], response.valid[0, 0]
    # A score that is not valid may be anything; the inner `where` keeps it out of the loss, the outer out of sums.
    losses = method.objective(jnp.where(valid[:, None], scores, 0.0), batch.labels)
    return jnp.where(valid, losses, 0.0), valid
