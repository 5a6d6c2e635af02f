"""Figures and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from fedbbpt_jax.models.classifiers import as_float
from fedbbpt_jax.training.compare import SeedResult, recovered_share
from fedbbpt_jax.training.run import Outcome

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, nan for a single value.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def format_mean(values: Sequence[float]) -> str:
    """Returns "mean ± standard error" of accuracies in per cent.

    >>> format_mean([0.90, 0.92])
    '91.0 ± 1.0'
    """
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" if np.isnan(error) else f"{100 * mean:.1f} ± {100 * error:.1f}"


def write_accuracy_figure(path: Path, results: Sequence[SeedResult]) -> None:
    """Writes validation accuracy against requests, a line per run and a band of one standard error over seeds.

    Zero-shot and, where it is known, the white-box ceiling are drawn across.
    """
    labels = list(results[0].outcomes)
    complete = [r for r in results if list(r.outcomes) == labels]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 4.4) if len(labels) > 1 else (6.0, 3.8))
        for label in labels:
            runs = [r.outcomes[label].rows for r in complete]
            length = min(map(len, runs))
            requests = np.array([row["num_requests"] for row in runs[0][:length]]) / 1000
            accuracy = 100 * np.array([[row["accuracy"] for row in rows[:length]] for rows in runs])
            (line,) = axes.plot(requests, accuracy.mean(0), marker="o", markersize=3, label=label)
            if len(runs) > 1:
                error = accuracy.std(0, ddof=1) / np.sqrt(len(runs))
                axes.fill_between(
                    requests, accuracy.mean(0) - error, accuracy.mean(0) + error, color=line.get_color(), alpha=0.15
                )
        across = {"zero-shot": [r.outcomes[labels[0]].rows[0]["accuracy"] for r in complete]}
        across |= {"white-box": [r.white_box.validation_accuracy for r in complete if r.white_box is not None]}
        for (label, values), style in zip(across.items(), (":", "--"), strict=True):
            if values:
                axes.axhline(100 * float(np.mean(values)), color="0.3", linestyle=style, linewidth=1.2, label=label)
        axes.set(xlabel="requests to the black box, thousands (all clients)", ylabel="validation accuracy, %")
        axes.set(xlim=(0, None), ylim=(None, 100))
        if len(labels) > 1:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        else:
            axes.legend(fontsize=9, loc="lower right", frameon=False)
        _save(figure, path)


def write_prompt_figure(path: Path, outcome: Outcome) -> None:
    """Writes clean images, what the client has, the prompt and what the black box sees, side by side."""
    prompts = outcome.prompts
    num_images = len(prompts)
    shifted = np.asarray(as_float(outcome.task.test.inputs[:num_images]))
    prompted = np.clip(shifted + prompts, 0, 1)
    reach = max(float(np.abs(prompts).max()), 1e-6)
    clean = outcome.task.clean_test_inputs
    rows = {
        **({} if clean is None else {"clean": clean[:num_images]}),
        "as received": shifted,
        f"prompt (±{reach:.2f})": 0.5 + prompts / (2 * reach),
        "prompted": prompted,
    }
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, grid = plt.subplots(
            len(rows), num_images, figsize=(1.1 * num_images + 1.0, 1.1 * len(rows) + 0.5), squeeze=False
        )
        for (label, images), axes_row in zip(rows.items(), grid, strict=True):
            for image, axes in zip(images, axes_row, strict=True):
                axes.imshow(image, vmin=0, vmax=1, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        summary = outcome.summary
        figure.suptitle(
            f"{summary['task']}: test accuracy {summary['zero_shot_accuracy']:.1%} → {summary['test_accuracy']:.1%}",
            fontsize=10,
        )
        _save(figure, path)


def heading(results: Sequence[SeedResult]) -> str:
    """Returns one line that says what was run."""
    e = next(iter(results[0].outcomes.values())).experiment
    seeds = ", ".join(str(next(iter(r.outcomes.values())).experiment.seed) for r in results)
    return f"{e.task}: {e.num_clients} clients, {e.partition}, {e.shots} shots per class, seed {seeds}"


def sweep_table(results: Sequence[SeedResult]) -> Table:
    """Returns one line per step size: validation accuracy, mean over seeds. The test part is not for choices."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("validation acc. %", justify="right", no_wrap=True)
    for label in results[0].outcomes:
        table.add_row(label, format_mean([r.outcomes[label].rows[-1]["accuracy"] for r in results]))
    return table


def summary_table(results: Sequence[SeedResult]) -> Table:
    """Returns one line per run: test accuracy, share of the white-box gain, requests, bytes and seconds.

    Accuracies are means over seeds, with standard errors; requests and bytes are those of one seed.
    """
    outcomes = {label: [r.outcomes[label] for r in results if label in r.outcomes] for label in results[0].outcomes}
    ceilings = [r.white_box for r in results if r.white_box is not None]
    first = next(iter(outcomes.values()))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("test acc. %", "of gain %", "requests", "bytes up", "seconds"):
        if ceilings or name != "of gain %":
            table.add_column(name, justify="right", no_wrap=True)
    table.add_row("zero-shot", format_mean([o.summary["zero_shot_accuracy"] for o in first]))
    for label, runs in outcomes.items():
        summary = runs[0].summary
        shares = [recovered_share(run, ceiling) for run, ceiling in zip(runs, ceilings, strict=False)]
        shares = [share for share in shares if share is not None]
        table.add_row(
            label,
            format_mean([o.summary["test_accuracy"] for o in runs]),
            *([format_mean(shares) if shares else "–"] if ceilings else []),
            f"{summary['num_requests']:,}",
            f"{summary['uplink_bytes']:,}",
            f"{np.mean([o.summary['wall_seconds'] for o in runs]):.1f}",
        )
    if ceilings:
        table.add_row("white-box", format_mean([c.test_accuracy for c in ceilings]))
    return table


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
