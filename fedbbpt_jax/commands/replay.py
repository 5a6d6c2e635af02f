"""`fedbbpt replay`: a finished run once more, from its journal of answers; nobody is asked, and nothing is paid."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from safetensors.numpy import load_file

from fedbbpt_jax.commands.run import STATE, Run, planned
from fedbbpt_jax.errors import JournalError, OutputError
from fedbbpt_jax.training.prepare import prepare
from fedbbpt_jax.training.progress import Row
from fedbbpt_jax.training.records import METRICS, PROMPT, prompt_tensors, read_config
from fedbbpt_jax.training.run import Outcome, play
from fedbbpt_jax.training.served import replaying


@dataclass(frozen=True)
class Replay:
    """Plays a finished run of a served model again from what was answered then, and compares all that it found.

    Attributes:
      run: its folder.
      quiet: print nothing but errors.
    """

    run: tyro.conf.Positional[Path]
    quiet: bool = False


def replay_command(command: Replay) -> int:
    """Replays all runs of a folder; returns 0 where each row of metrics and the prompt are the same, bit for bit.

    Raises:
      OutputError: the folder holds no finished run.
      JournalError: a journal is missing or damaged, or what is found now is not what was found then.
    """
    folder = command.run
    before = replace(Run(), **read_config(folder))
    rows, outcomes = [], []
    for seed, experiments in planned(before).items():
        for number, (label, experiment) in enumerate(experiments.items()):
            place = folder / STATE / f"seed-{seed}" / f"run-{number}"
            with replaying(experiment, place) as served:
                outcome = play(prepare(experiment, served), time.perf_counter(), lambda row: None, None)
            rows += [{"run": label, **row} for row in outcome.rows]
            outcomes.append(outcome)
    _check_same(folder, rows, outcomes[0])
    Console(quiet=command.quiet, stderr=True).print(f"{len(rows)} rows and the prompt are the same, bit for bit")
    return 0


def _check_same(folder: Path, rows: list[Row], method: Outcome) -> None:
    try:
        then = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        prompt = load_file(folder / PROMPT)
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder} holds no finished run: {error}") from error
    for number, (was, now) in enumerate(zip(then, rows, strict=False)):
        if was | {"wall_seconds": 0} != now | {"wall_seconds": 0}:
            raise JournalError(f"row {number} was {was} and is now {now}")
    found = prompt_tensors(method)
    same = prompt.keys() == found.keys() and all(np.array_equal(prompt[name], found[name]) for name in found)
    if len(then) != len(rows) or not same:
        raise JournalError(f"{len(then)} rows and a prompt were found then, {len(rows)} rows and another prompt now")
