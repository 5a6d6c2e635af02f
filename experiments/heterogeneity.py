"""What unequal clients cost: federated, local-only and centralised tuning from IID labels to two classes per client.

    python experiments/heterogeneity.py

Seeds 0-4, 64,000 requests in all for every run. Local-only clients spend the same in total, with the step that is best
for them; the centralised run does not depend on who holds what. Writes `experiments/figures/heterogeneity.png`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from fedbbpt_jax.training.compare import variants
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.report import STYLE, format_mean
from fedbbpt_jax.training.run import run

SEEDS = range(5)
PARTITIONS = ("iid", "dirichlet:1", "dirichlet:0.3", "dirichlet:0.1", "dirichlet:0.05", "pathological:2")
FIGURE = Path(__file__).parent / "figures" / "heterogeneity.png"


def main() -> None:
    runs = variants(Experiment())
    found = {
        label: np.array([accuracies(f"{label}, {p}", replace(runs[label], partition=p)) for p in PARTITIONS])
        for label in ("federated", "local only")
    }
    centralised = np.array(accuracies("centralised", runs["centralised"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 4.0))
        for label, values in found.items():  # [partitions, seeds]
            error = values.std(1, ddof=1) / np.sqrt(len(SEEDS))
            axes.errorbar(PARTITIONS, 100 * values.mean(1), yerr=100 * error, marker="o", capsize=3, label=label)
        axes.axhline(100 * centralised.mean(), color="0.4", linestyle="--", linewidth=1, label="centralised")
        axes.set(xlabel="who holds what", ylabel="test accuracy, %, ± one standard error")
        axes.legend(frameon=False, fontsize=9, loc="lower left")
        figure.savefig(FIGURE)


def accuracies(label: str, experiment: Experiment) -> list[float]:
    """Returns the test accuracy of each seed."""
    values = [run(replace(experiment, seed=seed)).summary["test_accuracy"] for seed in SEEDS]
    print(f"{label}: test {format_mean(values)} %", flush=True)
    return values


if __name__ == "__main__":
    main()
