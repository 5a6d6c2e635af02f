"""Checkpoints in the Hugging Face layout: where they lie, their configuration, and their tensors as Flax parameters.

The one rule: a parameter path joined by dots is the tensor's name, with `kernel`, `scale` and `embedding` spelt
`weight`; a linear kernel `[in, out]` is stored as `[out, in]` and a patch kernel `[p, p, in, out]` as
`[out, in, p, p]`. A network whose checkpoints spell names otherwise has a `Dialect`.

Only safetensors are read: a pickled file runs whatever code its author put into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HTTPError, StrictDataclassError  # type: ignore[attr-defined]
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedbbpt_jax.errors import CheckpointError
from fedbbpt_jax.models.layers import ACTIVATIONS, Config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError)
_DOWNLOADED = ("*.json", "*.txt", "*.model", WEIGHTS, "model-*.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_TENSORS_AT_ONCE = 8


class Dialect(NamedTuple):
    """How the checkpoints of a network name their tensors.

    Attributes:
      prefix: stripped from tensor names; checkpoints of a network with a head have it, those without may lack it.
      spellings: (part of our name, part of theirs), applied in order.
      ignored: beginnings of names (after the prefix) of tensors that are not needed, such as buffers and other heads.
    """

    prefix: str = ""
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


AS_OURS = Dialect()


def find_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint: `source` itself, or what the hub holds under that id, downloaded once.

    Args:
      source: a local folder, or a hub id such as "openai/clip-vit-base-patch16".
      revision: branch, tag or commit of the hub; ignored for a folder. `HF_HUB_OFFLINE=1` forbids any connection.

    Raises:
      CheckpointError: there is no such folder, and the hub gives nothing under that id.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise CheckpointError(f"{source} is no folder; expected a checkpoint's folder or a hub id")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(_DOWNLOADED)))
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise CheckpointError(
            f"{source!r} is no folder here, and the hub gave nothing under that id ({reason}); its cache is "
            f"{constants.HF_HUB_CACHE}. Without a network pass the folder of a downloaded checkpoint"
        ) from error


def read_config(folder: Path, classes: Mapping[str, Any]) -> Any:
    """Returns the configuration in `folder`, every field filled by its class.

    Args:
      folder: holds `config.json`.
      classes: configuration classes of transformers by the `model_type` they belong to.

    Raises:
      CheckpointError: there is none, it cannot be read, or it is of another type of model.
    """
    expected = " or ".join(map(repr, classes))
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json; expected a {expected} checkpoint")
    try:
        model_type = json.loads(file.read_text()).get("model_type")
        if model_type not in classes:
            raise CheckpointError(f"{folder} holds a {model_type!r} model; expected {expected}")
        config = classes[model_type].from_pretrained(folder, local_files_only=True)
    except CONFIG_ERRORS as error:
        raise unreadable(folder, error) from error
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        activation = getattr(part, "hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"{folder} asks for hidden_act {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return config


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    """Returns the one-line error for a configuration that `error` came from."""
    return CheckpointError(f"cannot read the configuration in {folder}: {' '.join(f'{error}'.split())}")


def read_model(folder: Path, network: Any, config: Config, dialect: Dialect) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns the structure of `network(config)`, and the parameters stored in `folder`, in float32.

    Raises:
      CheckpointError: the configuration's sizes do not fit together, or `read_params` fails.
    """
    try:
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0))))
    except CONFIG_ERRORS as error:
        raise unreadable(folder, error) from error
    return graphdef, read_params(folder, nnx.to_pure_dict(abstract), dialect)


def read_params(folder: Path, like: Mapping[str, Any], dialect: Dialect = AS_OURS) -> dict[str, Any]:
    """Returns the parameters stored in `folder`, shaped like `like`, in float32, whatever type they are stored in.

    Args:
      folder: holds `model.safetensors`, or shards and their `model.safetensors.index.json`.
      like: nested, with leaves that have a shape.
      dialect: how the tensors are named.

    Raises:
      CheckpointError: a file is missing or corrupt, or tensors are missing, unexpected or of another shape; all of
        them are listed.
    """
    expected: dict[tuple, Any] = traverse_util.flatten_dict(like)
    paths = {tensor_name(path, dialect): path for path in expected}
    found: dict[tuple, Array] = {}
    problems: list[str] = []
    for file in _weight_files(folder):
        names = {_without_prefix(stored, dialect): stored for stored in _tensor_names(file)}
        unknown = names.keys() - paths.keys()
        problems += [f"unexpected {name}" for name in sorted(unknown) if not name.startswith(dialect.ignored)]
        known = [name for name in names if name in paths]
        for first in range(0, len(known), _TENSORS_AT_ONCE):
            some = known[first : first + _TENSORS_AT_ONCE]
            for name, value in zip(some, _read(file, [names[name] for name in some]), strict=True):
                found[paths[name]] = jnp.asarray(_from_stored(paths[name], value), jnp.float32)
    problems += [f"missing {name} {expected[paths[name]].shape}" for name in paths if paths[name] not in found]
    problems += [
        f"{tensor_name(path, dialect)} has shape {value.shape}, expected {expected[path].shape}"
        for path, value in found.items()
        if value.shape != expected[path].shape
    ]
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit its configuration: " + "; ".join(problems))
    return traverse_util.unflatten_dict(found)


def write_model(folder: Path, params: Mapping[str, Any], config: Config, dialect: Dialect, dtype: str) -> None:
    """Writes `model.safetensors` and `config.json`, as transformers and `read_model` read them."""
    folder.mkdir(parents=True, exist_ok=True)
    flat: dict[tuple, Any] = traverse_util.flatten_dict(params)
    tensors = {
        tensor_name(path, dialect): np.array(_to_stored(path, np.asarray(value)), dtype, order="C")
        for path, value in flat.items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)


def tensor_name(path: tuple, dialect: Dialect = AS_OURS) -> str:
    """Returns a parameter's name in a Hugging Face checkpoint, without the dialect's prefix.

    >>> tensor_name(("text_model", "encoder", "layers", 0, "mlp", "fc1", "kernel"))
    'text_model.encoder.layers.0.mlp.fc1.weight'
    """
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    name = ".".join(map(str, (*path[:-1], leaf)))
    for ours, theirs in dialect.spellings:
        name = name.replace(ours, theirs)
    return name


def num_params(params: Any) -> int:
    """Returns the number of numbers in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            files = [folder / name for name in names]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"cannot read {folder / INDEX}: {' '.join(f'{error}'.split())}") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names")
        return files
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    found = f" but {', '.join(pickled)}, which may run code when it is loaded" if pickled else ""
    architecture = _architecture(folder)
    raise CheckpointError(
        f"{folder} holds no {WEIGHTS}{found}. Many hub models have one under --revision refs/pr/N; else convert what "
        f'you trust where torch is installed: python -c "from transformers import {architecture} as M; '
        f'M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"'
    )


def _architecture(folder: Path) -> str:
    """Returns the class of transformers that a checkpoint's configuration names, if it is a name and not code."""
    try:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return "AutoModel"
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="np") as stored:
            return list(stored.offset_keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _read(file: Path, names: list[str]) -> list[np.ndarray]:
    """Returns some tensors. The file is closed again, so that the pages read so far do not stay in memory."""
    try:
        with safe_open(file, framework="np") as stored:
            return [stored.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _without_prefix(name: str, dialect: Dialect) -> str:
    """Returns a stored name as it is spelt today: old BERT files call a norm's scale and shift gamma and beta."""
    name = name.removeprefix(dialect.prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _from_stored(path: tuple, value: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _to_stored(path: tuple, value: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
