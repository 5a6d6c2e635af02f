"""Query efficiency: test accuracy against requests, over seeds 0-4, of the default and of other estimators.

    python experiments/estimators_on_task.py

BlackVIP's SPSA-GC has its published defaults (c = 0.01, momentum, decays) and the step size that is best on validation
data of seeds 100-102 (`--tune` prints the grid). Budgets are separate runs, each with its own schedule, so that the
test part is used once per run. Writes `experiments/figures/estimators_on_task.png`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.report import STYLE, format_mean
from fedbbpt_jax.training.run import run

SEEDS, TUNING_SEEDS = range(5), range(100, 103)
BUDGETS = (16_000, 32_000, 64_000)
SPSA_GC = Experiment(estimator="spsa-gc", lr=0.002)
METHODS = {
    "default": Experiment(),
    "Hadamard directions": Experiment(estimator="spsa-hadamard"),
    "SPSA-GC, step 0.002": SPSA_GC,
}
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02)
FIGURE = Path(__file__).parent / "figures" / "estimators_on_task.png"


@dataclass(frozen=True)
class Options:
    """What to do.

    Attributes:
      tune: print validation accuracies over the steps of SPSA-GC instead.
    """

    tune: bool = False


def main() -> None:
    if tyro.cli(Options).tune:
        for lr in STEPS:
            found = [run(replace(SPSA_GC, lr=lr, seed=seed)).rows[-1]["accuracy"] for seed in TUNING_SEEDS]
            print(f"SPSA-GC, step {lr}: validation {format_mean(found)} %", flush=True)
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.0, 4.0))
        for label, experiment in METHODS.items():
            requests, accuracies = zip(*(outcomes(label, experiment, budget) for budget in BUDGETS), strict=True)
            values = 100 * np.array(accuracies)  # [budgets, seeds]
            interval = 1.96 * values.std(1, ddof=1) / np.sqrt(len(SEEDS))
            axes.errorbar(np.array(requests) / 1000, values.mean(1), yerr=interval, marker="o", capsize=3, label=label)
        axes.set(xscale="log", xlabel="requests, thousands (all clients)", ylabel="test accuracy, %, 95 % interval")
        axes.set_xticks([budget / 1000 for budget in BUDGETS], [f"{budget // 1000}" for budget in BUDGETS])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        figure.savefig(FIGURE)


def outcomes(label: str, experiment: Experiment, budget: int) -> tuple[int, list[float]]:
    """Returns the requests of one run and the test accuracy of each seed."""
    runs = [run(replace(experiment, budget=budget, seed=seed)).summary for seed in SEEDS]
    accuracies = [summary["test_accuracy"] for summary in runs]
    print(f"{label}, {runs[0]['num_requests']:,} requests: test {format_mean(accuracies)} %", flush=True)
    return runs[0]["num_requests"], accuracies


if __name__ == "__main__":
    main()
