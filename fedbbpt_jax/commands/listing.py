"""`fedbbpt list`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from fedbbpt_jax.commands.output import write_json_to
from fedbbpt_jax.data.partition import PARTITIONS
from fedbbpt_jax.data.tasks import descriptions
from fedbbpt_jax.training.experiment import GENERATORS, MODELS, estimator_descriptions


@dataclass(frozen=True)
class List:
    """Shows what there is to choose from.

    Attributes:
      kind: of thing.
      json: write the list as JSON to this file, - for standard output.
    """

    kind: tyro.conf.Positional[Literal["tasks", "models", "estimators", "generators", "partitions"]]
    json: str | None = None


def list_command(command: List) -> int:
    """Prints the names of a kind with one line each."""
    entries = {
        "tasks": descriptions(),
        "models": MODELS,
        "estimators": estimator_descriptions(),
        "generators": GENERATORS,
        "partitions": PARTITIONS,
    }[command.kind]
    if command.json is not None:
        write_json_to(command.json, [{"name": n, "description": d} for n, d in entries.items()])
        return 0
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, description in entries.items():
        table.add_row(name, description)
    Console().print(table)
    return 0
