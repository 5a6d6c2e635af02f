"""One experiment from start to end: rounds between evaluations are one compiled program; only this loop is Python."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbbpt_jax.black_box.frozen import PromptedClassifier, clip_classifier, query_only
from fedbbpt_jax.data.tasks import Task, load_task
from fedbbpt_jax.federated.cohort import pack
from fedbbpt_jax.federated.placement import compile_rounds
from fedbbpt_jax.models.loading import load_clip
from fedbbpt_jax.training.evaluate import compile_evaluation
from fedbbpt_jax.training.experiment import (
    Experiment,
    build_method,
    model_folder,
    resolve,
    split_among_clients,
)
from fedbbpt_jax.types import Examples, Params

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
    e = resolve(experiment)
    task = load_task(e.task, shots=e.shots, seed=e.seed)
    box = query_only(load_classifier(e, task))
    method = build_method(e, task)
    clients = pack(task.train, split_among_clients(e, task.train.labels))
    init_key, key = jax.random.split(jax.random.key(e.seed))
    client = method.optimizer.init(method.generator.init(init_key))
    server = method.federation.init(client)
    run_rounds = compile_rounds(
        method,
        cohort_size=e.cohort,
        local_steps=e.local_steps,
        batch_size=e.batch_size,
        chunk_size=e.chunk_size,
    )
    evaluate = compile_evaluation(method.generator, method.objective)
    segments = _segments(e.num_rounds, e.eval_every)
    validation, test = on_device(task.validation), on_device(task.test)

    def params_of(server: Any) -> Params:
        return jax.vmap(method.optimizer.solution)(method.federation.outcomes(server))

    zero_shot = evaluate(box, params_of(server), test)
    compiling = time.perf_counter()
    compiled = run_rounds.lower(box, server, clients, key, segments[0]).compile()
    compile_seconds = time.perf_counter() - compiling

    downlink, uplink = (e.cohort * size for size in method.federation.payload_bytes(client))
    rows: list[Row] = []
    row: Row = {"round": 0, "num_evaluations": 0, "num_requests": 0, "num_valid": 0}
    num_eval_requests, stopped_by = 0, "rounds" if e.num_rounds == experiment.num_rounds else "budget"

    def measure(server: Any, row: Row) -> None:
        nonlocal num_eval_requests
        result = evaluate(box, params_of(server), validation)
        num_eval_requests += int(result.num_requests)
        rows.append(
            row
            | {"uplink_bytes": row["round"] * uplink, "downlink_bytes": row["round"] * downlink}
            | {"loss": float(result.loss), "accuracy": float(result.accuracy)}
            | {"wall_seconds": time.perf_counter() - started, "seed": e.seed}
        )
        on_row(rows[-1])

    measure(server, row)
    try:
        for rounds in segments:
            server, info = compiled(box, server, clients, key, rounds)
            row = row | {"round": row["round"] + int((rounds >= 0).sum())}
            for name in ("num_evaluations", "num_requests", "num_valid"):
                row[name] += int(getattr(info, name).sum())
            measure(server, row)
    except KeyboardInterrupt:
        stopped_by = "interrupted"

    params = params_of(server)
    final = evaluate(box, params, test)
    summary = {
        "task": e.task,
        "zero_shot_accuracy": float(zero_shot.accuracy),
        "test_accuracy": float(final.accuracy),
        "test_loss": float(final.loss),
        "validation_accuracy": rows[-1]["accuracy"],
        **{name: rows[-1][name] for name in ("round", "num_evaluations", "num_requests", "num_valid")},
        "num_eval_requests": num_eval_requests + int(zero_shot.num_requests) + int(final.num_requests),
        "uplink_bytes": rows[-1]["uplink_bytes"],
        "downlink_bytes": rows[-1]["downlink_bytes"],
        "wall_seconds": time.perf_counter() - started,
        "compile_seconds": compile_seconds,
        "stopped_by": stopped_by,
        "seed": e.seed,
    }
    first = jax.tree.map(lambda x: x[0], params)
    shown = task.test.inputs[:NUM_SHOWN]
    prompts = np.asarray(method.generator.generate(first, jnp.asarray(task.test.features[:NUM_SHOWN])))
    prompts = np.broadcast_to(prompts, shown.shape)
    return Outcome(e, task, params, prompts, rows, summary)


def load_classifier(experiment: Experiment, task: Task) -> PromptedClassifier:
    """Returns the frozen model of an experiment as a differentiable classifier of the task's classes."""
    return clip_classifier(_load_clip(model_folder(experiment)), task.class_texts, experiment.precision)


@functools.cache
def _load_clip(folder: Path):
    return load_clip(folder)


def on_device(examples: Examples) -> Examples:
    """Returns the examples as device arrays, moved once."""
    return jax.tree.map(jnp.asarray, examples)


def _segments(num_rounds: int, eval_every: int) -> np.ndarray:
    """Returns round numbers int32 `[segments, eval_every]`; -1 pads the last segment."""
    length = min(eval_every, num_rounds)
    rounds = np.arange(-(-num_rounds // length) * length, dtype=np.int32)
    return np.where(rounds < num_rounds, rounds, -1).reshape(-1, length)
