"""What a server takes at most; apart from the server, whose packages not everybody has."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What the server takes; more is refused.

    Attributes:
      body_bytes: of one request.
      json_bytes: of what of a request is JSON, which takes more memory than it is long.
      total_bytes: of all requests that are in the server at one time.
      body_seconds: until a body must be there.
      requests: in the server at one time.
      rows: a request may ask for, K·B.
      waiting_rows: of all requests.
      answers: that are kept for repeated requests (`Idempotency-Key`), and their bytes.
      answer_bytes: of these together.
    """

    body_bytes: int = 64 << 20
    json_bytes: int = 4 << 20
    total_bytes: int = 256 << 20
    body_seconds: float = 60.0
    requests: int = 512
    rows: int = 4096
    waiting_rows: int = 16_384
    answers: int = 16_384
    answer_bytes: int = 64 << 20
