"""Where the commands write their findings as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from fedbbpt_jax.errors import OutputError
from fedbbpt_jax.training.records import write_json


def check_json_target(target: str | None, folder: Path) -> None:
    """Refuses a file whose folder neither exists nor is the run's, before the run and not after it."""
    if target in (None, "-"):
        return
    parent = Path(target).absolute().parent
    if not parent.is_dir() and parent != folder.absolute():
        raise OutputError(f"cannot write to {target}: no such folder")


def write_json_to(target: str, content: object) -> None:
    """Writes JSON to a file, or to standard output where the target is -."""
    if target == "-":
        print(json.dumps(content, indent=2))
    else:
        write_json(Path(target), content)
