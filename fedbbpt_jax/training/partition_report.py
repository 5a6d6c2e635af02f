"""Who holds what, for people: a table, a summary and a figure of a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from rich.markup import escape
from rich.table import Table

from fedbbpt_jax.training.report import STYLE

MAX_CLIENTS = 20
"""Lines of a table, and columns of a figure that have room for numbers."""
MAX_CLASSES = 12
"""Classes with a column of their own; of more, a client's largest three are named."""
MAX_COLUMNS = 60
"""Clients with a column of their own in a figure."""
MAX_GROUPS = 500
"""Columns of a figure of more clients than that: each is the mean of neighbours."""
MAX_NAMES = 30
"""Classes named in a figure, evenly spaced where there are more."""
COLOUR = "#4a86b8"
"""Of the bars: from the middle of the heat map's scale."""


def class_counts(parts: Sequence[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns how many examples of each class each client holds, int `[C, N]`.

    Example:
      >>> class_counts([np.array([0, 2]), np.array([1])], np.array([0, 1, 1]), 2).tolist()
      [[1, 1], [0, 1]]
    """
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    cells = owners * num_classes + np.asarray(labels)[np.concatenate(parts)]
    return np.bincount(cells, minlength=len(parts) * num_classes).reshape(len(parts), num_classes)


def partition_summary(
    parts: Sequence[np.ndarray], labels: np.ndarray, num_classes: int, packing_waste: float | None = None
) -> dict[str, Any]:
    r"""Returns what a record says of a split.

    The distance of client j is the total variation $\frac12 \sum_k |p_{jk} - p_k|$ between its class shares and those
    of all data: 0 where they agree, near 1 where it holds nothing but a rare class. Small clients are at a distance
    even where labels are IID.

    Args:
      parts: the rows of each client.
      labels: int `[n]`.
      num_classes: N.
      packing_waste: the share of packed rows that repeat others because clients have unequal sizes; left out if None.

    Example:
      >>> partition_summary([np.array([0]), np.array([1, 2, 3])], np.array([0, 0, 1, 1]), 2)
      {'num_clients': 2, 'min_examples': 1, 'median_examples': 2.0, 'max_examples': 3,
       'mean_classes': 1.5, 'mean_distance': 0.3333333333333333}
    """
    counts = class_counts(parts, labels, num_classes)
    sizes = counts.sum(1)
    distances = np.abs(counts / sizes[:, None] - counts.sum(0) / sizes.sum()).sum(1) / 2
    summary = {
        "num_clients": len(parts),
        "min_examples": int(sizes.min()),
        "median_examples": float(np.median(sizes)),
        "max_examples": int(sizes.max()),
        "mean_classes": float((counts > 0).sum(1).mean()),
        "mean_distance": float(distances.mean()),
    }
    return summary if packing_waste is None else summary | {"packing_waste": float(packing_waste)}


def partition_table(parts: Sequence[np.ndarray], labels: np.ndarray, class_names: Sequence[str]) -> Table:
    """Returns one line per client: its examples of each class, and of all.

    Of many classes a line has the number that the client holds, and the largest three by name. Of many clients it
    shows the first `MAX_CLIENTS`, and below them quantiles of all.
    """
    counts = class_counts(parts, labels, len(class_names))
    sizes, held = counts.sum(1), (counts > 0).sum(1)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", caption_justify="left", caption_style="")
    named = len(class_names) > MAX_CLASSES
    table.add_column("client", justify="right", no_wrap=True)
    digits = len(f"{counts.max():,}")  # a long name is broken, a number never
    for name in ("classes",) if named else class_names:
        table.add_column(escape(name), justify="right", min_width=digits, overflow="fold")
    table.add_column("total", justify="right", no_wrap=True)
    if named:
        table.add_column("most of")
    for client, row in enumerate(counts[:MAX_CLIENTS]):
        total = f"{sizes[client]:,}"
        if named:
            largest = [int(k) for k in np.argsort(-row, kind="stable")[:3] if row[k]]
            words = ", ".join(f"{escape(class_names[k])}: {row[k]:,}" for k in largest)
            table.add_row(f"{client}", f"{held[client]}", total, words)
        else:
            table.add_row(f"{client}", *(f"{count:,}" if count else "·" for count in row), total)
    if len(parts) > MAX_CLIENTS:
        table.caption = _closing_lines(sizes, held)
    return table


def write_partition_figure(
    path: Path, parts: Sequence[np.ndarray], labels: np.ndarray, class_names: Sequence[str]
) -> None:
    """Writes the clients' class shares as a heat map, clients across and classes down, and their sizes above it.

    Up to `MAX_COLUMNS` clients have a column each, in their own order. More are sorted by their largest class and
    its share, and their sizes from the largest.
    """
    counts = class_counts(parts, labels, len(class_names))
    many = len(parts) > MAX_COLUMNS
    with plt.rc_context(STYLE):
        width, height = min(9.0, max(5.0, 2.2 + 0.55 * len(parts))), min(7.0, max(4.0, 2.4 + 0.3 * len(class_names)))
        figure, axes = plt.subplot_mosaic(
            [["sizes", "."], ["shares", "scale"]],
            figsize=(width, height),
            height_ratios=(1, max(1.0, height / 1.4 - 1)),
            width_ratios=(1, 0.1 / width),
        )
        _draw_sizes(axes["sizes"], counts.sum(1), many)
        image = _draw_shares(axes["shares"], counts, class_names, many)
        scale = figure.colorbar(image, cax=axes["scale"], format=lambda share, _: f"{100 * share:.3g} %")
        scale.outline.set_visible(False)
        axes["scale"].set_ylabel("of the client's examples", fontsize=9)
        axes["scale"].grid(visible=False)
        figure.savefig(path)
        plt.close(figure)


def _draw_sizes(axes: Axes, sizes: np.ndarray, many: bool) -> None:
    """Draws a bar per client, or of many the curve of sizes from the largest."""
    if many:
        axes.stairs(-np.sort(-sizes), fill=True, color=COLOUR)
        axes.set_xlabel("clients, largest first")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if sizes.max() > 20 * np.median(sizes):
            axes.set(yscale="log")
    else:
        axes.bar(np.arange(len(sizes)), sizes, width=0.8, color=COLOUR)
        axes.tick_params(labelbottom=False, length=0, axis="x")
    axes.set(xlim=(0, len(sizes)) if many else (-0.5, len(sizes) - 0.5), ylabel="examples")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)


def _draw_shares(axes: Axes, counts: np.ndarray, class_names: Sequence[str], many: bool) -> AxesImage:
    """Draws the shares `[N, C]`, of many clients in groups of neighbours; where there is room, the counts in cells."""
    shares = counts / counts.sum(1, keepdims=True)
    num_clients, num_classes = counts.shape
    left = 0.0 if many else -0.5
    if many:
        shares = shares[np.lexsort((-shares.max(1), shares.argmax(1)))]
        shares = np.stack([group.mean(0) for group in np.array_split(shares, min(num_clients, MAX_GROUPS))])
    extent = (left, left + num_clients, num_classes - 0.5, -0.5)
    image = axes.imshow(shares.T, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest", extent=extent)
    axes.set_xlabel("clients, sorted by their largest class" if many else "client")
    step = -(-num_classes // MAX_NAMES)
    axes.set_yticks(range(0, num_classes, step), list(class_names)[::step], fontsize=8)
    if not many:
        axes.set_xticks(range(0, num_clients, 1 if num_clients <= 20 else 5))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    if not many and num_classes <= MAX_NAMES:  # white lines between the cells
        axes.set_xticks(np.arange(num_clients + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1, alpha=1)
    if num_clients <= MAX_CLIENTS and num_classes <= MAX_NAMES:
        for client, label in np.argwhere(counts):
            colour = "white" if shares[client, label] > 0.6 * shares.max() else "0.2"
            count = f"{counts[client, label]:,}"
            axes.text(client, label, count, ha="center", va="center", fontsize=7.5, color=colour)
    return image


def _closing_lines(sizes: np.ndarray, held: np.ndarray) -> str:
    """Returns what a table says of clients that it does not show."""
    low, tenth, middle, ninth, high = np.quantile(sizes, (0, 0.1, 0.5, 0.9, 1))
    return (
        f"… and {len(sizes) - MAX_CLIENTS:,} more. Examples of a client: {low:,.0f} at least, {tenth:,.0f} at 10 %, "
        f"{middle:,.0f} median, {ninth:,.0f} at 90 %, {high:,.0f} at most; {held.mean():.1f} classes on average"
    )
