"""The folder of a run: what was asked for, what was measured as it came, and what was learnt."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
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
from fedbbpt_jax.training.experiment import Experiment, ServedOptions, TextOptions
from fedbbpt_jax.training.progress import Row
from fedbbpt_jax.training.run import Outcome

METRICS, PROMPT = "metrics.jsonl", "prompt.safetensors"
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


def write_config(folder: Path, experiment: Experiment, seeds: Sequence[int], asked: Mapping[str, Any]) -> None:
    """Writes `config.json`: the resolved experiment of the first seed, all seeds, versions, device, and what was asked.

    Args:
      folder: of the run.
      experiment: resolved.
      seeds: of all runs.
      asked: the experiment as a dict and whatever else a resumed run has to be told again.
    """
    device = jax.devices()[0]
    content = {
        **asdict(experiment),
        "seeds": list(seeds),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "asked": asked,
    }
    draft = folder / ".config.json"
    write_json(draft, content)
    draft.replace(folder / "config.json")  # all of it or nothing: without it nobody could go on


def read_config(folder: Path) -> dict[str, Any]:
    """Returns what was asked of the run in a folder, its experiment as such, with the chunk size that was measured.

    Raises:
      OutputError: the folder holds no run, or its `config.json` is not as it was written.
    """
    try:
        content = json.loads((folder / "config.json").read_text())
        asked = content["asked"]
        text = asked["experiment"].pop("text")
        options = TextOptions(**text | {"label_words": tuple(text["label_words"])})
        served = ServedOptions(**asked["experiment"].pop("served"))
        given = asked["experiment"] | {"templates": tuple(asked["experiment"]["templates"])}
        experiment = Experiment(**given | {"text": options, "served": served, "chunk_size": content["chunk_size"]})
    except OSError as error:
        raise OutputError(f"{folder} holds no run to resume: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{folder / 'config.json'} is not what a run has written: {error}") from error
    return asked | {"experiment": experiment}


def append_row(folder: Path, label: str, row: Row) -> None:
    """Appends one evaluation to the metrics."""
    with (folder / METRICS).open("a") as file:
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
    made_by = json.dumps({"generator": outcome.experiment.generator, "task": outcome.task.name})
    # One entry, because safetensors writes several in an order that differs between processes.
    save_file(prompt_tensors(outcome), folder / PROMPT, metadata={"fedbbpt_jax": made_by})


def prompt_tensors(outcome: Outcome) -> dict[str, np.ndarray]:
    """Returns the generator's parameters and the prompts that they make, by name."""
    params = traverse_util.flatten_dict({"params": outcome.params})
    tensors = {".".join(map(str, path)): np.array(value, order="C") for path, value in params.items()}
    return tensors | {"prompt": np.array(outcome.prompts, order="C")}


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON that ends in a newline."""
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}") from error
