"""Chooses settings on validation data: of the method, of every baseline, of the harder tasks. Never on test data.

    python experiments/tune.py method
    python experiments/tune.py centralised spsa-gc white-box local

Prints one line per setting: validation accuracy over the tuning seeds 100-102, which no reported result uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import jax
import tyro

from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.training.build import build_generator
from fedbbpt_jax.training.compare import variants
from fedbbpt_jax.training.evaluate import compile_evaluation
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.load import load_classifier, prompt_sizes
from fedbbpt_jax.training.prepare import on_device
from fedbbpt_jax.training.report import format_mean
from fedbbpt_jax.training.resolve import resolve
from fedbbpt_jax.training.run import run
from fedbbpt_jax.training.white_box import compile_white_box

Grid = dict[str, list[Any]]
Section = Literal[
    "method", "batch", "one-sided", "quarter", "centralised", "spsa-gc", "local", "coordinator", "loc", "white-box"
]

DEFAULT = Experiment()
BASELINES = variants(DEFAULT)
GRIDS: dict[str, tuple[Experiment, Grid]] = {
    "method": (DEFAULT, {"perturbation_size": [0.03, 0.05, 0.1], "lr": [0.02, 0.03, 0.05]}),
    "batch": (DEFAULT, {"batch_size": [2, 4, 8], "num_directions": [2, 5]}),
    "one-sided": (replace(DEFAULT, estimator="spsa-one-sided", num_directions=9), {"lr": [0.02, 0.03, 0.05]}),
    "quarter": (replace(DEFAULT, budget=16_000), {"lr": [0.02, 0.03, 0.05]}),
    "centralised": (BASELINES["centralised"], {"lr": [0.01, 0.02, 0.03, 0.05]}),
    "spsa-gc": (
        BASELINES["SPSA-GC tuned"],
        {"perturbation_size": [0.01, 0.05], "lr": [0.001, 0.002, 0.005, 0.01, 0.02]},
    ),
    "local": (BASELINES["local only"], {"lr": [0.003, 0.01, 0.03]}),
    "coordinator": (replace(DEFAULT, generator="coordinator"), {"lr": [0.01, 0.03, 0.05]}),
    "loc": (
        replace(DEFAULT, task="loc", partition="iid", budget=200_000, perturbation_size=0.1),
        {"lr": [0.05, 0.1, 0.2]},
    ),
}


@dataclass(frozen=True)
class Tuning:
    """Which settings to try.

    Attributes:
      sections: one or several.
      seeds: of shots, partition and directions.
    """

    sections: tyro.conf.Positional[tuple[Section, ...]]
    seeds: tuple[int, ...] = (100, 101, 102)


def white_box(seeds: tuple[int, ...]) -> None:
    for num_steps, rate in product([60, 150, 400], [0.01, 0.03, 0.1]):
        accuracies = []
        for seed in seeds:
            e = resolve(replace(DEFAULT, seed=seed))
            task = load_task(e.task, shots=e.shots, seed=seed)
            classifier, generator = load_classifier(e, task), build_generator(e, prompt_sizes(e, task))
            settings = {"num_steps": num_steps, "learning_rate": rate}
            tune = compile_white_box(generator, cross_entropy, **settings)
            params = tune(classifier, generator.init(jax.random.key(seed)), on_device(task.train))
            evaluate = compile_evaluation(generator, cross_entropy)
            model = jax.tree.map(lambda x: x[None], params)
            accuracies.append(float(evaluate(classifier, model, on_device(task.validation)).accuracy))
        print(f"white-box {settings}: {format_mean(accuracies)}", flush=True)


def black_box(section: str, seeds: tuple[int, ...]) -> None:
    base, grid = GRIDS[section]
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        runs = [run(replace(base, seed=seed, **settings)).summary for seed in seeds]
        accuracies = [summary["validation_accuracy"] for summary in runs]
        print(f"{section} {settings}: {format_mean(accuracies)} %, {runs[0]['num_requests']:,} requests", flush=True)


def main(tuning: Tuning) -> None:
    for section in tuning.sections:
        white_box(tuning.seeds) if section == "white-box" else black_box(section, tuning.seeds)


if __name__ == "__main__":
    main(tyro.cli(Tuning))
