"""From the description of a run to all that its first round needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.black_box.frozen import query_only
from fedbbpt_jax.federated.cohort import ClientData, pack
from fedbbpt_jax.federated.placement import RunRounds, compile_rounds
from fedbbpt_jax.training.evaluate import Evaluation, compile_evaluation
from fedbbpt_jax.training.experiment import (
    Experiment,
    ResolvedExperiment,
    build_method,
    resolve,
    split_among_clients,
    without_data,
)
from fedbbpt_jax.training.load import load_classifier, load_experiment_task
from fedbbpt_jax.types import BlackBox, Examples, Method, Params, PyTree, Task


class Programs(NamedTuple):
    """The method of an experiment and what is compiled of it."""

    method: Method
    run_rounds: RunRounds
    evaluate: Callable[[BlackBox, Params, Examples], Evaluation]


@functools.lru_cache(maxsize=16)
def compiled_programs(e: ResolvedExperiment, image_size: int, feature_size: int) -> Programs:
    """Returns the programs of an experiment `without_data`, so that seeds and partitions share compilations."""
    method = build_method(e, image_size, feature_size)
    sizes = {"cohort_size": e.cohort, "local_steps": e.local_steps, "batch_size": e.batch_size}
    run_rounds = compile_rounds(method, **sizes, chunk_size=e.chunk_size)
    return Programs(method, run_rounds, compile_evaluation(method.generator, method.objective))


class Setup(NamedTuple):
    """Everything a run needs before its first round. Made by `prepare`.

    Attributes:
      experiment: with everything resolved.
      task: its data; `validation` and `test` as device arrays.
      box: the frozen model, behind the wall.
      clients: their private data.
      programs: the method and what is compiled of it.
      server: its state before the first round.
      payload: bytes (down, up) of one round, all clients together.
      key: of all rounds.
    """

    experiment: ResolvedExperiment
    task: Task
    box: BlackBox
    clients: ClientData
    programs: Programs
    server: PyTree
    payload: tuple[int, int]
    key: Array


def prepare(experiment: Experiment) -> Setup:
    """Returns the setup of an experiment: nothing is queried, compiled or written.

    Raises:
      ValueError, TaskError, CheckpointError: the experiment cannot be run as described.
    """
    e = resolve(experiment)
    task = load_experiment_task(e)
    task = task._replace(validation=on_device(task.validation), test=on_device(task.test))
    clients = pack(task.train, split_among_clients(e, task.train.labels))
    box = query_only(load_classifier(e, task))
    programs = compiled_programs(without_data(e), task.image_size, task.feature_size)
    method = programs.method
    init_key, key = jax.random.split(jax.random.key(e.seed))
    client = method.optimizer.init(method.generator.init(init_key))
    down, up = method.federation.payload_bytes(client)
    server = method.federation.init(client)
    return Setup(e, task, box, clients, programs, server, (e.cohort * down, e.cohort * up), key)


def on_device(examples: Examples) -> Examples:
    """Returns the examples as device arrays, moved once."""
    return jax.tree.map(jnp.asarray, examples)
