"""Queries on the wire: tensors in the Open Inference Protocol V2 with its binary extension, float32 without loss.

A message is a JSON head, which names the tensors, and behind it their raw little-endian numbers. One message carries
what one client asks at one step: its K prompts and the B inputs that all of them are tried on.

Source: KServe, "Open Inference Protocol" V2, and Triton's extension "Binary tensor data".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from fedbbpt_jax.errors import ResponseFormatError
from fedbbpt_jax.types import PyTree

Side = Literal["inputs", "outputs"]
Tensors = dict[str, np.ndarray]

HEAD_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header that says how many bytes of the body are the head."""
MOST_AXES = 8

_DATATYPES = {
    "FP32": np.dtype("<f4"),
    "FP16": np.dtype("<f2"),
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
    "UINT8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DATATYPES.items()}


def encode(side: Side, tensors: Mapping[str, np.ndarray], head: Mapping[str, Any] | None = None) -> tuple[bytes, int]:
    """Returns the body of a message, and how many of its bytes are the head.

    The same tensors and head give the same bytes: they can be hashed.

    Args:
      side: what the tensors are to the model.
      tensors: by name; of a data type of the protocol.
      head: more entries of the head, such as `{"id": "7", "parameters": {...}}`.

    Raises:
      ValueError: a tensor's numbers are of a type that the protocol does not carry.

    Example:
      >>> body, length = encode("inputs", {"x": np.ones(2, np.float32)})
      >>> body[length:]
      b'\\x00\\x00\\x80?\\x00\\x00\\x80?'
    """
    entries, blobs = [], []
    for name, tensor in tensors.items():
        little = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))
        if little.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} must be one of {', '.join(_NAMES.values())}, got {tensor.dtype}")
        blobs.append(little.tobytes())
        size = {"binary_data_size": len(blobs[-1])}
        entries.append({"name": name, "shape": tensor.shape, "datatype": _NAMES[little.dtype], "parameters": size})
    text = json.dumps({**(head or {}), side: entries}, sort_keys=True, allow_nan=False).encode()
    return b"".join([text, *blobs]), len(text)


def decode(side: Side, body: bytes, head_length: int | None = None) -> tuple[Tensors, dict[str, Any]]:
    """Returns the tensors and the head of a message; each tensor's numbers binary, or in the head as JSON.

    Args:
      side: what the tensors are to the model.
      body: of the message.
      head_length: how many of its bytes are the head; all, if left out.

    Raises:
      ResponseFormatError: the message is not what the protocol says, or not complete.
    """
    length = len(body) if head_length is None else head_length
    if not 0 <= length <= len(body):
        raise ResponseFormatError(f"a head of {length} bytes does not fit in a message of {len(body)}")
    try:
        head = json.loads(body[:length], parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ResponseFormatError(f"the head of a message is no JSON: {error}") from error
    entries = head.get(side) if isinstance(head, dict) else None
    if not isinstance(entries, list):
        raise ResponseFormatError(f"the head of a message has no list of {side}")
    tensors, rest = {}, memoryview(body)[length:]
    for entry in entries:
        name, tensor, taken = _tensor(entry, rest)
        if name in tensors:
            raise ResponseFormatError(f"tensor {name!r} comes twice")
        tensors[name], rest = tensor, rest[taken:]
    if len(rest):
        raise ResponseFormatError(f"{len(rest)} bytes belong to no tensor")
    return tensors, head


def datatype(tensor: np.ndarray) -> str:
    """Returns what the protocol calls a tensor's type, "" where it does not carry it.

    Example:
      >>> datatype(np.zeros(2, np.float32))
      'FP32'
    """
    return _NAMES.get(tensor.dtype.newbyteorder("<"), "")


def named_leaves(prefix: str, tree: PyTree) -> Tensors:
    """Returns the arrays of a tree by names that start with `prefix`, to be sent.

    Example:
      >>> list(named_leaves("inputs", {"ids": np.zeros(2), "attended": np.ones(2)}))
      ['inputs.attended', 'inputs.ids']
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_leaf_name(prefix, path): np.asarray(leaf) for path, leaf in leaves}


def tree_like(prefix: str, like: PyTree, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """Returns the tree of `like`'s structure whose arrays were named by `named_leaves`.

    Raises:
      ResponseFormatError: one of them is missing.
    """

    def found(path: Any, _: Any) -> np.ndarray:
        name = _leaf_name(prefix, path)
        if name not in tensors:
            raise ResponseFormatError(f"expected a tensor {name!r}, got {', '.join(tensors) or 'none'}")
        return tensors[name]

    return jax.tree_util.tree_map_with_path(found, like)


def _leaf_name(prefix: str, path: Any) -> str:
    return ".".join([prefix, jax.tree_util.keystr(path, simple=True, separator=".")] if path else [prefix])


def _tensor(entry: Any, rest: memoryview) -> tuple[str, np.ndarray, int]:
    """Returns the name and numbers of one tensor, and how many bytes of `rest` they are."""
    if not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str):
        raise ResponseFormatError("a tensor has no name")
    dtype, shape = _DATATYPES.get(str(entry.get("datatype"))), entry.get("shape")
    if dtype is None:
        raise ResponseFormatError(
            f"tensor {name!r} must be one of {', '.join(_DATATYPES)}, got {entry.get('datatype')}"
        )
    if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise ResponseFormatError(f"tensor {name!r} has no shape: {shape}")
    parameters = entry.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return name, _from_json(name, entry.get("data"), dtype, shape), 0
    expected = math.prod(shape) * dtype.itemsize
    if size != expected or expected > len(rest):
        raise ResponseFormatError(f"tensor {name!r} of shape {shape} is {expected} bytes, got {size} of {len(rest)}")
    if dtype == np.bool_ and np.frombuffer(rest[:expected], np.uint8).max(initial=0) > 1:
        raise ResponseFormatError(f"tensor {name!r} has bytes that are neither true nor false")
    return name, np.frombuffer(rest[:expected], dtype).reshape(shape), expected


def _from_json(name: str, data: Any, dtype: np.dtype, shape: list[int]) -> np.ndarray:
    try:
        numbers = np.asarray(data)
        if numbers.dtype.kind not in "biuf" or numbers.size != math.prod(shape):
            raise ValueError(
                f"expected {math.prod(shape)} numbers of shape {shape}, got {numbers.dtype} {numbers.shape}"
            )
        if dtype.kind in "iub" and numbers.size and not np.array_equal(numbers, numbers.astype(dtype)):
            raise ValueError(f"numbers are not {dtype}")
        return numbers.astype(dtype).reshape(shape)
    except (ValueError, OverflowError, TypeError) as error:
        raise ResponseFormatError(f"tensor {name!r}: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
