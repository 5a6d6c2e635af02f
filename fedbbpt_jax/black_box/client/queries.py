"""A query of many clients as messages of one client each, and their answers as one response; pure functions.

All candidates of a client that are tried on the same examples travel in one message, so that both halves of a
difference are answered by the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbbpt_jax.black_box.client.answers import Scale, unpack_scores, usable_rows
from fedbbpt_jax.black_box.protocol import Tensors, datatype, encode, named_leaves
from fedbbpt_jax.errors import QueryFailedError
from fedbbpt_jax.types import Query, Response


class Tensor(NamedTuple):
    """What a model says of a tensor: its name, data type and shape, in which -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Form(NamedTuple):
    """What a model wants to be asked, and how it answers.

    Attributes:
      tensors: of a query: prompts `[K, ...]`, inputs `[B, ...]`; a name can come with several types or shapes.
      num_classes: N.
      scale: what scores can be.
      max_rows: prompts × examples that a message can hold; None for any number.
    """

    tensors: tuple[Tensor, ...]
    num_classes: int
    scale: Scale
    max_rows: int | None

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON carries it."""
        return {
            "tensors": [[t.name, t.datatype, list(t.shape)] for t in self.tensors],
            "num_classes": self.num_classes,
            "scale": list(self.scale),
            "max_rows": self.max_rows,
        }


class Part(NamedTuple):
    """What one message asks.

    Attributes:
      client: whose.
      rows: which of the client's B examples.
      tensors: all K prompts, and these examples.
      shape: of the answer, `(K, rows, N)`.
    """

    client: int
    rows: slice
    tensors: Tensors
    shape: tuple[int, int, int]

    @property
    def num_requests(self) -> int:
        """Prompts × examples."""
        return self.shape[0] * self.shape[1]


def form_from_json(head: Mapping[str, Any]) -> Form:
    """Returns the form that `Form.as_json` wrote."""
    tensors = tuple(Tensor(name, kind, tuple(shape)) for name, kind, shape in head["tensors"])
    return Form(tensors, head["num_classes"], Scale(*head["scale"]), head["max_rows"])


def query_axes(query: Query) -> tuple[int, int, int]:
    """Returns `(C, K, B)` of a query."""
    prompt, inputs = jax.tree.leaves(query.prompt)[0], jax.tree.leaves(query.inputs)[0]
    return inputs.shape[0], prompt.shape[1], inputs.shape[1]


def split_query(query: Query, form: Form) -> list[Part]:
    """Returns the messages of a query, in the order of clients and examples.

    Args:
      query: of arrays on the host or on a device.
      form: that the model wants.

    Raises:
      ValueError: the model does not take such tensors, or not all candidates of a client at once.
    """
    num_clients, num_candidates, batch = query_axes(query)
    prompts, inputs = named_leaves("prompt", query.prompt), named_leaves("inputs", query.inputs)
    per_example = {
        name for name, prompt in prompts.items() if _takes(form, name, prompt, (num_clients, num_candidates), batch)
    }
    for name, tensor in inputs.items():
        _takes(form, name, tensor, (num_clients, batch), None)
    size = batch if form.max_rows is None else min(batch, form.max_rows // num_candidates)
    if size == 0:
        raise ValueError(f"{num_candidates} candidates do not fit in a message of at most {form.max_rows} rows")
    parts = []
    for client in range(num_clients):
        for start in range(0, batch, size):
            rows = slice(start, min(start + size, batch))
            tensors = {n: x[client][:, rows] if n in per_example else x[client] for n, x in prompts.items()}
            tensors |= {n: x[client][rows] for n, x in inputs.items()}
            parts.append(Part(client, rows, tensors, (num_candidates, rows.stop - rows.start, form.num_classes)))
    return parts


def canonical(part: Part) -> bytes:
    """Returns the bytes that a part's key is made from: equal for equal tensors."""
    return encode("inputs", part.tensors)[0]


