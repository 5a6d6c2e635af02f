"""Runs that differ in their seed and step size only, as one compiled program with an axis over the runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from fedbbpt_jax.federated.cohort import ClientData
from fedbbpt_jax.federated.mesh import RUNS, make_mesh
from fedbbpt_jax.federated.placement import RunSweep, sweep_rounds
from fedbbpt_jax.training.build import PromptSizes, build_method, build_participation
from fedbbpt_jax.training.compare import SeedResult
from fedbbpt_jax.training.experiment import Experiment, ResolvedExperiment
from fedbbpt_jax.training.load import prompt_sizes
from fedbbpt_jax.training.prepare import prepare
from fedbbpt_jax.training.progress import Progress, Row, begin, keep
from fedbbpt_jax.training.resolve import without_data
from fedbbpt_jax.training.run import Outcome, advice_on_memory, finish, segments, what_ends, without_prompt
from fedbbpt_jax.training.served import CHECKPOINTS


def run_sweep(
    experiments: Mapping[int, Mapping[str, Experiment]],
    on_row: Callable[[str, Row], None],
    folder: Path | None = None,
) -> tuple[list[SeedResult], bool]:
    """Returns the results of each seed, all runs played together, and whether an interrupt ended them.

    Args:
      experiments: by seed and label.
      on_row: called with a label and each row of its metrics.
      folder: as for `run_together`.

    Raises:
      ValueError: as for `run_together`.
    """
    runs = [(label, e) for of_seed in experiments.values() for label, e in of_seed.items()]
    outcomes = iter(run_together([e for _, e in runs], lambda i, row: on_row(runs[i][0], row), folder))
    results = [SeedResult({label: next(outcomes) for label in of_seed}, None) for of_seed in experiments.values()]
    first = next(iter(results[0].outcomes.values()))
    return results, first.summary["stopped_by"] == "interrupted"


def run_together(
    experiments: Sequence[Experiment], on_row: Callable[[int, Row], None], folder: Path | None = None
) -> list[Outcome]:
    """Returns the outcome of each experiment; all of them play their rounds in one program.

    Draws are those of separate runs bit by bit; sums are rounded in another order. An interrupt ends all of them; what
    was reached is evaluated and returned, as `run` does.

    Args:
      experiments: which may differ in seed and step size.
      on_row: called with the number of an experiment and each row of its metrics.
      folder: as for `run`, of all of them together.

    Raises:
      ValueError: they differ in more; and whatever `run` raises.
    """
    started, checkpoints = time.perf_counter(), None if folder is None else folder / CHECKPOINTS
    setups = [prepare(experiment) for experiment in experiments]
    first = setups[0]
    shapes = {replace(without_data(s.experiment), lr=0.0) for s in setups}
    models = {(s.experiment.task, s.experiment.data, s.experiment.model) for s in setups}
    if len(shapes) > 1 or len(models) > 1:
        raise ValueError("runs of one program may differ in their seed and step size only")
    if first.experiment.placement != "compile":  # clients in shards, or a box on the host, are laid out otherwise
        raise ValueError(f"runs of one program need placement compile, got {first.experiment.placement}")
    run_rounds = compiled_sweep(shapes.pop(), len(setups), prompt_sizes(first.experiment, first.task))
    lrs = jnp.asarray([s.experiment.lr for s in setups])
    clients, keys = stack([s.clients for s in setups]), jnp.stack([s.key for s in setups])
    zero_shot = [without_prompt(s) for s in setups]
    runs = [Progress(s, started) for s in setups]
    stopped_by = what_ends(first.experiment)
    try:
        begin(runs, checkpoints, on_row)
        servers = jax.tree.map(lambda *x: jnp.stack(x), *(run.server for run in runs))
        for rounds in segments(first.experiment)[runs[0].num_segments :]:
            with advice_on_memory(first.experiment):
                servers, infos = run_rounds(first.box, lrs, servers, clients, keys, rounds)
            for i, run in enumerate(runs):
                server, info = jax.tree.map(lambda x, i=i: x[i], (servers, infos))
                run.count(server, info, int((rounds >= 0).sum()))
            rows = [run.add_row() for run in runs]
            keep(runs, checkpoints)
            for i, row in enumerate(rows):
                on_row(i, row)
    except KeyboardInterrupt:
        if not all(run.rows for run in runs):
            raise
        stopped_by = "interrupted"
    return [finish(r, z, {"stopped_by": stopped_by}) for r, z in zip(runs, zero_shot, strict=True)]


@functools.lru_cache(maxsize=4)
def compiled_sweep(e: ResolvedExperiment, num_runs: int, sizes: PromptSizes) -> RunSweep:
    """Returns the program of so many runs of an experiment `without_data` and without its step size."""
    num_devices = max(n for n in range(1, jax.device_count() + 1) if num_runs % n == 0)
    return sweep_rounds(
        lambda lr: build_method(replace(e, lr=lr), sizes),
        build_participation(e),
        make_mesh(num_devices, RUNS),
        local_steps=e.local_steps,
        batch_size=e.batch_size,
        chunk_size=e.chunk_size,
    )


def stack(clients: Sequence[ClientData]) -> ClientData:
    """Returns the clients of several runs as one, `[S, ...]`; those of all runs are as long as the longest."""
    longest = max((c.places for c in clients), key=len)
    return jax.tree.map(lambda *x: jnp.stack(x), *(c._replace(places=longest) for c in clients))
