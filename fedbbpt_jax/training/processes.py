"""Several processes that make one mesh: how they find each other, who speaks for them, and what happens if one dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import jax

from fedbbpt_jax.errors import ProcessError

HEARTBEAT_SECONDS = 20  # a process that is silent for so long is taken for dead
EXIT_LOST = 1


@dataclass(frozen=True)
class Processes:
    """One run over several processes; each holds the data of its own clients only, and process 0 writes.

    Attributes:
      distributed: join the processes that the launcher (Slurm, Kubernetes, TPU pods) started, or those named below.
      coordinator: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: of this one, from 0.
    """

    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@contextmanager
def connected(processes: Processes) -> Iterator[None]:
    """Joins the other processes for the time of a run. To be entered before JAX is asked for its devices.

    If another process dies, this one says so and ends at once, with exit code 1: the others' clients are gone, and
    whatever waits for them would wait for ever.

    Raises:
      ProcessError: the processes do not find each other.
    """
    p = processes
    named = (p.coordinator, p.num_processes, p.process_id)
    if not p.distributed and named == (None, None, None):
        yield
        return
    if any(x is None for x in named) and any(x is not None for x in named):
        raise ProcessError("--coordinator, --num-processes and --process-id belong together")
    try:
        jax.distributed.initialize(
            *named, initialization_timeout=60, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the processes did not find each other: {error}") from error
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _end(f"another process was lost, or this one failed: {str(error).splitlines()[0]}")
    jax.distributed.shutdown()


def speaks() -> bool:
    """Returns whether this process writes files and prints for all."""
    return jax.process_index() == 0


def _end(message: str) -> NoReturn:
    """Ends this process without the farewell that waits for all others."""
    print(f"fedbbpt: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)
