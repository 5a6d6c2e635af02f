"""One experiment from start to end: rounds between evaluations are one compiled program; only this loop is Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fedbbpt_jax.federated.placement import here
from fedbbpt_jax.training.evaluate import Evaluation
from fedbbpt_jax.training.experiment import Experiment, ResolvedExperiment
from fedbbpt_jax.training.prepare import Setup, prepare
from fedbbpt_jax.types import Examples, Params, PyTree, Task

Row = dict[str, Any]
NUM_SHOWN = 6


class Outcome(NamedTuple):
    """What a run leaves behind.

    Attributes:
      experiment: with everything resolved.
      task: its data.
      params: of the prompt generator, `[M, ...]`: one model, or one per client where clients stay apart.
      prompts: of the first model for the first NUM_SHOWN test images, `[NUM_SHOWN, H, W, 3]`, pixel units.
      rows: one per evaluation, as in `metrics.jsonl`.
      summary: as in `summary.json`.
    """

    experiment: Experiment
    task: Task
    params: Params
    prompts: np.ndarray
    rows: list[Row]
    summary: Row


def run(experiment: Experiment, on_row: Callable[[Row], None] = lambda row: None) -> Outcome:
    """Returns the outcome of an experiment; the test part is used for the two accuracies of the summary only.

    An interrupt (Ctrl-C) ends the rounds; what was reached is evaluated and returned, `stopped_by` says so.

    Args:
      experiment: what to run; sizes left out are resolved.
      on_row: called with each row of metrics as it comes.

    Raises:
      ValueError, TaskError, CheckpointError: the experiment cannot be run as described.
    """
    started = time.perf_counter()
    setup = prepare(experiment)
    server, rows = setup.server, []
    zero_shot = _evaluate(setup, server, setup.task.test)
    compile_seconds = _compile(setup)
    stopped_by = "rounds" if setup.experiment.num_rounds == experiment.num_rounds else "budget"
    try:
        for server, counts in _play(setup):
            result = _evaluate(setup, server, setup.task.validation)
            figures = {"loss": float(result.loss), "accuracy": float(result.accuracy)}
            seconds = time.perf_counter() - started
            rows.append({**counts, **figures, "wall_seconds": seconds, "seed": setup.experiment.seed})
            on_row(rows[-1])
    except KeyboardInterrupt:
        if not rows:
            raise
        stopped_by = "interrupted"
    final = _evaluate(setup, server, setup.task.test)
    summary = {
        "task": setup.experiment.task,
        "zero_shot_accuracy": float(zero_shot.accuracy),
        "test_accuracy": float(final.accuracy),
        "test_loss": float(final.loss),
        "validation_accuracy": rows[-1]["accuracy"],
        **counts,
        "num_eval_requests": len(rows) * int(result.num_requests) + 2 * int(final.num_requests),
        "wall_seconds": time.perf_counter() - started,
        "compile_seconds": compile_seconds,
        "stopped_by": stopped_by,
        "seed": setup.experiment.seed,
    }
    params = _params(setup, server)
    return Outcome(setup.experiment, setup.task, params, _shown_prompts(setup, params), rows, summary)


def _play(setup: Setup) -> Iterator[tuple[PyTree, Row]]:
    """Yields the server's state and the counts so far: before the first round, then after each segment."""
    server, (down, up) = setup.server, setup.payload
    counts: Row = {"round": 0, "num_evaluations": 0, "num_requests": 0, "num_valid": 0}
    yield server, {**counts, "uplink_bytes": 0, "downlink_bytes": 0}
    for rounds in _segments(setup.experiment):
        server, info = setup.programs.run_rounds(setup.rounds_box, server, setup.clients, setup.key, rounds)
        counts["round"] += int((rounds >= 0).sum())
        for name in ("num_evaluations", "num_requests", "num_valid"):
            counts[name] += int(here(getattr(info, name)).sum())
        yield server, {**counts, "uplink_bytes": counts["round"] * up, "downlink_bytes": counts["round"] * down}


def _segments(e: ResolvedExperiment) -> np.ndarray:
    """Returns round numbers int32 `[segments, eval_every]`; -1 pads the last segment."""
    length = min(e.eval_every, e.num_rounds)
    rounds = np.arange(-(-e.num_rounds // length) * length, dtype=np.int32)
    return np.where(rounds < e.num_rounds, rounds, -1).reshape(-1, length)


def _compile(setup: Setup) -> float:
    """Returns the seconds it took to compile the rounds, by playing a segment of skipped ones."""
    started = time.perf_counter()
    skipped = np.full_like(_segments(setup.experiment)[0], -1)
    jax.block_until_ready(setup.programs.run_rounds(setup.rounds_box, setup.server, setup.clients, setup.key, skipped))
    return time.perf_counter() - started


def _evaluate(setup: Setup, server: PyTree, examples: Examples) -> Evaluation:
    return setup.programs.evaluate(setup.box, _params(setup, server), examples)


def _params(setup: Setup, server: PyTree) -> Params:
    """Returns the parameters to evaluate, `[M, ...]`."""
    method = setup.programs.method
    return jax.vmap(method.optimizer.solution)(method.federation.outcomes(here(server)))


def _shown_prompts(setup: Setup, params: Params) -> np.ndarray:
    """Returns the first model's prompts for the first test images, `[NUM_SHOWN, H, W, 3]`."""
    first = jax.tree.map(lambda x: x[0], params)
    test = jax.tree.map(lambda x: x[:NUM_SHOWN], setup.task.test)
    return np.broadcast_to(setup.programs.method.generator.generate(first, test.features), test.inputs.shape)
