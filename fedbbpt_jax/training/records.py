"""The folder of a run: what was asked for, what was measured as it came, and what was learnt."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from fedbbpt_jax.errors import OutputError
from fedbbpt_jax.training.compare import SeedResult, recovered_share
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.run import Outcome, Row

_PACKAGES = ("fedbbpt_jax", "jax", "jaxlib", "flax", "optax", "transformers", "numpy", "scikit-learn")


def create_folder(folder: Path) -> None:
    """Makes the folder of a run.

    Raises:
      OutputError: it holds something already, or cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty and may hold another run; choose a new --output-dir")
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error


def write_config(folder: Path, experiment: Experiment, seeds: Sequence[int]) -> None:
    """Writes `config.json`: the resolved experiment of the first seed, all seeds, versions and device."""
    device = jax.devices()[0]
    content = {
        **asdict(experiment),
        "seeds": list(seeds),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    }
    write_json(folder / "config.json", content)


def append_row(folder: Path, label: str, row: Row) -> None:
    """Appends one evaluation to `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"run": label, **row}) + "\n")


def summarise(results: Sequence[SeedResult]) -> dict[str, Any]:
    """Returns the summary of one run, or of several seeds and variants.

    One run gives its own flat summary. Otherwise: under `runs`, label to the lists by seed of every figure, with the
    share of the white-box gain in test accuracy that was recovered where the ceiling is known; under `white_box`, the
    ceilings.
    """
    if len(results) == 1 and len(results[0].outcomes) == 1:
        return next(iter(results[0].outcomes.values())).summary
    runs: dict[str, dict[str, list]] = {}
    for result in results:
        for label, outcome in result.outcomes.items():
            figures = dict(outcome.summary)
            if result.white_box is not None:
                figures["recovered"] = recovered_share(outcome, result.white_box)
            for name, value in figures.items():
                runs.setdefault(label, {}).setdefault(name, []).append(value)
    return {"runs": runs, "white_box": [r.white_box._asdict() for r in results if r.white_box is not None]}


def write_prompt(folder: Path, outcome: Outcome) -> None:
    """Writes `prompt.safetensors`: the generator's parameters and the prompts they make; words also to `prompt.txt`."""
    if outcome.prompt_text is not None:
        (folder / "prompt.txt").write_text(outcome.prompt_text + "\n")
    params = traverse_util.flatten_dict({"params": outcome.params})
    tensors = {".".join(map(str, path)): np.array(value, order="C") for path, value in params.items()}
    save_file(
        tensors | {"prompt": np.array(outcome.prompts, order="C")},
        folder / "prompt.safetensors",
        metadata={"generator": outcome.experiment.generator, "task": outcome.task.name},
    )


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON that ends in a newline."""
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}") from error
