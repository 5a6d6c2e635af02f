"""The command line: `fedbbpt run` and `fedbbpt list`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedbbpt_jax.data.tasks import DIGIT_TASKS
from fedbbpt_jax.errors import FedBBPTError
from fedbbpt_jax.training.compare import SeedResult, run_variants, run_white_box, variants
from fedbbpt_jax.training.experiment import (
    ESTIMATORS,
    GENERATORS,
    MODELS,
    Experiment,
    requests_per_round,
    resolve,
)
from fedbbpt_jax.training.prepare import prepare
from fedbbpt_jax.training.records import append_row, create_folder, summarise, write_config, write_json, write_prompt
from fedbbpt_jax.training.report import summary_table, write_accuracy_figure, write_prompt_figure
from fedbbpt_jax.training.run import Row

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Run:
    """Tunes a prompt for a frozen model that answers queries only, over clients that keep their data.

    Attributes:
      experiment: what to run.
      seeds: several runs, as 0..4 or 0,3,7; overrides --seed.
      compare: run the baselines too, and report the share of the white-box gain that was recovered.
      output_dir: a new folder for the results; runs/<task>-<time> if left out.
      json: write the summary as JSON to this file, - for standard output.
      quiet: print nothing but errors.
    """

    experiment: tyro.conf.OmitArgPrefixes[Experiment] = field(default_factory=Experiment)
    seeds: str | None = None
    compare: bool = False
    output_dir: Path | None = None
    json: str | None = None
    quiet: bool = False


@dataclass(frozen=True)
class List:
    """Shows what there is to choose from.

    Attributes:
      kind: of thing.
      json: write the list as JSON to this file, - for standard output.
    """

    kind: tyro.conf.Positional[Literal["tasks", "models", "estimators", "generators"]]
    json: str | None = None


Command = (
    Annotated[Run, tyro.conf.subcommand("run", prefix_name=False)]
    | Annotated[List, tyro.conf.subcommand("list", prefix_name=False)]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"fedbbpt {version('fedbbpt_jax')}")
        return 0
    command = tyro.cli(Command, prog="fedbbpt", description=__doc__, args=arguments)
    try:
        return list_command(command) if isinstance(command, List) else run_command(command)
    except (FedBBPTError, ValueError) as error:
        print(f"fedbbpt: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("fedbbpt: interrupted before the first round", file=sys.stderr)
        return EXIT_INTERRUPTED


def list_command(command: List) -> int:
    """Prints the names of a kind with one line each."""
    entries = {
        "tasks": {name: task.description for name, task in DIGIT_TASKS.items()},
        "models": MODELS,
        "estimators": ESTIMATORS,
        "generators": GENERATORS,
    }[command.kind]
    if command.json is not None:
        _write_json_to(command.json, [{"name": n, "description": d} for n, d in entries.items()])
        return 0
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, description in entries.items():
        table.add_row(name, description)
    Console().print(table)
    return 0


def run_command(command: Run) -> int:
    """Runs one experiment, several seeds of it, or each of them beside its baselines, into one new folder."""
    base, seeds = command.experiment, _parse_seeds(command)
    resolved = prepare(replace(base, seed=seeds[0])).experiment  # bad input ends here, before anything is written
    folder = command.output_dir or Path("runs") / f"{base.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    create_folder(folder)
    write_config(folder, resolved, seeds)
    console = Console(quiet=command.quiet, stderr=True)
    results = _run_seeds(command, seeds, folder, console)
    method = next(iter(results[0].outcomes.values()))
    write_prompt(folder, method)
    write_json(folder / "summary.json", summarise(results))
    write_accuracy_figure(folder / "accuracy.png", results)
    write_prompt_figure(folder / "prompt.png", method)
    console.print(summary_table(results))
    console.print(f"results in {folder}")
    if command.json is not None:
        _write_json_to(command.json, summarise(results))
    return EXIT_INTERRUPTED if any(result.interrupted for result in results) else 0


def _run_seeds(command: Run, seeds: list[int], folder: Path, console: Console) -> list[SeedResult]:
    """Returns the result of each seed, up to an interrupt; rows go to the folder and to progress bars."""
    results: list[SeedResult] = []
    columns = (TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for seed in seeds:
            base = replace(command.experiment, seed=seed)
            experiments = variants(base) if command.compare else {"federated": base}
            bars = {label: _add_bar(progress, label, e) for label, e in experiments.items()}

            def on_row(label: str, row: Row, bars: dict[str, TaskID] = bars) -> None:
                append_row(folder, label, row)
                state = f"{row['num_requests']:,} requests · validation accuracy {row['accuracy']:.3f}"
                progress.start_task(bars[label])
                progress.update(bars[label], completed=row["num_requests"], state=state)

            outcomes = run_variants(experiments, on_row)
            complete = len(outcomes) == len(experiments)
            results.append(SeedResult(outcomes, run_white_box(base) if command.compare and complete else None))
            if results[-1].interrupted:
                break
    return results


def _add_bar(progress: Progress, label: str, experiment: Experiment) -> TaskID:
    e = resolve(experiment)
    total = e.num_rounds * requests_per_round(e)
    return progress.add_task(f"seed {e.seed} · {label}", start=False, total=total, state="waiting")


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
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must be a range such as 0..4 or a list such as 0,3,7, got {text!r}")
    return seeds


def _write_json_to(target: str, content: object) -> None:
    if target == "-":
        print(json.dumps(content, indent=2))
    else:
        write_json(Path(target), content)
