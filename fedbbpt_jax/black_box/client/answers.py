"""What came over the wire, judged before anybody uses it.

A structural fault (another shape, another message's answer, half a body) rejects the whole message, which can be asked
for again. A fault of a value (NaN, a number that no score can be) masks its row: the model said so, and would again.
Nothing is repaired or imputed.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from fedbbpt_jax.black_box.protocol import decode
from fedbbpt_jax.errors import ResponseFormatError

MISSING = -9999.0
"""What servers with the interface of OpenAI's put where they have no log-probability."""

_SHAPE = struct.Struct("<3I")


class Scale(NamedTuple):
    """The smallest and the largest that a score can be."""

    low: float
    high: float


SCORES = Scale(-1e30, 1e30)
LOG_PROBABILITIES = Scale(-1e30, 1e-6)
PROBABILITIES = Scale(0.0, 1.0 + 1e-6)


class RejectedAnswerError(ResponseFormatError):
    """An answer is no answer to what was asked.

    Attributes:
      kind: of fault, for counting: "body", "id", "tensors", "datatype", "shape" or "fingerprint".
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


class Answer(NamedTuple):
    """Scores float32 `[K, B, N]` as they came, and the fingerprint that came with them, "" if none did."""

    scores: np.ndarray
    fingerprint: str


def read_answer(body: bytes, head_length: int | None, message_id: str, shape: tuple[int, int, int]) -> Answer:
    """Returns what a message answers.

    Args:
      body: of the message.
      head_length: how many of its bytes are the head; all, if None.
      message_id: that was sent, and must come back.
      shape: `(K, B, N)`.

    Raises:
      RejectedAnswerError: it is not complete, of another query, or not of this shape.
    """
    try:
        tensors, head = decode("outputs", body, head_length)
    except ResponseFormatError as error:
        raise RejectedAnswerError("body", str(error)) from error
    if head.get("id") != message_id:
        raise RejectedAnswerError("id", f"the answer is of message {head.get('id')!r:.40}, not {message_id!r}")
    if set(tensors) != {"scores"}:
        raise RejectedAnswerError("tensors", f"expected a tensor 'scores', got {', '.join(sorted(tensors)) or 'none'}")
    scores = tensors["scores"]
    if scores.dtype != np.float32:
        raise RejectedAnswerError("datatype", f"scores must be FP32, got {scores.dtype}")
    if scores.shape != shape:
        raise RejectedAnswerError("shape", f"scores must be [K, B, N] = {list(shape)}, got {list(scores.shape)}")
    return Answer(scores, fingerprint_of(head))


def fingerprint_of(head: dict[str, Any]) -> str:
    """Returns the fingerprint of the model in a head's parameters, "" where there is none.

    Raises:
      RejectedAnswerError: it is no text.
    """
    parameters = head.get("parameters")
    found = parameters.get("system_fingerprint", "") if isinstance(parameters, dict) else ""
    if not isinstance(found, str) or len(found) > 256:
        raise RejectedAnswerError("fingerprint", "the fingerprint of a model is a short text")
    return found


def usable_rows(scores: np.ndarray, scale: Scale) -> tuple[np.ndarray, Counter[str]]:
    """Returns which rows are usable, bool `[...]`, and how many are not, by kind; each row is counted once.

    Args:
      scores: `[..., N]`.
      scale: what scores can be.

    Example:
      >>> rows, counts = usable_rows(np.float32([[-0.1, -2], [np.nan, -9999], [-1, 3]]), LOG_PROBABILITIES)
      >>> rows.tolist(), dict(counts)
      ([True, False, False], {'nan': 1, 'too high': 1})
    """
    usable, counts = np.ones(scores.shape[:-1], bool), Counter()
    for kind, fault in (
        ("nan", np.isnan(scores)),
        ("infinite", np.isinf(scores)),
        ("missing", scores == MISSING),
        ("too high", scores > scale.high),
        ("too low", scores < scale.low),
    ):
        bad = fault.any(-1) & usable
        usable &= ~bad
        if bad.any():
            counts[kind] = int(bad.sum())
    return usable, counts


def pack_scores(scores: np.ndarray) -> bytes:
    """Returns scores float32 `[K, B, N]` as bytes, to be kept; bit for bit, NaN included."""
    return _SHAPE.pack(*scores.shape) + np.ascontiguousarray(scores, "<f4").tobytes()


def unpack_scores(payload: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the scores `[K, B, N]` that were kept.

    Raises:
      ResponseFormatError: they are not of this shape.
    """
    found = _SHAPE.unpack_from(payload) if len(payload) >= _SHAPE.size else ()
    if found != shape or len(payload) != _SHAPE.size + 4 * shape[0] * shape[1] * shape[2]:
        raise ResponseFormatError(f"expected scores of shape {list(shape)}, got {list(found)} in {len(payload)} bytes")
    return np.frombuffer(payload, "<f4", offset=_SHAPE.size).reshape(shape)
