"""What a variance study leaves behind: a table, a figure and a parquet file."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from fedbbpt_jax.training.laboratory import Findings, Row
from fedbbpt_jax.training.report import STYLE


def study_table(findings: Findings) -> Table:
    """Returns one line per estimator and q; squared errors relative to the gradient's, ± one standard error."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("estimator", "q", "evals", "error", "directions", "theory", "cosine"):
        table.add_column(name, justify="left" if name == "estimator" else "right", no_wrap=True)
    for row in findings.rows:
        table.add_row(
            row["estimator"],
            f"{row['num_directions']}",
            f"{row['num_evaluations']}",
            _with_error(row, "mse"),
            _with_error(row, "directions"),
            "–" if row["theory"] is None else f"{row['theory']:.3g}",
            f"{row['cosine']:.3f}",
        )
    return table


def closing_lines(findings: Findings) -> list[str]:
    """Returns what all estimators share, and the best perturbation size of each."""
    shared = ", ".join(f"{name} {_with_error(findings.rows[0], name)}" for name in ("minibatch", "clients"))
    swept = [row["perturbation_size"] for row in findings.sweep]
    edges = {min(swept): " or less", max(swept): " or more"}
    sizes = ", ".join(f"{name} {size:.2g}{edges.get(size, '')}" for name, size in findings.best_sizes.items())
    return [f"of every error: {shared} ({findings.num_parameters} parameters)", f"best perturbation size: {sizes}"]


def write_parquet(path: Path, findings: Findings) -> None:
    """Writes both tables, told apart by the column `table`: directions or sizes."""
    rows = [{"table": "directions", **row} for row in findings.rows]
    rows += [{"table": "sizes", **row} for row in findings.sweep]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_study_figure(path: Path, findings: Findings) -> None:
    """Writes error against evaluations with theory, and perturbation error against perturbation size, log-log."""
    names = list(findings.best_sizes)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.4))
        for i, name in enumerate(names):
            style = {"color": f"C{i}", "marker": "os^Dv<>"[i % 7], "markersize": 4}
            own = [row for row in findings.rows if row["estimator"] == name]
            evaluations = [row["num_evaluations"] for row in own]
            values, errors = ([row[c] for row in own] for c in ("directions", "directions_error"))
            left.errorbar(evaluations, values, yerr=errors, linestyle="none", label=name, **style)
            theory = [(k, row["theory"]) for k, row in zip(evaluations, own, strict=True) if row["theory"]]
            if theory:
                left.plot(*zip(*theory, strict=True), color=style["color"], linewidth=1)
            swept = [row for row in findings.sweep if row["estimator"] == name]
            sizes = [row["perturbation_size"] for row in swept]
            right.plot(sizes, [_shown(row["perturbation"]) for row in swept], linewidth=1, **style)
            floor = [_shown(row["api"]) for row in swept]
            right.plot(sizes, floor, color=style["color"], linewidth=1, linestyle=":")
        left.set(xscale="log", yscale="log", xlabel="evaluations of one estimate", ylabel="error of directions / ‖g‖²")
        left.set_title("points: measured, lines: theory", fontsize=10)
        left.legend(fontsize=8, frameon=False)
        right.set(xscale="log", yscale="log", xlabel="perturbation size", ylabel="perturbation error / ‖g‖²")
        right.set_title("dotted: the API's part", fontsize=10)
        figure.savefig(path)
        plt.close(figure)


def _with_error(row: Row, name: str) -> str:
    """Returns value ± standard error, to the first digit of the error."""
    value, error = row[name], row[f"{name}_error"]
    if abs(value) < 1e-4:
        return f"{value:.0e}"
    digits = max(0, -math.floor(math.log10(max(error, 1e-6))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _shown(value: float) -> float:
    """Returns a value for a logarithmic axis; what is exactly 0 is not drawn."""
    return value if value > 0 else np.nan
