"""From the description of a run to all that its first round needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from fedbbpt_jax.black_box.frozen import query_only
from fedbbpt_jax.black_box.ledger.ledger import Ledger
from fedbbpt_jax.errors import QueryFailedError
from fedbbpt_jax.federated.cohort import ClientData, pack
from fedbbpt_jax.federated.host import host_rounds
from fedbbpt_jax.federated.mesh import make_mesh, place_clients, replicate
from fedbbpt_jax.federated.placement import RunRounds, compile_rounds, shard_rounds
from fedbbpt_jax.federated.streaming import stream_rounds
from fedbbpt_jax.training.build import PromptSizes, build_method, build_participation
from fedbbpt_jax.training.chunk_size import choose_chunk_size
from fedbbpt_jax.training.evaluate import Evaluation, compile_evaluation, host_evaluation, in_buckets
from fedbbpt_jax.training.experiment import Experiment, ResolvedExperiment
from fedbbpt_jax.training.load import (
    client_end,
    load_classifier,
    load_experiment_task,
    prompt_sizes,
    split_among_clients,
)
from fedbbpt_jax.training.resolve import resolve, without_data
from fedbbpt_jax.training.served import Served, price_of
from fedbbpt_jax.types import BlackBox, Examples, Method, Params, PyTree, Query, Response, Task


class Programs(NamedTuple):
    """The method of an experiment and what is compiled of it; a mesh where its rounds are spread over devices."""

    method: Method
    mesh: Mesh | None
    run_rounds: RunRounds
    evaluate: Callable[[BlackBox, Params, Examples], Evaluation]

    @property
    def num_shards(self) -> int:
        """How many devices hold clients."""
        return 1 if self.mesh is None else self.mesh.size


@functools.lru_cache(maxsize=16)
def compiled_programs(e: ResolvedExperiment, prompt: PromptSizes) -> Programs:
    """Returns the programs of an experiment `without_data`, so that seeds and partitions share compilations."""
    method = build_method(e, prompt)
    evaluate = (compile_evaluation if e.url is None else host_evaluation)(method.generator, method.objective)
    what = method, build_participation(e)
    sizes = {"local_steps": e.local_steps, "batch_size": e.batch_size}
    match e.placement:
        case "shard":
            mesh = make_mesh(e.num_clients)
            return Programs(method, mesh, shard_rounds(*what, mesh, **sizes, chunk_size=e.chunk_size), evaluate)
        case "stream":
            return Programs(method, None, stream_rounds(*what, **sizes, chunk_size=e.chunk_size), evaluate)
        case "host":
            return Programs(method, None, host_rounds(*what, **sizes), evaluate)
        case _:
            return Programs(method, None, compile_rounds(*what, **sizes, chunk_size=e.chunk_size), evaluate)


class Setup(NamedTuple):
    """Everything a run needs before its first round. Made by `prepare`.

    Attributes:
      experiment: with everything resolved.
      task: its data.
      validation: on the device, texts of similar length together.
      test: likewise.
      parts: the rows of `task.train` that each client holds.
      bare: the frozen model, behind the wall.
      box: what a client's prompts are sent to: the model, behind its own projection where prompts are soft ones.
      rounds_box: the same, where the rounds run.
      clients: their private data, where the rounds run.
      programs: the method and what is compiled of it.
      server: its state before the first round.
      payload: bytes (down, up) of one client and round.
      key: of all rounds.
      ledger: what pays for the answers of a served model; None where the model is in this process.
    """

    experiment: ResolvedExperiment
    task: Task
    validation: list[Examples]
    test: list[Examples]
    parts: list[np.ndarray]
    bare: BlackBox
    box: BlackBox
    rounds_box: BlackBox
    clients: ClientData
    programs: Programs
    server: PyTree
    payload: tuple[int, int]
    key: Array
    ledger: Ledger | None = None

    def counted_as(self, account: str) -> AbstractContextManager[None]:
        """Counts what is asked within in an account of its own, where somebody counts."""
        return nullcontext() if self.ledger is None else self.ledger.counted_as(account)


def prepare(experiment: Experiment, served: Served | None = None) -> Setup:
    """Returns the setup of an experiment: nothing is queried, but for a model that is new here, which is timed once.

    Args:
      experiment: sizes that are left out are resolved.
      served: the model that its `url` tells of; without it, the setup of such an experiment can be looked at only.

    Raises:
      ValueError, TaskError, CheckpointError: the experiment cannot be run as described.
    """
    e = resolve(experiment)
    price_of(e)  # prices that cannot be read end here
    task = load_experiment_task(e)
    bare = query_only(load_classifier(e, task)) if e.url is None else _nobody if served is None else served.box
    box, sizes = client_end(e, bare), prompt_sizes(e, task)
    if not e.chunk_size:
        method = build_method(e, sizes)
        e = replace(e, chunk_size=choose_chunk_size(e.model, box, method, task.train, e.batch_size))
    programs = compiled_programs(without_data(e), sizes)
    seen, parts = split_among_clients(e, task)
    rounds_box, clients = _where_rounds_run(e, box, pack(seen, parts, programs.num_shards), programs)
    method = programs.method
    init_key, key = jax.random.split(jax.random.key(e.seed))
    client = method.optimizer.init(method.generator.init(init_key))
    payload = method.federation.payload_bytes(client)
    server = method.federation.init(client)
    validation, test = (on_device(in_buckets(part)) for part in (task.validation, task.test))
    ledger = None if served is None else served.ledger
    whole = task, validation, test, parts, bare, box, rounds_box, clients, programs, server, payload, key
    return Setup(e, *whole, ledger)


def _nobody(query: Query, /) -> Response:
    raise QueryFailedError("nobody is asked before a run begins")


def _where_rounds_run(
    e: ResolvedExperiment, box: BlackBox, clients: ClientData, programs: Programs
) -> tuple[BlackBox, ClientData]:
    if programs.mesh is None:
        return box, clients if e.placement == "stream" else jax.tree.map(jnp.asarray, clients)
    return replicate(box, programs.mesh), place_clients(clients, programs.mesh)


def on_device(examples: Any) -> Any:
    """Returns examples, or several parts of them, as device arrays, moved once."""
    return jax.tree.map(jnp.asarray, examples)
