"""Accuracy and loss of prompts on held-out examples, through the same query-only boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedbbpt_jax.data.buckets import plan_buckets, take_bucket
from fedbbpt_jax.errors import QueryFailedError
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.training.metrics import METRICS, confusion_matrix
from fedbbpt_jax.types import BlackBox, Examples, Metric, Objective, Params, PromptGenerator, Query, Response


class Evaluation(NamedTuple):
    """What was found on held-out examples, for M models.

    Attributes:
      loss: mean over examples and models, nats.
      confusion: counts int32 `[M, N, N]`, labels first.
      num_requests: the requests it took.
    """

    loss: Array
    confusion: Array
    num_requests: Array

    @property
    def accuracy(self) -> Array:
        """In [0, 1], mean over models."""
        return self.metric("accuracy")

    def metric(self, name: Metric) -> Array:
        """Returns a metric of `METRICS`, mean over models."""
        return jax.vmap(METRICS[name])(self.confusion).mean()


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
            loss = jnp.where(counted, objective(scores, batch.labels), 0.0).sum()
            return loss, confusion_matrix(batch.labels, scores.argmax(-1), scores.shape[-1], counted)

        def one_model(model: Params) -> tuple[Array, Array]:
            losses, confusions = jax.lax.map(lambda r: one_chunk(model, r), rows)
            return losses.sum() / size, confusions.sum(0)

        loss, confusion = jax.lax.map(one_model, params)
        return Evaluation(loss.mean(), confusion, jnp.asarray(len(loss) * size))

    return evaluate


def host_evaluation(
    generator: PromptGenerator, objective: Objective, *, chunk_size: int = 64
) -> Callable[[BlackBox, Params, Examples], Evaluation]:
    """Returns what `compile_evaluation` returns, around a box that is called on the host with whole arrays.

    An example without a usable answer counts for nothing.

    Args:
      generator: makes the prompt from each model's parameters.
      objective: the loss to report.
      chunk_size: examples of one query.

    Raises:
      QueryFailedError: when called, where no example had a usable answer; whatever the box raises passes through.
    """
    generate = jax.jit(generator.generate)

    @jax.jit
    def count(response: Response, labels: Array) -> tuple[Array, Array, Array]:
        scores, valid = jax.tree.map(lambda x: x[0, 0], response)
        losses = jnp.where(valid, objective(jnp.where(valid[:, None], scores, 0.0), labels), 0.0)
        return losses.sum(), confusion_matrix(labels, scores.argmax(-1), scores.shape[-1], valid), valid.sum()

    def evaluate_one(box: BlackBox, model: Params, examples: Examples) -> tuple[Array, Array]:
        found = []
        for start in range(0, len(examples.labels), chunk_size):
            batch = jax.tree.map(lambda x, start=start: x[start : start + chunk_size], examples)
            prompt = generate(model, batch.features)
            query = Query(jax.tree.map(lambda x: x[None, None], prompt), jax.tree.map(lambda x: x[None], batch.inputs))
            response = box(query)
            found.append(count(Response(*map(jnp.asarray, response)), batch.labels))
        loss, confusion, num_valid = (sum(parts) for parts in zip(*found, strict=True))
        if not num_valid:
            raise QueryFailedError("an evaluation had no usable answer")
        return jnp.asarray(loss / num_valid), jnp.asarray(confusion)

    def evaluate(box: BlackBox, params: Params, examples: Examples) -> Evaluation:
        num_models = len(jax.tree.leaves(params)[0])
        models = [jax.tree.map(lambda x, m=m: x[m], params) for m in range(num_models)]
        losses, confusions = zip(*(evaluate_one(box, model, examples) for model in models), strict=True)
        num_requests = jnp.asarray(num_models * len(examples.labels))
        return Evaluation(jnp.stack(losses).mean(), jnp.stack(confusions), num_requests)

    return evaluate


def in_buckets(examples: Examples) -> list[Examples]:
    """Returns the examples in parts: texts of similar length together, without the padding that none of them needs.

    What has no padding is one part.
    """
    if not hasattr(examples.inputs, "attended"):
        return [examples]
    lengths = np.asarray(examples.inputs.attended).sum(1)
    return [take_bucket(examples, bucket) for bucket in plan_buckets(lengths)]


def together(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Returns the evaluation of the same models on all parts of some examples."""
    sizes = np.array([int(e.num_requests) for e in evaluations])
    shares = jnp.asarray(sizes / sizes.sum(), jnp.float32)
    loss = (jnp.stack([e.loss for e in evaluations]) * shares).sum()
    return Evaluation(loss, jnp.stack([e.confusion for e in evaluations]).sum(0), jnp.asarray(sizes.sum()))


_NO_WORDS = PromptGenerator(lambda key: jnp.zeros(0, jnp.int32), lambda params, features: params)

evaluate_without_prompt = compile_evaluation(_NO_WORDS, cross_entropy)
"""Of texts: `(box of token ids, [1, 0], examples) -> Evaluation`."""
ask_without_prompt = host_evaluation(_NO_WORDS, cross_entropy)
"""The same of a box on the host."""
