"""One experiment from start to end: rounds between evaluations are one compiled program; only this loop is Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbbpt_jax.errors import DeviceMemoryError
from fedbbpt_jax.training.evaluate import Evaluation, ask_without_prompt, evaluate_without_prompt, together
from fedbbpt_jax.training.experiment import Experiment, ResolvedExperiment
from fedbbpt_jax.training.load import prompt_words
from fedbbpt_jax.training.prepare import Setup, prepare
from fedbbpt_jax.training.progress import Progress, Row, begin, evaluate_on, keep, outcome_params
from fedbbpt_jax.training.resolve import requests_per_round
from fedbbpt_jax.training.served import CHECKPOINTS, asking
from fedbbpt_jax.types import Params, Task

NUM_SHOWN = 6


class Outcome(NamedTuple):
    """What a run leaves behind.

    Attributes:
      experiment: with everything resolved.
      task: its data.
      params: of the prompt generator, `[M, ...]`: one model, or one per client where clients stay apart.
      prompts: of the first model: for the first NUM_SHOWN test images, `[NUM_SHOWN, H, W, 3]`, pixel units; for texts
        the numbers of a soft prompt `[d]`, or the token ids of a discrete one `[P]`.
      prompt_text: a discrete prompt in words, None of any other.
      rows: one per evaluation, as in `metrics.jsonl`.
      summary: as in `summary.json`.
    """

    experiment: ResolvedExperiment
    task: Task
    params: Params
    prompts: np.ndarray
    prompt_text: str | None
    rows: list[Row]
    summary: Row


def run(
    experiment: Experiment, on_row: Callable[[Row], None] = lambda row: None, folder: Path | None = None
) -> Outcome:
    """Returns the outcome of an experiment; the test part is used for the two accuracies of the summary only.

    An interrupt (Ctrl-C) ends the rounds; what was reached is evaluated and returned, `stopped_by` says so.

    Args:
      experiment: what to run; sizes left out are resolved.
      on_row: called with each row of metrics as it comes; after a resume with those from before too.
      folder: of this run alone: what was reached is saved there after each evaluation, and so is each answer of a
        served model; both are taken up from there. What a resumed run comes to is what it would have come to, bit for
        bit.

    Raises:
      ValueError, TaskError, CheckpointError: the experiment cannot be run as described.
      CorruptCheckpointError, JournalError: what the folder holds is damaged, or of another run.
      BudgetExceededError, QuotaError, QueryFailedError, ModelDriftError: a served model cannot be asked any more; what
        was reached is saved.
      DeviceMemoryError: the device has too little memory for it.
    """
    started = time.perf_counter()
    with asking(experiment, folder) as served:
        return play(prepare(experiment, served), started, on_row, folder)


def play(setup: Setup, started: float, on_row: Callable[[Row], None], folder: Path | None) -> Outcome:
    """Returns the outcome of a run that is set up; as `run`, which asks a served model where there is one.

    Args:
      setup: of the run.
      started: by the clock.
      on_row: as for `run`.
      folder: as for `run`.
    """
    checkpoints = None if folder is None else folder / CHECKPOINTS
    zero_shot = without_prompt(setup)
    compile_seconds = _compile(setup)
    progress = Progress(setup, started)
    stopped_by = what_ends(setup.experiment)
    try:
        begin([progress], checkpoints, lambda _, row: on_row(row))
        for rounds in segments(setup.experiment)[progress.num_segments :]:
            with advice_on_memory(setup.experiment):
                server, info = setup.programs.run_rounds(
                    setup.rounds_box, progress.server, setup.clients, setup.key, rounds
                )
            progress.count(server, info, int((rounds >= 0).sum()))
            row = progress.add_row()
            keep([progress], checkpoints)
            on_row(row)
    except KeyboardInterrupt:
        if not progress.rows:
            raise
        stopped_by = "interrupted"
    return finish(progress, zero_shot, {"compile_seconds": compile_seconds, "stopped_by": stopped_by})


@contextmanager
def advice_on_memory(e: ResolvedExperiment) -> Iterator[None]:
    """Turns a device's lack of memory into an error that says what to change.

    Raises:
      DeviceMemoryError: the device had too little memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DeviceMemoryError(
            f"the device has too little memory for {e.chunk_size} candidates of {e.batch_size} examples at once: try "
            f"--chunk-size {max(1, e.chunk_size // 2)}, a smaller --batch-size or --precision bfloat16"
        ) from error


