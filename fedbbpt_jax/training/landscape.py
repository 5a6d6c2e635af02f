"""The loss of a prompt on clients' data through a frozen model, as the laboratory wants it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.black_box.faults import Answer
from fedbbpt_jax.estimators.variance import Landscape
from fedbbpt_jax.federated.cohort import ClientData, own_rows
from fedbbpt_jax.types import BlackBox, Examples, Objective, Params, PromptGenerator, Query


def task_landscape(
    generator: PromptGenerator,
    objective: Objective,
    classifier: BlackBox,
    clients: ClientData,
    params: Params,
    *,
    batch_size: int,
    answer: Answer,
    images_in_flight: int = 64,
) -> Landscape:
    """Returns the landscape of a prompt generator's parameters.

    Args:
      generator: parameters to prompt.
      objective: the loss.
      classifier: the frozen model, differentiable: the true gradient is by autodiff.
      clients: their data; a client is drawn by its share of it.
      params: the point.
      batch_size: B, examples of a minibatch, without replacement as far as a client has so many.
      answer: what the API does to its scores.
      images_in_flight: examples that go through the model at once.
    """
    clients = jax.tree.map(jnp.asarray, clients)
    weights = clients.sizes / clients.sizes.sum()
    chunk_size = max(1, images_in_flight // batch_size)
    capacity = len(clients.places)

    def draw(key: Array) -> tuple[Array, Array]:
        client_key, row_key = jax.random.split(key)
        client = jax.random.choice(client_key, len(weights), p=weights)
        size = clients.sizes[client]
        own = jnp.arange(capacity) < size
        order = jnp.argsort(jnp.where(own, jax.random.uniform(row_key, (capacity,)), jnp.inf))
        return client, order[jnp.arange(batch_size) % size]

    def scores(box: BlackBox, params: Params, batch: Examples) -> Array:
        prompt = generator.generate(params, batch.features)
        query = Query(jax.tree.map(lambda x: x[None, None], prompt), jax.tree.map(lambda x: x[None], batch.inputs))
        return box(query).scores[0, 0]

    def mean_loss(params: Params, box: BlackBox, batch: Examples, counted: Array) -> Array:
        losses = objective(scores(box, params, batch), batch.labels)
        return (losses * counted).sum() / counted.sum()

    def take(data: ClientData, client: Array, rows: Array) -> Examples:
        return jax.tree.map(lambda x: x[data.starts[client] + rows], data.examples)

    @jax.jit
    def losses(box: BlackBox, data: ClientData, candidates: Params, draws: tuple[Array, Array], key: Array):
        keys = jax.random.split(key, len(draws[0]))

        def one(row) -> tuple[Array, Array]:
            candidate, (client, rows), key = row
            batch = take(data, client, rows)
            exact = scores(box, candidate, batch)
            return objective(exact, batch.labels), objective(answer(exact, key), batch.labels)

        return jax.lax.map(one, (candidates, draws, keys), batch_size=chunk_size)

    @jax.jit
    def gradients(box: BlackBox, data: ClientData, params: Params, draws: tuple[Array, Array]) -> Params:
        def of_batch(draw: tuple[Array, Array]) -> Params:
            return jax.grad(mean_loss)(params, box, take(data, *draw), jnp.ones(batch_size))

        return jax.lax.map(of_batch, draws, batch_size=chunk_size)

    @jax.jit
    def client_gradients(box: BlackBox, data: ClientData, params: Params) -> Params:
        def of_client(client: Array) -> Params:
            examples = jax.tree.map(lambda x: x[own_rows(data, client)], data.examples)
            return jax.grad(mean_loss)(params, box, examples, (data.places < data.sizes[client]).astype(jnp.float32))

        return jax.lax.map(of_client, jnp.arange(len(data.sizes)))

    return Landscape(
        params,
        draw,
        partial(losses, classifier, clients),
        partial(gradients, classifier, clients),
        partial(client_gradients, classifier, clients),
        weights,
    )