def join_answers(
    axes: tuple[int, int, int], parts: Sequence[Part], payloads: Sequence[bytes], form: Form
) -> tuple[Response, Counter[str]]:
    """Returns the response to a query, and how many rows are not usable, by kind; their scores are 0.

    Args:
      axes: `(C, K, B)`.
      parts: of the query.
      payloads: the kept answers of the parts; an empty one makes all of its rows "unanswered".
      form: that the model answers in.

    Raises:
      ResponseFormatError: what was kept is not an answer to its part.
    """
    scores = np.zeros((*axes, form.num_classes), np.float32)
    valid, counts = np.zeros(axes, bool), Counter()
    for part, payload in zip(parts, payloads, strict=True):
        if not payload:
            counts["unanswered"] += part.num_requests
            continue
        found = unpack_scores(payload, part.shape)
        usable, faults = usable_rows(found, form.scale)
        counts += faults
        valid[part.client, :, part.rows] = usable
        scores[part.client, :, part.rows] = np.where(usable[..., None], found, 0)
    return Response(jnp.asarray(scores), jnp.asarray(valid)), counts


def read_form(metadata: Mapping[str, Any], num_classes: int, scale: Scale, max_rows: int | None) -> Form:
    """Returns the form of queries to a model, from its own description.

    Args:
      metadata: of the model, in the Open Inference Protocol V2.
      num_classes: N that is expected.
      scale: what scores can be.
      max_rows: that a message can hold, where the model does not say; the smaller one counts.

    Raises:
      QueryFailedError: the description is none, or of a model that answers something else.
    """
    inputs, outputs = _tensors(metadata, "inputs"), _tensors(metadata, "outputs")
    for prefix in ("prompt", "inputs"):
        if not any(t.name.split(".")[0] == prefix for t in inputs):
            names = ", ".join(t.name for t in inputs) or "none"
            raise QueryFailedError(f"the model takes no tensor {prefix!r}: it takes {names}")
    scores = next((t for t in outputs if t.name == "scores"), None)
    if scores is None or scores.datatype != "FP32" or not scores.shape:
        answers = ", ".join(f"{t.name} ({t.datatype})" for t in outputs) or "none"
        raise QueryFailedError(f"the model must answer a tensor scores (FP32), and answers {answers}")
    if scores.shape[-1] not in (-1, num_classes):
        raise QueryFailedError(f"the model answers {scores.shape[-1]} classes, and {num_classes} are needed")
    limits = [n for n in (read_parameter(metadata, "max_rows"), max_rows) if n is not None and n > 0]
    return Form(tuple(inputs), num_classes, scale, min(limits, default=None))


def read_parameter(metadata: Mapping[str, Any], name: str) -> int | None:
    """Returns a number that a model's description tells in its parameters; None if it does not."""
    parameters = metadata.get("parameters")
    told = parameters.get(name) if isinstance(parameters, dict) else None
    return told if type(told) is int and told > 0 else None


def _tensors(metadata: Mapping[str, Any], side: str) -> list[Tensor]:
    try:
        return [Tensor(str(t["name"]), str(t["datatype"]), tuple(int(n) for n in t["shape"])) for t in metadata[side]]
    except (KeyError, TypeError, ValueError) as error:
        raise QueryFailedError(f"the model's description has no list of {side} with names, types and shapes") from error


def _takes(form: Form, name: str, tensor: np.ndarray, leading: tuple[int, int], batch: int | None) -> bool:
    """Returns whether a prompt is given for each example; raises where the model does not take the tensor.

    Args:
      form: that the model wants.
      name: of the tensor.
      tensor: `[C, K, ...]`, `[C, K, B, ...]` or `[C, B, ...]`.
      leading: the sizes of its first two axes.
      batch: B; None for inputs.
    """
    if tensor.shape[:2] != leading:
        raise ValueError(f"tensor {name!r} must start with axes {list(leading)}, got {list(tensor.shape)}")
    alike = [t for t in form.tensors if t.name == name and t.datatype == datatype(tensor)]
    for declared in alike:
        if _fits(tensor.shape[1:], declared.shape):
            return False
        for_each = batch is not None and tensor.shape[2:3] == (batch,)
        if for_each and _fits((tensor.shape[1], *tensor.shape[3:]), declared.shape):
            return True
    wanted = ", ".join(f"{t.name} ({t.datatype} {list(t.shape)})" for t in form.tensors)
    got = f"{name} ({datatype(tensor) or tensor.dtype} {list(tensor.shape[1:])})"
    raise ValueError(f"the model takes {wanted}, not {got}")


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    return len(shape) == len(declared) and all(n in (-1, m) for n, m in zip(declared, shape, strict=True))
