"""What an experiment leaves out is filled in, and what cannot be run is refused."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax

from fedbbpt_jax.data.digit_tasks import DIGIT_TASKS
from fedbbpt_jax.data.partition import client_column, find_partition
from fedbbpt_jax.data.text_datasets import TEXT_TASKS
from fedbbpt_jax.estimators.catalogue import find_estimator
from fedbbpt_jax.training.experiment import EVOLUTION, POLICIES, SPSA_GC, Experiment, ResolvedExperiment, ServedOptions

SOFT_GENERATORS, TEXT_FILES = ("soft", "deep"), (".csv", ".tsv", ".jsonl")
TEXT_GENERATORS = (*SOFT_GENERATORS, "tokens")


def resolve(experiment: Experiment) -> ResolvedExperiment:
    """Returns the experiment with every size filled in.

    Raises:
      ValueError: a value is out of range, or two do not go together; the message names what was received and expected.
    """
    e = experiment
    _check_numbers(e)
    named = {
        "task": e.task or ("sensor" if e.data is None else Path(e.data).resolve().name),
        "model": e.model or _default_model(e),
        "generator": e.generator or _default_generator(e),
        "client_state": e.client_state or ("kept" if e.optimizer == "cma-es" else "averaged"),
        "num_directions": num_directions(e),
    }
    e = ResolvedExperiment(**{field.name: getattr(e, field.name) for field in fields(Experiment)} | named)
    _check_choices(e)
    requests = requests_per_round(e)
    if e.budget < requests:
        raise ValueError(f"--budget must pay for one round of {requests} requests, got {e.budget}")
    few = 16 if e.task not in DIGIT_TASKS else max(16, -(-4 * e.num_clients // 10))
    return replace(
        e,
        shots=e.shots or few,
        server_lr=e.server_lr or (1.0 if e.server_optimizer in ("none", "fedavgm") else 0.03),
        templates=tuple(e.templates),
        text=replace(e.text, label_words=tuple(e.text.label_words)),
        cohort=e.cohort or e.num_clients,
        placement=_placement(e),
        chunk_size=e.chunk_size if e.url is None else 1,
        num_rounds=min(e.num_rounds or e.budget, e.budget // requests),
        perturbation_size=e.perturbation_size or _default_perturbation_size(e),
        lr=e.lr or _default_lr(e),
    )


def is_of_texts(e: Experiment) -> bool:
    """Returns whether an experiment is about texts, by what it names."""
    files = e.data is not None and Path(e.data).suffix.lower() in TEXT_FILES
    return e.task in TEXT_TASKS or files or e.generator in TEXT_GENERATORS or e.estimator in POLICIES


def num_directions(e: Experiment) -> int:
    """Returns the directions of a step, or the samples of a policy, or the population of an evolution strategy."""
    return e.num_directions or (20 if e.estimator in POLICIES else 5)


def num_candidates(e: Experiment) -> int:
    """Returns K."""
    if e.optimizer in EVOLUTION or e.estimator in POLICIES:
        return num_directions(e)
    return (
        find_estimator("spsa" if e.estimator == SPSA_GC else e.estimator).build(num_directions(e), 1.0).num_candidates
    )


def requests_per_round(e: Experiment) -> int:
    """Returns C·K·T·B, the requests of one round; C·B more where clients report what their solution costs.

    Twice as many where losses are relative to those of spoilt copies.
    """
    per_client = num_candidates(e) * e.local_steps + (e.optimizer == "fedbpt")
    views = 2 if e.text.replaced else 1
    return (e.cohort or e.num_clients) * per_client * e.batch_size * views


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
        url=None if experiment.url is None else "",
        revision=None,
        encoder=None,
        partition="iid",
        precision="highest",
        seed=0,
        text=replace(experiment.text, label_words=(), vocabulary=None),
        served=ServedOptions(),
    )


def _default_model(e: Experiment) -> str:
    if e.served.api != "v2":
        raise ValueError(f"--api {e.served.api} needs --model, the model's name at the server")
    return "minilm" if is_of_texts(e) else "mini-clip"


def _default_generator(e: Experiment) -> str:
    if not is_of_texts(e):
        return "low-resolution"
    return "tokens" if e.estimator in POLICIES else "soft"


def _default_perturbation_size(e: ResolvedExperiment) -> float:
    if e.optimizer in EVOLUTION:
        return 1.0
    return 0.1 if e.generator in SOFT_GENERATORS else 0.01 if e.estimator == SPSA_GC else 0.05


def _default_lr(e: ResolvedExperiment) -> float:
    if e.estimator in ("policy-gradient", SPSA_GC):
        return 0.003 if e.estimator == "policy-gradient" else 0.01
    if e.generator in TEXT_GENERATORS:
        return 0.1
    return 0.03 if e.optimizer == "adam" else 0.02


def _check_numbers(e: Experiment) -> None:
    sizes: dict[str, Any] = {
        name: getattr(e, name) for name in ("num_clients", "local_steps", "batch_size", "eval_every")
    }
    sizes |= {name: getattr(e.text, name) for name in ("prompt_length", "intrinsic_dim", "num_words")}
    sizes |= {} if e.num_directions is None else {"num_directions": e.num_directions}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("shots", "cohort", "num_rounds", "perturbation_size", "lr", "server_lr", "test_limit"):
        if getattr(e, name) is not None and not 0 < getattr(e, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {getattr(e, name)}")
    if e.chunk_size < 0:
        raise ValueError(f"--chunk-size must be at least 1, or 0 for the best, got {e.chunk_size}")
    if not 0 <= e.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and 2**32 - 1, got {e.seed}")
    if (e.cohort or 0) > e.num_clients:
        raise ValueError(f"--cohort must be at most --num-clients {e.num_clients}, got {e.cohort}")
    if not 0 <= e.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {e.dropout}")
    if not 0 <= e.text.replaced <= 1:
        raise ValueError(f"--replaced must be in [0, 1], got {e.text.replaced}")
    if client_column(e.partition) is None:
        find_partition(e.partition)


def _check_choices(e: ResolvedExperiment) -> None:
    if e.url is not None and e.placement not in ("auto", "host"):
        raise ValueError(f"--url is for --placement host, got --placement {e.placement}")
    _check_served(e)
    if e.federation != "fedavg" and e.client_state != "averaged" and e.optimizer != "cma-es":
        raise ValueError(f"--client-state {e.client_state} is of --federation fedavg, got {e.federation}")
    if e.federation == "isolated" and e.server_optimizer != "none":
        raise ValueError("--server-optimizer has nothing to do where clients never talk, got --federation isolated")
    if is_of_texts(e) != (e.generator in TEXT_GENERATORS):
        kind = "texts" if is_of_texts(e) else "images"
        raise ValueError(f"--generator {e.generator} is not for {kind}, got task {e.task}")
    if (e.estimator in POLICIES) != (e.generator == "tokens"):
        raise ValueError(
            f"--generator tokens goes with --estimator {' or '.join(POLICIES)}, got {e.generator} and {e.estimator}"
        )
    if e.optimizer == "fedbpt" and e.generator == "deep":
        raise ValueError("--optimizer fedbpt is of one search, not one in each layer, got --generator deep: cma-es")
    if e.optimizer in EVOLUTION and e.generator == "tokens":
        raise ValueError(f"--optimizer {e.optimizer} is not for words, got --generator tokens")
    if e.optimizer == "cma-es" and e.client_state == "averaged":
        raise ValueError("--client-state averaged has no mean for covariances, got --optimizer cma-es: kept or reset")
    if e.optimizer == "fedbpt" and (e.federation, e.client_state, e.server_optimizer) != ("fedavg", "averaged", "none"):
        raise ValueError(
            "--optimizer fedbpt is a federation of its own: it takes no --federation, --client-state or "
            "--server-optimizer"
        )


def _check_served(e: ResolvedExperiment) -> None:
    plain, s = e.served.api != "v2", e.served
    if e.url is None and s != ServedOptions():
        raise ValueError("--api, --prices, --max-tokens and --max-money are for a model behind a --url")
    if plain and not is_of_texts(e):
        raise ValueError(f"a --url is asked about images by --api v2, got --api {s.api}")
    if e.url is not None and e.generator == "deep":
        raise ValueError("a model behind a --url takes no prompt in each layer, got --generator deep")
    if plain and e.generator != "tokens":
        raise ValueError(f"--api {s.api} sends words: --estimator {' or '.join(POLICIES)}, got {e.estimator}")
    if plain and e.text.replaced:
        raise ValueError(f"--replaced is for token ids, got --api {s.api}")
    if s.max_money is not None and s.prices is None:
        raise ValueError("--max-money needs --prices")
    for name in ("max_tokens", "max_money"):
        if getattr(s, name) is not None and not 0 < getattr(s, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {getattr(s, name)}")


def _placement(e: Experiment) -> str:
    """Returns where rounds run: over several processes or accelerators where there are some, otherwise in one program.

    Raises:
      ValueError: there are more devices than clients to spread over them.
    """
    num_devices = jax.device_count()
    if num_devices > e.num_clients and (e.placement == "shard" or jax.process_count() > 1):
        raise ValueError(f"--placement shard needs a client for each of {num_devices} devices, got {e.num_clients}")
    if e.placement != "auto" or e.url is not None:
        return e.placement if e.url is None else "host"
    spread = jax.process_count() > 1 or (num_devices > 1 and jax.default_backend() != "cpu")
    return "shard" if spread and num_devices <= e.num_clients else "compile"
