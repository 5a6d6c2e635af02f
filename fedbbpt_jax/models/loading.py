"""Checkpoints in the Hugging Face layout, read into and written from Flax parameters.

The one rule: a parameter path joined by dots is the tensor's name, with `kernel`, `scale` and `embedding` spelt
`weight`; a linear kernel `[in, out]` is stored as `[out, in]` and a patch kernel `[p, p, in, out]` as
`[out, in, p, p]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from huggingface_hub.errors import StrictDataclassError
from jax import Array
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fedbbpt_jax.errors import CheckpointError
from fedbbpt_jax.models.clip import CLIP
from fedbbpt_jax.models.layers import ACTIVATIONS

# Buffers that older checkpoints store beside their parameters.
IGNORED_TENSORS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


class PretrainedCLIP(NamedTuple):
    """A CLIP split into structure and weights, with what turns text and pixels into its inputs."""

    graphdef: nnx.GraphDef
    params: dict[str, Any]
    tokenizer: Any
    image_size: int
    mean: np.ndarray
    std: np.ndarray


def load_clip(folder: str | Path) -> PretrainedCLIP:
    """Returns the CLIP stored in `folder`, its weights in float32.

    Args:
      folder: holds `config.json`, `model.safetensors`, `tokenizer.json` and `preprocessor_config.json`.

    Raises:
      CheckpointError: the folder or one of its files is missing or unreadable, it is no CLIP, or tensors are missing,
        unexpected or of another shape (all of them are listed).
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}; expected a CLIP checkpoint in the Hugging Face layout")
    try:
        config: Any = CLIPConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        message = " ".join(f"{error}".split())
        raise CheckpointError(f"cannot read the configuration in {folder}: {message}") from error
    if config.model_type != "clip" or not hasattr(config, "vision_config"):
        raise CheckpointError(f"{folder} holds a {config.model_type!r} model; expected 'clip'")
    for tower in (config.text_config, config.vision_config):
        if tower.hidden_act not in ACTIVATIONS:
            raise CheckpointError(f"{folder} asks for hidden_act {tower.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))))
    params = read_params(folder / "model.safetensors", nnx.to_pure_dict(abstract))
    return PretrainedCLIP(
        graphdef,
        params,
        tokenizer,
        config.vision_config.image_size,
        np.asarray(processor.image_mean, np.float32),
        np.asarray(processor.image_std, np.float32),
    )


def read_params(file: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters stored in `file`, shaped like `like`, in float32.

    Raises:
      CheckpointError: the file is corrupt, or tensors are missing, unexpected or of another shape.
    """
    expected: dict[tuple, Any] = traverse_util.flatten_dict(like)
    paths = {tensor_name(path): path for path in expected}
    found: dict[tuple, Array] = {}
    try:
        with safe_open(file, framework="np") as stored:
            names = set(stored.keys())
            for name in sorted(names & paths.keys()):
                found[paths[name]] = jnp.asarray(_from_stored(paths[name], stored.get_tensor(name)), jnp.float32)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    problems = [f"missing {name} {expected[paths[name]].shape}" for name in sorted(paths.keys() - names)]
    problems += [f"unexpected {name}" for name in sorted(names - paths.keys() - set(IGNORED_TENSORS))]
    problems += [
        f"{tensor_name(path)} has shape {value.shape}, expected {expected[path].shape}"
        for path, value in found.items()
        if value.shape != expected[path].shape
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit its configuration: " + "; ".join(problems))
    return traverse_util.unflatten_dict(found)


def stored_tensors(params: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray]:
    """Returns `{tensor name: array}` of parameters, ready for `safetensors.numpy.save_file`."""
    flat: dict[tuple, Any] = traverse_util.flatten_dict(params)
    return {tensor_name(path): np.array(_to_stored(path, np.asarray(v)), dtype, order="C") for path, v in flat.items()}


def tensor_name(path: tuple) -> str:
    """Returns a parameter's name in a Hugging Face checkpoint.

    >>> tensor_name(("text_model", "encoder", "layers", 0, "mlp", "fc1", "kernel"))
    'text_model.encoder.layers.0.mlp.fc1.weight'
    """
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    return ".".join(map(str, (*path[:-1], leaf)))


def num_params(params: Any) -> int:
    """Returns the number of numbers in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _from_stored(path: tuple, value: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _to_stored(path: tuple, value: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
