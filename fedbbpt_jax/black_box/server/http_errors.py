"""Refusals of the server, in the form that the clients of each kind of address expect."""

from __future__ import annotations

import math
from typing import Any


class HTTPError(Exception):
    """A request is refused.

    Attributes:
      status: of HTTP.
      code: a word for programs, such as `model_not_found`.
      param: what of the request is meant.
      retry_after: seconds; None where trying again does not help.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: float | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


def error_body(path: str, error: HTTPError) -> dict[str, Any]:
    """Returns what is answered: the text alone under /v2, as its protocol wants; OpenAI's object anywhere else.

    >>> error_body("/v2/models/m", HTTPError(404, "no model m", "model_not_found"))
    {'error': 'no model m'}
    """
    if path == "/v2" or path.startswith("/v2/"):
        return {"error": str(error)}
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(error.status)
    kind = kind or ("server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_headers(error: HTTPError) -> dict[str, str]:
    """Returns the headers of a refusal."""
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
        headers["retry-after-ms"] = str(math.ceil(1000 * error.retry_after))
    return headers
