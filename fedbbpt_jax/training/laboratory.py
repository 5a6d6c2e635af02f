"""The variance study: many estimators on one landscape, beside theory and over perturbation sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fedbbpt_jax.black_box import faults
from fedbbpt_jax.black_box.frozen import Precision
from fedbbpt_jax.estimators.catalogue import find_estimator
from fedbbpt_jax.estimators.quadratic import quadratic_landscape
from fedbbpt_jax.estimators.variance import (
    Landscape,
    Measurement,
    Trials,
    best_perturbation_size,
    draw_trials,
    measure_sizes,
)
from fedbbpt_jax.federated.cohort import pack
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.training.build import build_generator
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.landscape import task_landscape
from fedbbpt_jax.training.load import load_classifier, load_experiment_task, prompt_sizes, split_among_clients
from fedbbpt_jax.training.resolve import resolve

Row = dict[str, Any]
QUADRATIC = "quadratic"
SIZES_AROUND = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Study:
    """What is measured, and where.

    Attributes:
      task: an image task (`fedbbpt list tasks`), or quadratic: 64 dimensions with a known gradient, without a model.
      data: images of your own, as for `fedbbpt run`.
      model: the frozen CLIP, as for `fedbbpt run`; the true gradient is by autodiff through it.
      generator: the prompt whose parameters are perturbed, at its start.
      encoder: of a coordinator, as for `fedbbpt run`.
      num_clients: clients that hold the data.
      partition: iid, or dirichlet:ALPHA by label.
      shots: training examples per class, over all clients.
      estimators: names separated by commas (`fedbbpt list estimators`), or module:factory of your own.
      num_directions: q, separated by commas.
      perturbation_size: c of the first table; the sweep goes from 0.003 to 10 times it.
      trials: estimates per estimator and q.
      batch_size: examples of a minibatch.
      answers: what the API does to its scores (of quadratic: losses): exact, decimals:N, bfloat16 or noise:DEVIATION.
      precision: of the frozen model's matrix products.
      seed: of everything.
    """

    task: str = "sensor"
    data: str | None = None
    model: str = "mini-clip"
    generator: Literal["low-resolution", "full", "frame", "coordinator"] = "low-resolution"
    encoder: str | None = None
    num_clients: int = 5
    partition: str = "dirichlet:0.3"
    shots: int = 16
    estimators: str = "spsa,spsa-one-sided,spsa-segmented,spsa-gaussian,spsa-coordinate,spsa-hadamard"
    num_directions: str = "1,4,16,64"
    perturbation_size: float = 0.05
    trials: int = 200
    batch_size: int = 1
    answers: str = "exact"
    precision: Precision = "highest"
    seed: int = 0


class Findings(NamedTuple):
    """What a study found.

    Attributes:
      rows: of the first table, one per estimator and q: every `Measurement` with its error, and `theory`, the variance
        of the directions' part by theory (None where there is no closed form).
      sweep: one per estimator and perturbation size, at the smallest q.
      best_sizes: estimator to the perturbation size of least perturbation error, within the sweep.
      num_parameters: d.
    """

    rows: list[Row]
    sweep: list[Row]
    best_sizes: dict[str, float]
    num_parameters: int


def prepare_study(study: Study) -> Landscape:
    """Returns the landscape of a study; nothing is measured.

    Raises:
      ValueError, TaskError, CheckpointError: the study cannot be made as described.
    """
    _parse(study)
    return _landscape(study)


def run_study(study: Study, landscape: Landscape, on_row: Callable[[str], None] = lambda line: None) -> Findings:
    """Returns the findings of a study.

    Args:
      study: what to measure.
      landscape: where, made by `prepare_study`.
      on_row: called with a line on what comes next.
    """
    names, counts = _parse(study)
    trials = draw_trials(landscape, jax.random.key(study.seed), study.trials)

    def measured(name: str, q: int) -> list[Row]:
        on_row(f"{name}, {q} directions")
        return _measure_factors(study, landscape, trials, name, q, SIZES_AROUND if q == counts[0] else (1.0,))

    with ThreadPoolExecutor(max_workers=2) as pool:  # one is compiled while another is evaluated
        found = list(pool.map(measured, *zip(*product(names, counts), strict=True)))
    rows = [row for of_cell in found for row in of_cell if row["perturbation_size"] == study.perturbation_size]
    sweep = [row for of_cell in found if len(of_cell) > 1 for row in of_cell]
    return Findings(rows, sweep, dict(_best_sizes(sweep)), len(trials.of_all))


def _measure_factors(
    study: Study, landscape: Landscape, trials: Trials, name: str, q: int, factors: Sequence[float]
) -> list[Row]:
    """Returns a row for each multiple of the study's perturbation size."""
    entry = find_estimator(name)
    sizes = [factor * study.perturbation_size for factor in factors]
    measured = measure_sizes(landscape, lambda c: entry.build(q, c), sizes, trials, num_warmup=entry.num_warmup)
    share = float((trials.of_batch**2).sum(1).mean() / (trials.of_all @ trials.of_all))  # E‖g_b‖² / ‖g‖²
    theory = None if entry.directions is None else entry.directions(q).variance(len(trials.of_all), q) * share
    common = {"task": study.task, "batch_size": study.batch_size, "answers": study.answers, "trials": study.trials}
    return [
        {"estimator": name, "num_directions": q, "perturbation_size": size, **_flat(m), "theory": theory, **common}
        for size, m in zip(sizes, measured, strict=True)
    ]


