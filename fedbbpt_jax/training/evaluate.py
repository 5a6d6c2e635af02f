"""Accuracy and loss of prompts on held-out examples, through the same query-only boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.types import BlackBox, Examples, Objective, Params, PromptGenerator, Query


class Evaluation(NamedTuple):
    """Mean loss in nats, accuracy in [0, 1] and the requests it took; scalars."""

    loss: Array
    accuracy: Array
    num_requests: Array


def compile_evaluation(
    generator: PromptGenerator, objective: Objective, *, chunk_size: int = 64
) -> Callable[[BlackBox, Params, Examples], Evaluation]:
    """Returns a compiled `(box, params [M, ...], examples) -> Evaluation`, the mean over M models.

    Args:
      generator: makes the prompt from each model's parameters.
      objective: the loss to report.
      chunk_size: most examples in flight at once.
    """

    @jax.jit
    def evaluate(box: BlackBox, params: Params, examples: Examples) -> Evaluation:
        size = len(examples.labels)
        num_chunks = -(-size // chunk_size)
        rows = jnp.arange(num_chunks * -(-size // num_chunks)).reshape(num_chunks, -1)  # chunks as even as can be

        def one_chunk(model: Params, rows: Array) -> tuple[Array, Array]:
            batch = jax.tree.map(lambda x: jnp.asarray(x)[jnp.minimum(rows, size - 1)], examples)
            prompt = generator.generate(model, batch.features)
            query = Query(jax.tree.map(lambda x: x[None, None], prompt), jax.tree.map(lambda x: x[None], batch.inputs))
            scores = box(query).scores[0, 0]
            counted = rows < size
            correct = (scores.argmax(-1) == batch.labels) & counted
            return jnp.where(counted, objective(scores, batch.labels), 0.0).sum(), correct.sum()

        def one_model(model: Params) -> tuple[Array, Array]:
            losses, correct = jax.lax.map(lambda r: one_chunk(model, r), rows)
            return losses.sum() / size, correct.sum() / size

        loss, accuracy = jax.lax.map(one_model, params)
        return Evaluation(loss.mean(), accuracy.mean(), jnp.asarray(len(loss) * size))

    return evaluate
