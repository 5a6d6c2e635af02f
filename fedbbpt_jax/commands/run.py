"""`fedbbpt run`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedbbpt_jax.commands.output import check_json_target, write_json_to
from fedbbpt_jax.training.compare import run_seeds, variants
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.forecast import forecast, forecast_line
from fedbbpt_jax.training.partition_report import partition_summary, partition_table, write_partition_figure
from fedbbpt_jax.training.prepare import Setup, prepare
from fedbbpt_jax.training.probing import probed
from fedbbpt_jax.training.processes import Processes, speaks
from fedbbpt_jax.training.progress import Row
from fedbbpt_jax.training.records import (
    METRICS,
    append_row,
    create_folder,
    read_config,
    summarise,
    write_config,
    write_json,
    write_prompt,
)
from fedbbpt_jax.training.report import heading, summary_table, sweep_table, write_accuracy_figure, write_prompt_figure
from fedbbpt_jax.training.resolve import is_of_texts, requests_per_round, resolve
from fedbbpt_jax.training.sweep import run_sweep

STATE = "state"
EXIT_INTERRUPTED = 130
_COLUMNS = (
    TextColumn("seed {task.description}"),
    BarColumn(20),
    TextColumn("{task.completed:,.0f} requests, accuracy {task.fields[state]}"),
    TimeElapsedColumn(),
)


@dataclass(frozen=True)
class Run:
    """Tunes a prompt for a frozen model that answers queries only, over clients that keep their data.

    Attributes:
      experiment: what to run.
      seeds: several runs, as 0..4 or 0,3,7; overrides --seed.
      lr: step size at the start, decaying by a cosine to 0.3 of it; by optimizer if left out. Several, as 0.003,0.01,
        are a sweep: all runs play in one program, and are compared on validation data.
      perturbation_size: in parameter units; by estimator if left out, and by a probe of the black box if auto.
      compare: run the baselines too, and report the share of the white-box gain that was recovered.
      dry_run: show who would hold what and what it would cost, and end; a few queries are timed for that, and files
        written only to an --output-dir.
      output_dir: a new folder for the results; runs/<task>-<time> if left out.
      resume: the folder of a run that was ended before its time, to go on with; it says what to run.
      json: write the summary as JSON to this file, - for standard output.
      quiet: print nothing but errors.
      processes: which make one mesh.
    """

    experiment: tyro.conf.OmitArgPrefixes[Experiment] = field(default_factory=Experiment)
    seeds: str | None = None
    lr: str | None = None
    perturbation_size: str | None = None
    compare: bool = False
    dry_run: bool = False
    output_dir: Path | None = None
    resume: Path | None = None
    json: str | None = None
    quiet: bool = False
    processes: tyro.conf.OmitArgPrefixes[Processes] = field(default_factory=Processes)


def run_command(command: Run) -> int:
    """Runs an experiment, several seeds or step sizes of it, or seeds beside their baselines, into one folder."""
    command = sized(command)
    experiments = planned(command)
    seeds, is_sweep = list(experiments), len(_parse_lrs(command)) > 1
    run_all = run_sweep if is_sweep else functools.partial(run_seeds, white_box=command.compare)
    setups = [prepare(e) for e in experiments[seeds[0]].values()]  # bad input ends here, before anything is written
    if command.dry_run:
        return _show_partition(command, setups[0])
    base = setups[0].experiment
    folder = command.output_dir or Path("runs") / f"{base.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not speaks():
        _, interrupted = run_all(experiments, lambda label, row: None, folder / STATE)
        return EXIT_INTERRUPTED if interrupted else 0
    check_json_target(command.json, folder)
    if command.resume is None:
        create_folder(folder)
        write_config(folder, base, seeds, asked(command))
    (folder / METRICS).unlink(missing_ok=True)  # of a resumed run: all rows come again
    write_partition_figure(folder / "partition.png", *_who_holds_what(setups[0]))
    console = Console(quiet=command.quiet, stderr=True)
    with Progress(*_COLUMNS, console=console) as progress:
        on_row = _follower(folder, progress, experiments)
        results, interrupted = run_all(experiments, on_row, folder / STATE)
    method = next(iter(results[0].outcomes.values()))
    write_prompt(folder, method)
    write_json(folder / "summary.json", summarise(results))
    write_accuracy_figure(folder / "accuracy.png", results)
    if method.task.image_size:
        write_prompt_figure(folder / "prompt.png", method)
    console.print(heading(results))
    console.print(sweep_table(results) if is_sweep else summary_table(results))
    if method.prompt_text is not None:
        console.print(f"prompt: {method.prompt_text}", markup=False)
    console.print(f"results in {folder}")
    if interrupted:
        console.print(f"interrupted: fedbbpt run --resume {folder} goes on", markup=False)
    if command.json is not None:
        write_json_to(command.json, summarise(results))
    return EXIT_INTERRUPTED if interrupted else 0


def asked(command: Run) -> dict[str, Any]:
    """Returns what a resumed run has to be told again."""
    return {
        "experiment": asdict(command.experiment),
        **{name: getattr(command, name) for name in ("seeds", "lr", "compare")},
    }


def asked_before(command: Run, folder: Path) -> Run:
    """Returns the command whose run is to go on, with the chunk size that it found.

    Raises:
      OutputError: the folder holds no run.
      ValueError: something else than a folder is asked for.
    """
    free = {"resume": None, "processes": Processes(), "json": None, "quiet": False}
    if replace(command, **free) != Run():
        raise ValueError("--resume goes on with what config.json in the folder says: no other option can be given")
    return replace(command, **read_config(folder), output_dir=folder)


def _show_partition(command: Run, setup: Setup) -> int:
    """Prints who holds what and what the run costs, and writes it where a folder is named."""
    parts, labels, names = _who_holds_what(setup)
    waste = 1 - len(labels) / len(setup.clients.examples.labels)  # only of shards, which are as long as the longest
    summary = partition_summary(parts, labels, len(names), waste)
    console = Console(quiet=command.quiet, stderr=True)
    console.print(partition_table(parts, labels, names))
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in summary.items())
    console.print(figures, highlight=False)
    cost = forecast(setup)
    console.print(forecast_line(cost), highlight=False)
    if command.output_dir is not None:
        create_folder(command.output_dir)
        write_partition_figure(command.output_dir / "partition.png", parts, labels, names)
        console.print(f"figure in {command.output_dir}")
    if command.json is not None:
        write_json_to(command.json, summary | {"forecast": cost})
    return 0


def _who_holds_what(setup: Setup) -> tuple[Sequence[np.ndarray], np.ndarray, Sequence[str]]:
    return setup.parts, setup.task.train.labels, setup.task.class_names


def sized(command: Run) -> Run:
    """Returns the command with the perturbation size in its experiment; `auto` is asked of the black box.

    Raises:
      ValueError: it is no number; and whatever a probe raises.
    """
    text = command.perturbation_size
    if text is None:
        return command
    if text == "auto":
        size = probed(replace(command.experiment, seed=_parse_seeds(command)[0])).perturbation_size
        if size is None:
            raise ValueError("--perturbation-size auto is not for words")
        Console(quiet=command.quiet, stderr=True).print(f"perturbation size {size:.3g}, by a probe", highlight=False)
    else:
        try:
            size = float(text)
        except ValueError as error:
            raise ValueError(f"--perturbation-size must be a number or auto, got {text!r}") from error
    return replace(command, perturbation_size=None, experiment=replace(command.experiment, perturbation_size=size))


def planned(command: Run) -> dict[int, dict[str, Experiment]]:
    """Returns the experiments of a command by seed and label; the first of each seed is the method itself.

    Raises:
      ValueError: seeds or step sizes are not as they should be.
    """
    lrs = _parse_lrs(command)
    return {seed: _experiments(command, seed, lrs) for seed in _parse_seeds(command)}


def _experiments(command: Run, seed: int, lrs: list[float | None]) -> dict[str, Experiment]:
    if len(lrs) > 1:
        base = replace(command.experiment, seed=seed, placement="compile")
        return {f"step {lr:g}": replace(base, lr=lr) for lr in lrs if lr is not None}
    base = replace(command.experiment, seed=seed, lr=lrs[0])
    return variants(base) if command.compare else {"federated": base}


def _follower(
    folder: Path, progress: Progress, experiments: dict[int, dict[str, Experiment]]
) -> Callable[[str, Row], None]:
    """Returns what takes each row of metrics to the folder and to the bar of its run."""
    bars: dict[tuple[int, str], TaskID] = {}

    def on_row(label: str, row: Row) -> None:
        append_row(folder, label, row)
        place = (row["seed"], label)
        if place not in bars:
            e = resolve(experiments[row["seed"]][label])
            bars[place] = progress.add_task(f"{e.seed} {label}", total=e.num_rounds * requests_per_round(e), state="")
        progress.update(bars[place], completed=row["num_requests"], state=f"{row['accuracy']:.3f}")

    return on_row


def _parse_seeds(command: Run) -> list[int]:
    """Returns the seeds of `0..4`, `0,3,7` or the experiment's own."""
    text = command.seeds
    if text is None:
        return [command.experiment.seed]
    first, dots, last = text.partition("..")
    try:
        seeds = list(range(int(first), int(last) + 1)) if dots else [int(s) for s in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must be a range such as 0..4 or a list such as 0,3,7, got {text!r}")
    return seeds


def _parse_lrs(command: Run) -> list[float | None]:
    """Returns the step sizes of `0.01` or `0.003,0.01`; None is for the optimizer's own."""
    if command.lr is None:
        return [command.experiment.lr]
    try:
        lrs: list[float | None] = [float(lr) for lr in command.lr.split(",")]
    except ValueError:
        lrs = []
    if not lrs or len(set(lrs)) < len(lrs):
        raise ValueError(f"--lr must be a number, or a list such as 0.003,0.01, got {command.lr!r}")
    if len(lrs) > 1 and is_of_texts(command.experiment):
        raise ValueError(f"several step sizes are one program with one box, which texts are not, got --lr {command.lr}")
    if len(lrs) > 1 and command.compare:
        raise ValueError(f"--compare is of one step size, got --lr {command.lr}")
    if len(lrs) > 1 and (command.experiment.placement not in ("auto", "compile") or command.processes != Processes()):
        raise ValueError(f"several step sizes are one program of one process, got --lr {command.lr}")
    return lrs
