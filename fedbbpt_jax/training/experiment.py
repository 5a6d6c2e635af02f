"""The description of a run. Only this folder and the CLI read it; `build.py` makes the parts it names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from fedbbpt_jax.black_box.frozen import Precision
from fedbbpt_jax.data.digit_tasks import DIGIT_TASKS
from fedbbpt_jax.data.partition import client_column, find_partition
from fedbbpt_jax.estimators.catalogue import ESTIMATORS, find_estimator

MODELS = {"mini-clip": "CLIP of 0.6 M parameters for 32x32 digits, shipped with the package"}

GENERATORS = {
    "low-resolution": "8x8 colours enlarged bilinearly, 192 parameters (the default)",
    "full": "one free colour per pixel: 3,072 parameters at 32 pixels, 150,528 at 224",
    "frame": "a free border of 30/224 of the width: 1,344 parameters at 32 pixels, 69,840 at 224",
    "coordinator": "a prompt per image, decoded from its features (--encoder) and a trigger: BlackVIP's 9,920 at 224",
}

SPSA_GC = "spsa-gc"
"""BlackVIP as published, an estimator with an optimizer of its own."""


def estimator_descriptions() -> dict[str, str]:
    """Returns a line for each estimator that an experiment can name."""
    published = "BlackVIP as published: segmented uniform directions, momentum, decaying steps; ignores --optimizer"
    return {name: entry.description for name, entry in ESTIMATORS.items()} | {SPSA_GC: published}


@dataclass(frozen=True)
class Experiment:
    """What is learnt, by whom and how. Sizes that are left out are resolved from the others.

    Attributes:
      task: what to learn (`fedbbpt list tasks`): sensor, or the name of the folder given by --data, if left out.
      data: images of your own: an image folder, a folder of parquet files, or a hub id; or a local copy of the task.
      templates: texts with one {} for the class name; the features of several are averaged; by task if left out.
      shots: training examples per class, over all clients; 16, or 4 per client of the digits' tasks, if left out.
      test_limit: most test images, drawn once for all seeds; all if left out.
      model: the frozen CLIP: a shipped one (`fedbbpt list models`), a folder, or a hub id.
      revision: branch, tag or commit of the model on the hub.
      generator: the prompt's form (`fedbbpt list generators`).
      encoder: what a coordinator sees an image by: a ViT-MAE, ViT or DINO folder or hub id; mean colours if left out.
      num_clients: clients that hold data.
      cohort: clients per round; all if left out.
      sampling: how a cohort is drawn: uniform, or weighted by the clients' sizes (who then count equally).
      weighting: what a client of a uniform cohort counts: its size, or equal.
      dropout: probability that a client that was drawn stays away.
      availability: a file .npy of bool [rounds, clients], who can come when; begun anew after its last round.
      partition: who holds what (`fedbbpt list partitions`); iid, or dirichlet:ALPHA by label, and others.
      federation: fedavg; isolated: clients that never talk; personal: a local prompt beside the shared one.
      client_state: what becomes of momenta and moments after a round: averaged like the parameters, reset, or kept.
      server_optimizer: what the server does with the clients' mean change; none takes it as it is.
      server_lr: its step size; 1 for fedavgm, otherwise 0.03, if left out.
      num_rounds: rounds; if left out, as many as the budget allows.
      local_steps: steps of each client between two aggregations.
      batch_size: examples per step.
      estimator: of the gradient (`fedbbpt list estimators`), or module:factory of your own.
      num_directions: directions per step.
      perturbation_size: in pixel units; by estimator if left out.
      optimizer: what is done with the estimate.
      lr: step size at the start, decaying by a cosine to 0.3 of it; by optimizer if left out.
      budget: most requests (one prompt on one example) of all clients together.
      eval_every: rounds between two evaluations on validation data.
      precision: of the frozen model's matrix products.
      placement: where rounds run: compile (one device), shard (all), stream (data stay on the host), host (asks a box
        there); by the devices if auto.
      chunk_size: candidates in flight at once, for speed and memory only; 0 takes the best, timed once per model.
      seed: of shots, partition, batches and directions.
    """

    task: tyro.conf.Positional[str | None] = None
    data: str | None = None
    templates: tuple[str, ...] = ()
    shots: int | None = None
    test_limit: int | None = None
    model: str = "mini-clip"
    revision: str | None = None
    generator: Literal["low-resolution", "full", "frame", "coordinator"] = "low-resolution"
    encoder: str | None = None
    num_clients: int = 5
    cohort: int | None = None
    sampling: Literal["uniform", "weighted"] = "uniform"
    weighting: Literal["size", "equal"] = "size"
    dropout: float = 0.0
    availability: str | None = None
    partition: str = "dirichlet:0.3"
    federation: Literal["fedavg", "isolated", "personal"] = "fedavg"
    client_state: Literal["averaged", "reset", "kept"] = "averaged"
    server_optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    server_lr: float | None = None
    num_rounds: int | None = None
    local_steps: int = 4
    batch_size: int = 4
    estimator: str = "spsa"
    num_directions: int = 5
    perturbation_size: float | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float | None, tyro.conf.Suppress] = None
    budget: int = 64_000
    eval_every: int = 8
    precision: Precision = "highest"
    placement: Literal["auto", "compile", "shard", "stream", "host"] = "auto"
    chunk_size: int = 0
    seed: int = 0


@dataclass(frozen=True)
class ResolvedExperiment(Experiment):
    """An experiment whose task and sizes are all known; made by `resolve`, but for a chunk size that is measured."""

    task: str = ""
    shots: int = 0
    cohort: int = 0
    server_lr: float = 0.0
    num_rounds: int = 0
    perturbation_size: float = 0.0
    lr: float = 0.0


def resolve(experiment: Experiment) -> ResolvedExperiment:
    """Returns the experiment with every size filled in.

    Raises:
      ValueError: a value is out of range; the message names it, what was received and what was expected.
    """
    e = experiment
    for name in ("num_clients", "local_steps", "batch_size", "num_directions", "eval_every"):
        if getattr(e, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(e, name)}")
    for name in ("shots", "cohort", "num_rounds", "perturbation_size", "lr", "server_lr", "test_limit"):
        if getattr(e, name) is not None and not 0 < getattr(e, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {getattr(e, name)}")
    if e.chunk_size < 0:
        raise ValueError(f"--chunk-size must be at least 1, or 0 for the best, got {e.chunk_size}")
    if not 0 <= e.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and 2**32 - 1, got {e.seed}")
    cohort = e.cohort or e.num_clients
    if cohort > e.num_clients:
        raise ValueError(f"--cohort must be at most --num-clients {e.num_clients}, got {cohort}")
    if client_column(e.partition) is None:
        find_partition(e.partition)
    if not 0 <= e.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {e.dropout}")
    if e.federation != "fedavg" and e.client_state != "averaged":
        raise ValueError(f"--client-state {e.client_state} is of --federation fedavg, got {e.federation}")
    if e.federation == "isolated" and e.server_optimizer != "none":
        raise ValueError("--server-optimizer has nothing to do where clients never talk, got --federation isolated")
    published = e.estimator == SPSA_GC
    lr = e.lr or (0.01 if published else 0.03 if e.optimizer == "adam" else 0.02)
    size = e.perturbation_size or (0.01 if published else 0.05)
    requests = requests_per_round(e)
    if e.budget < requests:
        raise ValueError(f"--budget must pay for one round of {requests} requests, got {e.budget}")
    num_rounds = min(e.num_rounds or e.budget, e.budget // requests)
    task = e.task or ("sensor" if e.data is None else Path(e.data).resolve().name)
    few = 16 if task not in DIGIT_TASKS else max(16, -(-4 * e.num_clients // 10))
    sizes = {
        "task": task,
        "shots": e.shots or few,
        "server_lr": e.server_lr or (1.0 if e.server_optimizer in ("none", "fedavgm") else 0.03),
        "templates": tuple(e.templates),
        "cohort": cohort,
        "placement": _placement(e),
        "num_rounds": num_rounds,
        "perturbation_size": size,
        "lr": lr,
    }
    return ResolvedExperiment(**asdict(e) | sizes)


def requests_per_round(experiment: Experiment) -> int:
    """Returns C·K·T·B, the requests of one round."""
    e = experiment
    entry = find_estimator("spsa" if e.estimator == SPSA_GC else e.estimator)
    num_candidates = entry.build(e.num_directions, 1.0).num_candidates
    return (e.cohort or e.num_clients) * num_candidates * e.local_steps * e.batch_size


def without_data(experiment: ResolvedExperiment) -> ResolvedExperiment:
    """Returns the experiment without what its compiled programs do not depend on: its data, model and seed."""
    return replace(
        experiment,
        task="",
        data=None,
        templates=(),
        shots=1,
        test_limit=None,
        model="",
        revision=None,
        encoder=None,
        partition="iid",
        precision="highest",
        seed=0,
    )


def _placement(e: Experiment) -> str:
    """Returns where rounds run: over several processes or accelerators where there are some, otherwise in one program.

    Raises:
      ValueError: there are more devices than clients to spread over them.
    """
    num_devices = jax.device_count()
    if num_devices > e.num_clients and (e.placement == "shard" or jax.process_count() > 1):
        raise ValueError(f"--placement shard needs a client for each of {num_devices} devices, got {e.num_clients}")
    if e.placement != "auto":
        return e.placement
    spread = jax.process_count() > 1 or (num_devices > 1 and jax.default_backend() != "cpu")
    return "shard" if spread and num_devices <= e.num_clients else "compile"