def _flat(measured: Measurement) -> Row:
    """Returns `name` and `name_error` for every mean."""
    flat: Row = {"num_evaluations": measured.num_evaluations}
    for name, mean in measured._asdict().items():
        if name != "num_evaluations":
            flat |= {name: mean.value, f"{name}_error": mean.error}
    return flat


def _best_sizes(sweep: list[Row]) -> Iterator[tuple[str, float]]:
    for name in dict.fromkeys(row["estimator"] for row in sweep):
        own = [row for row in sweep if row["estimator"] == name]
        sizes, errors = (np.array([row[column] for row in own]) for column in ("perturbation_size", "perturbation"))
        yield name, best_perturbation_size(sizes, errors)


def _parse(study: Study) -> tuple[list[str], list[int]]:
    try:
        counts = sorted({int(q) for q in study.num_directions.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ValueError(f"--num-directions must be numbers from 1, such as 1,4,16, got {study.num_directions!r}")
    if study.trials < 3:
        raise ValueError(f"--trials must be at least 3, got {study.trials}")
    if study.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {study.batch_size}")
    if not study.perturbation_size > 0:
        raise ValueError(f"--perturbation-size must be positive, got {study.perturbation_size}")
    names = list(dict.fromkeys(study.estimators.split(",")))
    for name in names:
        find_estimator(name)
    return names, counts


def _landscape(study: Study) -> Landscape:
    answer = _parse_answers(study.answers)
    if study.task == QUADRATIC:
        return quadratic_landscape(64, batch_size=study.batch_size, answer=answer, seed=study.seed)
    e = resolve(
        Experiment(
            task=None if study.data and study.task == Study.task else study.task,
            data=study.data,
            model=study.model,
            generator=study.generator,
            encoder=study.encoder,
            num_clients=study.num_clients,
            partition=study.partition,
            shots=study.shots,
            precision=study.precision,
            seed=study.seed,
        )
    )
    task = load_experiment_task(e)
    generator = build_generator(e, prompt_sizes(e, task))
    return task_landscape(
        generator,
        cross_entropy,
        load_classifier(e, task),
        pack(*split_among_clients(e, task)),
        generator.init(jax.random.key(study.seed)),
        batch_size=study.batch_size,
        answer=answer,
    )


def _parse_answers(text: str) -> faults.Answer:
    kind, _, value = text.partition(":")
    try:
        match kind:
            case "exact" | "bfloat16" if not value:
                return faults.exact() if kind == "exact" else faults.bfloat16()
            case "decimals":
                return faults.rounded(int(value))
            case "noise":
                return faults.noisy(float(value))
    except ValueError:
        pass
    raise ValueError(f"--answers must be exact, decimals:N, bfloat16 or noise:DEVIATION, got {text!r}")