def finish(progress: Progress, zero_shot: Evaluation, more: Row) -> Outcome:
    """Returns the outcome of what was recorded; here the test part is used for the second time, and the last."""
    setup, rows = progress.setup, progress.rows
    final = evaluate_on(setup, progress.server, setup.test)
    summary = {
        "task": setup.experiment.task,
        "zero_shot_accuracy": float(zero_shot.accuracy),
        "test_accuracy": float(final.accuracy),
        "test_loss": float(final.loss),
        **(
            {}
            if setup.task.metric == "accuracy"
            else {f"test_{setup.task.metric}": float(final.metric(setup.task.metric))}
        ),
        "validation_accuracy": rows[-1]["accuracy"],
        **progress.counts,
        **dict(zip(("downlink_bytes_per_client", "uplink_bytes_per_client"), setup.payload, strict=True)),
        "num_eval_requests": progress.num_eval_requests + 2 * int(final.num_requests),
        **_paid(setup),
        "wall_seconds": time.perf_counter() - progress.started,
        **more,
        "seed": setup.experiment.seed,
    }
    params = outcome_params(setup, progress.server)
    prompts = _shown_prompts(setup, params)
    words = prompt_words(setup.experiment, prompts)
    return Outcome(setup.experiment, setup.task, params, prompts, words, rows, summary)


def _paid(setup: Setup) -> Row:
    """Returns what a served model took: attempts and failures by kind, and the tokens that were billed."""
    if setup.ledger is None:
        return {}
    billed = setup.ledger.balance().charged.num_tokens
    return {"attempts": getattr(setup.bare, "counts", {})} | ({"billed_tokens": billed} if billed else {})


def what_ends(e: ResolvedExperiment) -> str:
    """Returns "budget" where no further round could be paid after the last one, "rounds" otherwise."""
    return "rounds" if e.budget >= (e.num_rounds + 1) * requests_per_round(e) else "budget"


def segments(e: ResolvedExperiment) -> np.ndarray:
    """Returns round numbers int32 `[segments, eval_every]`; -1 pads the last segment."""
    length = min(e.eval_every, e.num_rounds)
    rounds = np.arange(-(-e.num_rounds // length) * length, dtype=np.int32)
    return np.where(rounds < e.num_rounds, rounds, -1).reshape(-1, length)


def _compile(setup: Setup) -> float:
    """Returns the seconds it took to compile the rounds, by playing a segment of skipped ones."""
    if setup.ledger is not None:
        return 0.0
    started = time.perf_counter()
    skipped = np.full_like(segments(setup.experiment)[0], -1)
    jax.block_until_ready(setup.programs.run_rounds(setup.rounds_box, setup.server, setup.clients, setup.key, skipped))
    return time.perf_counter() - started


def without_prompt(setup: Setup) -> Evaluation:
    """Returns what the frozen model does on the test part alone: its template, no prompt."""
    if setup.task.image_size:
        return evaluate_on(setup, setup.server, setup.test)  # a picture's prompt adds nothing at first
    nothing = jnp.zeros((1, 0), jnp.int32)
    evaluate = evaluate_without_prompt if setup.ledger is None else ask_without_prompt
    with setup.counted_as("evaluation"):
        return together([evaluate(setup.bare, nothing, part) for part in setup.test])


def _shown_prompts(setup: Setup, params: Params) -> np.ndarray:
    """Returns the first model's prompts, for pictures those for the first test images, `[NUM_SHOWN, H, W, 3]`."""
    first = jax.tree.map(lambda x: x[0], params)
    test = jax.tree.map(lambda x: x[:NUM_SHOWN], setup.task.test)
    prompts = np.asarray(setup.programs.method.generator.generate(first, test.features))
    return np.broadcast_to(prompts, test.inputs.shape) if setup.task.image_size else prompts
