"""The command line: `fedbbpt run`, `replay`, `probe`, `serve`, `variance` and `list`.

Exit codes: 0 done, 2 bad input, 3 the budget is spent, 4 the server says that there is no money, 5 the served model has
changed, 6 what a run had saved is damaged, 130 interrupted by Ctrl-C or a signal to terminate. After 3, 4, 5 and 130
`fedbbpt run --resume` goes on where the run ended.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated

import tyro

from fedbbpt_jax.commands.listing import List, list_command
from fedbbpt_jax.commands.probe import Probe, probe_command
from fedbbpt_jax.commands.replay import Replay, replay_command
from fedbbpt_jax.commands.run import EXIT_INTERRUPTED, Run, asked_before, run_command
from fedbbpt_jax.commands.serve import Serve, serve_command
from fedbbpt_jax.commands.variance import Variance, variance_command
from fedbbpt_jax.errors import (
    BudgetExceededError,
    CorruptCheckpointError,
    FedBBPTError,
    JournalError,
    ModelDriftError,
    QuotaError,
)
from fedbbpt_jax.training.processes import connected

EXIT_BAD_INPUT = 2
EXITS: dict[type[FedBBPTError], int] = {
    BudgetExceededError: 3,
    QuotaError: 4,
    ModelDriftError: 5,
    CorruptCheckpointError: 6,
    JournalError: 6,
}

Command = (
    Annotated[Run, tyro.conf.subcommand("run", prefix_name=False)]
    | Annotated[Variance, tyro.conf.subcommand("variance", prefix_name=False)]
    | Annotated[Probe, tyro.conf.subcommand("probe", prefix_name=False)]
    | Annotated[Replay, tyro.conf.subcommand("replay", prefix_name=False)]
    | Annotated[Serve, tyro.conf.subcommand("serve", prefix_name=False)]
    | Annotated[List, tyro.conf.subcommand("list", prefix_name=False)]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"fedbbpt {version('fedbbpt_jax')}")
        return 0
    command = tyro.cli(Command, prog="fedbbpt", description=__doc__, args=arguments)
    try:
        match command:
            case List():
                return list_command(command)
            case Probe():
                return probe_command(command)
            case Replay():
                return replay_command(command)
            case Serve():
                return serve_command(command)
            case Variance():
                return variance_command(command)
            case _:
                with connected(command.processes), terminated_as_interrupted():
                    return run_command(command if command.resume is None else asked_before(command, command.resume))
    except (FedBBPTError, ValueError) as error:
        print(f"fedbbpt: {error}", file=sys.stderr)
        return next((code for kind, code in EXITS.items() if isinstance(error, kind)), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("fedbbpt: interrupted before anything was measured", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Lets a signal to terminate (SIGTERM), such as before a preemption, do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be heard
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
