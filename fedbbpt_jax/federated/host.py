"""Rounds whose loops are Python's, around an evaluation on the host: of a served box, or of data that stay there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.federated.cohort import ClientData, draw_cohort
from fedbbpt_jax.federated.participation import Participation
from fedbbpt_jax.federated.placement import RunRounds, check_sizes
from fedbbpt_jax.federated.round import Evaluate, RoundInfo, candidate_prompt, federated_round, response_losses
from fedbbpt_jax.types import BlackBox, Cohort, EstimateInfo, Examples, Method, Optimizer, PyTree, Query

Evaluation = Callable[[BlackBox, Examples, Sequence[Cohort]], Evaluate]
"""`(box, all clients' examples, cohorts of the rounds to come) -> evaluation of these, step by step`."""


def host_rounds(method: Method, participation: Participation, *, local_steps: int, batch_size: int) -> RunRounds:
    """Returns rounds around a box that is called on the host with whole arrays: one query for each local step.

    Asking and telling are compiled, the loops over rounds and steps are Python's. Clients that do not come are not
    asked.

    Args:
      method: as for `compile_rounds`, and so are the sizes.
      participation: who takes part.

    Raises:
      ValueError: a size is not positive; whatever the box raises passes through.
    """

    @partial(jax.jit, static_argnums=0)
    def prompts(optimizer: Optimizer, keys: Array, states: PyTree, features: Array) -> PyTree:
        asking, ks = method._replace(optimizer=optimizer), jnp.arange(optimizer.num_candidates)
        over_candidates = jax.vmap(partial(candidate_prompt, asking), (None, None, 0, None))
        return jax.vmap(over_candidates, (0, 0, None, 0))(keys, states, ks, features)

    losses, view = jax.jit(partial(response_losses, method)), jax.jit(jax.vmap(method.view))

    def evaluate(box: BlackBox, examples: Examples, optimizer: Optimizer, keys: Array, states: PyTree, *rest):
        rows, taking_part = rest
        batches = view(keys, jax.tree.map(lambda x: jnp.asarray(x[rows]), examples))
        shape = (len(keys), optimizer.num_candidates, batches.labels.shape[1])
        present = jnp.flatnonzero(taking_part)
        if len(present) == 0:
            return jnp.zeros(shape), jnp.zeros(shape, bool)
        keys, states, batches = jax.tree.map(lambda x: x[present], (keys, states, batches))
        response = box(Query(prompts(optimizer, keys, states, batches.features), batches.inputs))
        found, valid = losses(jax.tree.map(jnp.asarray, response), batches.labels)
        return jnp.zeros(shape).at[present].set(found), jnp.zeros(shape, bool).at[present].set(valid)

    def evaluation(box: BlackBox, examples: Examples, cohorts: Sequence[Cohort]) -> Evaluate:
        del cohorts
        return partial(evaluate, box, examples)

    return looped_rounds(method, participation, evaluation, local_steps=local_steps, batch_size=batch_size)


def looped_rounds(
    method: Method, participation: Participation, evaluation: Evaluation, *, local_steps: int, batch_size: int
) -> RunRounds:
    """Returns rounds in a loop of Python's: all but the evaluation is compiled, piece by piece.

    Args:
      method: as for `compile_rounds`, and so are the sizes.
      participation: who takes part.
      evaluation: fills the hole of the round body; it is made anew for each call, and told what will be asked.

    Raises:
      ValueError: a size is not positive.
    """
    check_sizes(local_steps=local_steps, batch_size=batch_size)
    tell, aggregate = jax.jit(method.optimizer.tell), jax.jit(method.federation.aggregate, static_argnums=4)
    pieces = method._replace(
        optimizer=method.optimizer._replace(tell=tell), federation=method.federation._replace(aggregate=aggregate)
    )

    @jax.jit
    def draw(key: Array, index: Array, clients: ClientData) -> tuple[Cohort, Array]:
        cohort_key, client_key = jax.random.split(jax.random.fold_in(key, index))
        return draw_cohort(cohort_key, index, clients, participation, local_steps, batch_size), client_key

    def run_rounds(box: BlackBox, server: PyTree, clients: ClientData, key: Array, rounds: Array):
        without_examples = clients._replace(examples=())
        drawn = {i: draw(key, index, without_examples) for i, index in enumerate(map(int, rounds)) if index >= 0}
        evaluate = evaluation(box, clients.examples, [cohort for cohort, _ in drawn.values()])
        infos = [RoundInfo(EstimateInfo(*jnp.zeros(3)), *jnp.zeros(4, jnp.int32))] * len(rounds)
        for i, (cohort, client_key) in drawn.items():
            server, infos[i] = federated_round(pieces, evaluate, client_key, server, cohort, scan=_loop)
        return server, jax.tree.map(lambda *x: jnp.stack(x), *infos)

    return run_rounds


def _loop(body: Callable, carry: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
    """Returns what `jax.lax.scan` returns, by a loop of Python's."""
    found = []
    for i in range(len(jax.tree.leaves(rows)[0])):
        carry, out = body(carry, jax.tree.map(lambda x, i=i: x[i], rows))
        found.append(out)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *found)
