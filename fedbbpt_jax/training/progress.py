"""What a run has reached: the server's state, counts and rows of metrics, saved so that another process can go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedbbpt_jax.errors import CorruptCheckpointError
from fedbbpt_jax.federated.mesh import here
from fedbbpt_jax.federated.round import RoundInfo
from fedbbpt_jax.prompts.soft import Projected, check_fingerprint, fingerprint
from fedbbpt_jax.training.checkpoint import Checkpoint, restore, save
from fedbbpt_jax.training.evaluate import Evaluation, together
from fedbbpt_jax.training.prepare import Setup
from fedbbpt_jax.training.processes import speaks
from fedbbpt_jax.types import Examples, Params, PyTree

Row = dict[str, Any]
COUNTS = ("round", "num_evaluations", "num_requests", "num_valid", "uplink_bytes", "downlink_bytes")


@dataclass
class Progress:
    """What a run has reached.

    Attributes:
      setup: of the run.
      started: by the clock; earlier by what was spent before a resume.
      server: its state.
      counts: of rounds, queries and bytes.
      rows: one for each evaluation on validation data.
      num_eval_requests: what those took.
    """

    setup: Setup
    started: float
    server: PyTree = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    rows: list[Row] = field(default_factory=list)
    num_eval_requests: int = 0

    def __post_init__(self) -> None:
        """Starts from the server's first state."""
        self.server = self.setup.server

    @property
    def num_segments(self) -> int:
        """How many segments of rounds were played; each ends in a row, and one row comes before all."""
        return max(0, len(self.rows) - 1)

    def count(self, server: PyTree, info: RoundInfo, num_rounds: int) -> None:
        """Takes the server's state after a segment of rounds, and adds what they cost."""
        down, up = self.setup.payload
        added = {
            name: int(here(getattr(info, name)).sum()) for name in ("num_evaluations", "num_requests", "num_valid")
        }
        came = int(here(info.num_clients).sum())
        added |= {"round": num_rounds, "uplink_bytes": came * up, "downlink_bytes": came * down}
        self.counts = {name: value + added[name] for name, value in self.counts.items()}
        self.server = server

    def add_row(self) -> Row:
        """Returns a new row, evaluated on validation data."""
        result = evaluate_on(self.setup, self.server, self.setup.validation)
        self.num_eval_requests += int(result.num_requests)
        figures = {"loss": float(result.loss), "accuracy": float(result.accuracy)}
        seconds = time.perf_counter() - self.started
        self.rows.append({**self.counts, **figures, "wall_seconds": seconds, "seed": self.setup.experiment.seed})
        return self.rows[-1]


def begin(runs: Sequence[Progress], folder: Path | None, on_row: Callable[[int, Row], None]) -> None:
    """Takes up runs that are played together where their last checkpoint left them, or evaluates their start.

    Args:
      runs: at their start.
      folder: of their checkpoints; None where there are none.
      on_row: called with the number of a run and each row that it has by now.

    Raises:
      CorruptCheckpointError: all checkpoints are damaged, or of other runs.
    """
    found = None if folder is None else restore(folder, [here(run.server) for run in runs])
    for i, run in enumerate(runs):
        if found is None:
            run.add_row()
        else:
            _take_up(run, found.arrays[i], found.progress[i], found.step)
    for rows in zip(*(run.rows for run in runs), strict=True):
        for i, row in enumerate(rows):
            on_row(i, row)


def keep(runs: Sequence[Progress], folder: Path | None) -> None:
    """Saves what runs that are played together have reached after a segment; the process that speaks does it."""
    if folder is None or not speaks():
        return
    reached = [
        {
            "experiment": repr(run.setup.experiment),
            "counts": run.counts,
            "rows": run.rows,
            "num_eval_requests": run.num_eval_requests,
            "seconds": time.perf_counter() - run.started,
            "projection": _projection_seen(run.setup),
            "journal": None if run.setup.ledger is None else list(run.setup.ledger.position()),
        }
        for run in runs
    ]
    save(folder, Checkpoint(runs[0].num_segments, [here(run.server) for run in runs], reached))


def _take_up(run: Progress, server: PyTree, reached: Any, step: int) -> None:
    if reached["experiment"] != repr(run.setup.experiment):
        raise CorruptCheckpointError("the checkpoint is of another experiment: config.json was changed")
    if isinstance(run.setup.box, Projected):
        check_fingerprint(run.setup.box.projection, np.asarray(reached["projection"]))
    run.server, run.counts, run.rows = server, reached["counts"], reached["rows"]
    run.num_eval_requests, run.started = reached["num_eval_requests"], time.perf_counter() - reached["seconds"]
    if run.num_segments != step:
        raise CorruptCheckpointError(f"checkpoint {step} has rows of {run.num_segments} segments")


def _projection_seen(setup: Setup) -> list[float] | None:
    """Returns the fingerprint of the projection of soft prompts, where there is one."""
    return np.asarray(fingerprint(setup.box.projection)).tolist() if isinstance(setup.box, Projected) else None


def evaluate_on(setup: Setup, server: PyTree, parts: Sequence[Examples]) -> Evaluation:
    """Returns the accuracy and loss of a server's prompts on held-out examples."""
    params = outcome_params(setup, server)
    with setup.counted_as("evaluation"):
        return together([setup.programs.evaluate(setup.box, params, part) for part in parts])


def outcome_params(setup: Setup, server: PyTree) -> Params:
    """Returns the parameters to evaluate, `[M, ...]`."""
    method = setup.programs.method
    return jax.vmap(method.optimizer.solution)(method.federation.outcomes(here(server)))
