"""The command line: `fedbbpt run`, `fedbbpt variance`, `fedbbpt serve` and `fedbbpt list`.

Exit codes: 0 done, 2 bad input, 6 damaged checkpoints, 130 interrupted by Ctrl-C or a signal to terminate.
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
from fedbbpt_jax.commands.run import EXIT_INTERRUPTED, Run, asked_before, run_command
from fedbbpt_jax.commands.serve import Serve, serve_command
from fedbbpt_jax.commands.variance import Variance, variance_command
from fedbbpt_jax.errors import CorruptCheckpointError, FedBBPTError
from fedbbpt_jax.training.processes import connected

EXIT_BAD_INPUT, EXIT_DAMAGED = 2, 6

Command = (
    Annotated[Run, tyro.conf.subcommand("run", prefix_name=False)]
    | Annotated[Variance, tyro.conf.subcommand("variance", prefix_name=False)]
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
            case Serve():
                return serve_command(command)
            case Variance():
                return variance_command(command)
            case _:
                with connected(command.processes), terminated_as_interrupted():
                    return run_command(command if command.resume is None else asked_before(command, command.resume))
    except CorruptCheckpointError as error:
        print(f"fedbbpt: {error}", file=sys.stderr)
        return EXIT_DAMAGED
    except (FedBBPTError, ValueError) as error:
        print(f"fedbbpt: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
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
