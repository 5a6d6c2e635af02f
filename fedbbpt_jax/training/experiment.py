"""The description of a run, and its parts built from their names. Only this folder and the CLI read it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import optax
import tyro

from fedbbpt_jax.black_box.frozen import Precision
from fedbbpt_jax.data.partition import dirichlet, iid
from fedbbpt_jax.estimators.catalogue import ESTIMATORS, find_estimator
from fedbbpt_jax.estimators.directions import segmented_uniform
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.federated.averaging import isolated, weighted_mean
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.optimizers.descent import descent, spsa_gc_perturbation_size, spsa_gc_transformation
from fedbbpt_jax.prompts.coordinator import BLACKVIP_CHANNELS, SMALL_CHANNELS, coordinator
from fedbbpt_jax.prompts.pixels import frame, full_overlay, low_resolution_overlay
from fedbbpt_jax.types import Estimator, Federation, Method, Optimizer, PromptGenerator

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
      shots: training examples per class, over all clients.
      test_limit: most test images, drawn once for all seeds; all if left out.
      model: the frozen CLIP: a shipped one (`fedbbpt list models`), a folder, or a hub id.
      revision: branch, tag or commit of the model on the hub.
      generator: the prompt's form (`fedbbpt list generators`).
      encoder: what a coordinator sees an image by: a ViT-MAE, ViT or DINO folder or hub id; mean colours if left out.
      num_clients: clients that hold data.
      cohort: clients per round, drawn uniformly; all if left out.
      partition: iid, or dirichlet:ALPHA by label.
      federation: fedavg, or isolated: clients that never talk.
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
      chunk_size: candidates in flight at once; changes speed and memory only.
      seed: of shots, partition, batches and directions.
    """

    task: tyro.conf.Positional[str | None] = None
    data: str | None = None
    templates: tuple[str, ...] = ()
    shots: int = 16
    test_limit: int | None = None
    model: str = "mini-clip"
    revision: str | None = None
    generator: Literal["low-resolution", "full", "frame", "coordinator"] = "low-resolution"
    encoder: str | None = None
    num_clients: int = 5
    cohort: int | None = None
    partition: str = "dirichlet:0.3"
    federation: Literal["fedavg", "isolated"] = "fedavg"
    num_rounds: int | None = None
    local_steps: int = 4
    batch_size: int = 4
    estimator: str = "spsa"
    num_directions: int = 5
    perturbation_size: float | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float | None = None
    budget: int = 64_000
    eval_every: int = 8
    precision: Precision = "highest"
    chunk_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class ResolvedExperiment(Experiment):
    """An experiment whose task and sizes are all known; made by `resolve`."""

    task: str = ""
    cohort: int = 0
    num_rounds: int = 0
    perturbation_size: float = 0.0
    lr: float = 0.0


def resolve(experiment: Experiment) -> ResolvedExperiment:
    """Returns the experiment with every size filled in.

    Raises:
      ValueError: a value is out of range; the message names it, what was received and what was expected.
    """
    e = experiment
    for name in ("shots", "num_clients", "local_steps", "batch_size", "num_directions", "eval_every", "chunk_size"):
        if getattr(e, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(e, name)}")
    for name in ("cohort", "num_rounds", "perturbation_size", "lr", "test_limit"):
        if getattr(e, name) is not None and not 0 < getattr(e, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {getattr(e, name)}")
    if not 0 <= e.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and 2**32 - 1, got {e.seed}")
    cohort = e.cohort or e.num_clients
    if cohort > e.num_clients:
        raise ValueError(f"--cohort must be at most --num-clients {e.num_clients}, got {cohort}")
    _parse_partition(e.partition)
    published = e.estimator == SPSA_GC
    lr = e.lr or (0.01 if published else 0.03 if e.optimizer == "adam" else 0.02)
    size = e.perturbation_size or (0.01 if published else 0.05)
    requests = requests_per_round(e)
    if e.budget < requests:
        raise ValueError(f"--budget must pay for one round of {requests} requests, got {e.budget}")
    num_rounds = min(e.num_rounds or e.budget, e.budget // requests)
    task = e.task or ("sensor" if e.data is None else Path(e.data).resolve().name)
    sizes = {
        "task": task,
        "templates": tuple(e.templates),
        "cohort": cohort,
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


def split_among_clients(experiment: Experiment, labels: np.ndarray) -> list[np.ndarray]:
    """Returns the rows of `labels` that each client holds."""
    alpha = _parse_partition(experiment.partition)
    if alpha is None:
        return iid(labels, experiment.num_clients, experiment.seed)
    return dirichlet(labels, experiment.num_clients, alpha, experiment.seed)


def build_method(experiment: ResolvedExperiment, image_size: int, feature_size: int) -> Method:
    """Returns the method that a resolved experiment describes, for a task of these sizes."""
    generator = build_generator(experiment, image_size, feature_size)
    return Method(generator, cross_entropy, build_optimizer(experiment), build_federation(experiment))


def build_generator(experiment: Experiment, image_size: int, feature_size: int) -> PromptGenerator:
    """Returns the prompt generator for images of `image_size` pixels and `feature_size` features."""
    size = image_size
    match experiment.generator:
        case "low-resolution":
            return low_resolution_overlay(size, resolution=8)
        case "full":
            return full_overlay(size)
        case "frame":
            return frame(size, width=max(1, round(size * 30 / 224)))  # BlackVIP's 30 of 224 pixels
        case "coordinator":
            return coordinator(size, feature_size, SMALL_CHANNELS if size < 224 else BLACKVIP_CHANNELS)


def build_optimizer(experiment: ResolvedExperiment) -> Optimizer:
    """Returns the client's optimizer of a resolved experiment."""
    e = experiment
    num_steps = e.num_rounds * e.local_steps
    if e.estimator == SPSA_GC:
        return descent(build_estimator(e), spsa_gc_transformation(e.lr))
    rate = optax.cosine_decay_schedule(e.lr, num_steps, alpha=0.3)
    tx = optax.adam(rate, b2=0.99) if e.optimizer == "adam" else optax.sgd(rate)
    return descent(build_estimator(e), tx)


def build_federation(experiment: Experiment) -> Federation:
    """Returns how the clients' states come together."""
    return weighted_mean() if experiment.federation == "fedavg" else isolated(experiment.num_clients)


def build_estimator(experiment: ResolvedExperiment) -> Estimator:
    """Returns the gradient estimator of a resolved experiment."""
    e = experiment
    if e.estimator == SPSA_GC:
        return spsa(segmented_uniform(), e.num_directions, spsa_gc_perturbation_size(e.perturbation_size))
    return find_estimator(e.estimator).build(e.num_directions, e.perturbation_size)


def _parse_partition(partition: str) -> float | None:
    """Returns alpha, or None for IID."""
    kind, _, value = partition.partition(":")
    if partition == "iid":
        return None
    try:
        alpha = float(value)
    except ValueError:
        alpha = float("nan")
    if kind != "dirichlet" or not 0 < alpha < math.inf:
        raise ValueError(f"--partition must be iid or dirichlet:ALPHA with ALPHA > 0, got {partition!r}")
    return alpha
