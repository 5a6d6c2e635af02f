"""What is served: a box that is asked in rows, the shape of its queries, and a fingerprint of what makes its bits."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedbbpt_jax.black_box.frozen import Precision
from fedbbpt_jax.black_box.protocol import datatype, named_leaves
from fedbbpt_jax.black_box.rows import RowProgram, is_text, num_scores, row_program
from fedbbpt_jax.types import BlackBox, PyTree, Query

NUM_ROWS = 32
SPOIL, FINGERPRINT = "fedbbpt.spoil", "fedbbpt.fingerprint"
"""What fault injection leaves in the scope of a request: a function of its scores, and another fingerprint."""
_ROOT = Path(__file__).parent.parent


class ServedRows(NamedTuple):
    """One kind of query that a model answers, in rows.

    Attributes:
      like: a query of one row: prompt `[1, 1, ...]`, inputs `[1, b, ...]`.
      num_rows: R, computed at a time.
      num_classes: N.
      compute: of R rows.
    """

    like: Query
    num_rows: int
    num_classes: int
    compute: RowProgram


class ServedText(NamedTuple):
    """How a model is asked in plain text, without a prompt that is told apart from it.

    Attributes:
      rows: their prompt has no positions.
      encode: n texts to inputs `[n, ...]`, and how many tokens each of them has, int `[n]`. A text that cannot be
        encoded is a `ValueError` or a `TaskError`.
      embeddings: of texts, as if they were scores; None for a model that is no encoder of sentences.
    """

    rows: ServedRows
    encode: Callable[[Sequence[str]], tuple[PyTree, np.ndarray]]
    embeddings: ServedRows | None = None


class ServedModel(NamedTuple):
    """A frozen model as it is served.

    Attributes:
      name: in the addresses.
      class_names: N names, in the order of the scores.
      rows: what it answers.
      bare: the same inputs with a prompt of no words; None for pictures.
      fingerprint: changes with anything that may change an answer.
      text: how it is asked in plain text; None for pictures.
    """

    name: str
    class_names: tuple[str, ...]
    rows: ServedRows
    fingerprint: str
    bare: ServedRows | None = None
    text: ServedText | None = None

    @property
    def kinds_of_rows(self) -> list[ServedRows]:
        """All rows that it answers; two names for the same rows are one kind."""
        of_text = (None, None) if self.text is None else (self.text.rows, self.text.embeddings)
        found = {id(rows): rows for rows in (self.rows, self.bare, *of_text) if rows is not None}
        return list(found.values())

    @property
    def image_size(self) -> int:
        """H = W of the pictures that it takes, pixels; 0 where inputs are no pictures."""
        inputs = self.rows.like.inputs
        return inputs.shape[2] if getattr(inputs, "ndim", 0) == 5 and inputs.shape[-1] == 3 else 0


def served_rows(box: BlackBox, like: Query, num_rows: int = NUM_ROWS) -> ServedRows:
    """Returns a box as rows, as `in_rows` asks it."""
    return ServedRows(like, num_rows, num_scores(box, like), row_program(box, like, num_rows))


def served_model(
    name: str,
    box: BlackBox,
    like: Query,
    class_names: Sequence[str],
    precision: Precision = "highest",
    num_rows: int = NUM_ROWS,
) -> ServedModel:
    """Returns a model to be served.

    Args:
      name: for the addresses: letters, digits, `.`, `_` and `-`.
      box: a pytree.
      like: a query of one row (`in_rows`).
      class_names: N names.
      precision: of the box, for the fingerprint.
      num_rows: R, computed at a time.

    Raises:
      ValueError: the name does not fit in an address, or there is not a name for each class.
    """
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ValueError(f"the name of a served model must be letters, digits, '.', '_' and '-', got {name!r}")
    rows = served_rows(box, like, num_rows)
    if len(class_names) != rows.num_classes:
        raise ValueError(f"expected a name for each of {rows.num_classes} classes, got {list(class_names)}")
    return ServedModel(name, tuple(class_names), rows, fingerprint_of(box, like, precision, num_rows))


def fingerprint_of(box: BlackBox, like: Query, precision: Precision, num_rows: int) -> str:
    """Returns a SHA-256 of all that an answer's bits depend on, 64 hexadecimal digits.

    That is weights, structure and precision of the box, this package's models and boxes, jax and its flags, the
    backend and kind of device, and the shape of the rows. Equal fingerprints on different machines promise less: the
    compiler fits its programs to the processor.
    """
    digest = hashlib.sha256()
    for part in (box, like):
        leaves, structure = jax.tree_util.tree_flatten_with_path(part)
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", str(structure)).encode())
        for path, leaf in leaves:
            array = np.ascontiguousarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes() if part is box else b"")
    for room in ("models", "black_box"):
        for file in sorted((_ROOT / room).glob("*.py")):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    place = jax.default_backend(), jax.devices()[0].device_kind, os.environ.get("XLA_FLAGS", "")
    packages = tuple(version(name) for name in ("fedbbpt_jax", "jax", "jaxlib"))
    digest.update(repr((precision, num_rows, place, packages)).encode())
    return digest.hexdigest()


def tensor_specs(model: ServedModel) -> list[dict[str, Any]]:
    """Returns name, datatype and shape of what a request may hold; the first axis, K or B, is free.

    So is the length of texts, up to `max_length`; and a prompt without words is one of the prompts.
    """
    prompt, inputs = model.rows.like
    prompts = [prompt] if model.bare is None else [prompt, model.bare.like.prompt]
    specs = [(name, leaf, leaf.shape[2:]) for tree in prompts for name, leaf in named_leaves("prompt", tree).items()]
    for name, leaf in named_leaves("inputs", inputs).items():
        specs.append((name, leaf, (-1,) if is_text(leaf) else leaf.shape[2:]))
    return [{"name": name, "datatype": datatype(leaf), "shape": [-1, *shape]} for name, leaf, shape in specs]


def max_length(rows: ServedRows) -> int | None:
    """Returns the tokens of the longest text that rows can hold; None where inputs are no texts."""
    return next((leaf.shape[2] for leaf in jax.tree.leaves(rows.like.inputs) if is_text(leaf)), None)
