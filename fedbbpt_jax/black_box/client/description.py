"""Asks a server, before anything is paid, whether it is there, lets us in and has the model that is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx2 as httpx

from fedbbpt_jax.black_box.client.delivery import RETRIED, explanation
from fedbbpt_jax.black_box.client.pacing import Clock, Pace, Patience, told_delay
from fedbbpt_jax.errors import QueryFailedError

_MOST_NAMES = 20


class Visit(NamedTuple):
    """What it takes to look at a server.

    Attributes:
      client: of the server.
      patience: with a server that is busy, or still loading.
      clock: to wait by.
      token_advice: what to do about a token that is asked for.
      redact: takes the secret out of a text.
    """

    client: httpx.AsyncClient
    patience: Patience
    clock: Clock
    token_advice: str
    redact: Callable[[str], str]

    @property
    def url(self) -> str:
        """Of the server."""
        return str(self.client.base_url).rstrip("/")


def model_path(model: str) -> str:
    """Returns the path of a model in the Open Inference Protocol V2.

    Example:
      >>> model_path("mini/clip")
      '/v2/models/mini%2Fclip'
    """
    return f"/v2/models/{quote(model, safe='')}"


async def describe(visit: Visit, model: str) -> dict[str, Any]:
    """Returns what a server says of a model: the metadata of the Open Inference Protocol V2.

    Args:
      visit: of the server.
      model: its name there.

    Raises:
      QueryFailedError: nothing answers, the token is wrong, this is another kind of server, or it has no such model.
    """
    if (await _get(visit, "/v2/health/ready")).status_code == 404:
        raise QueryFailedError(f"{visit.url}: does not speak the Open Inference Protocol V2 (no /v2/health/ready)")
    response = await _get(visit, model_path(model))
    if response.status_code == 404:
        raise _no_model(visit, model, await list_models(visit))
    metadata = _json(response)
    if not isinstance(metadata, dict):
        raise QueryFailedError(f"{visit.url}{model_path(model)}: is no description of a model")
    return metadata


async def find_model(visit: Visit, model: str) -> None:
    """Checks that a server with the interface of OpenAI's has a model.

    Args:
      visit: of the server.
      model: its name there.

    Raises:
      QueryFailedError: nothing answers, the token is wrong, this is another kind of server, or it has no such model.
    """
    names = await list_models(visit)
    if not names:
        raise QueryFailedError(f"{visit.url}: has no list of models (/v1/models)")
    if model not in names:
        raise _no_model(visit, model, names)


async def list_models(visit: Visit) -> list[str]:
    """Returns the names in a list of models as OpenAI gives it, none where it is not one.

    Raises:
      QueryFailedError: nothing answers, or the token is wrong.
    """
    listed = _json(await _get(visit, "/v1/models"))
    models = listed.get("data") if isinstance(listed, dict) else None
    found = [m.get("id") for m in models if isinstance(m, dict)] if isinstance(models, list) else []
    return [name for name in found if isinstance(name, str)]


async def _get(visit: Visit, path: str) -> httpx.Response:
    """Returns an answer of status 200 or 404; waits for one that is not ready."""
    reason, pace, patience = "", Pace(visit.patience, visit.clock, seed=0), visit.patience
    for attempt in range(1, patience.max_attempts + 1):
        told = None
        try:
            response = await visit.client.get(path)
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise QueryFailedError(f"{visit.url}: nothing answers there ({type(error).__name__})") from error
        except httpx.RequestError as error:
            reason = type(error).__name__
        else:
            status = response.status_code
            words = visit.redact(explanation(response.content)[1])
            reason = f"status {status}{': ' if words else ''}{words}"
            if status in (200, 404):
                return response
            if status in (401, 403):
                raise QueryFailedError(f"{visit.url}: wants a token ({reason}): {visit.token_advice}")
            if status not in RETRIED and status < 500:
                break
            told = told_delay(response.headers, visit.clock)
        if attempt < patience.max_attempts:
            await visit.clock.sleep(pace.delay(attempt, told))
    raise QueryFailedError(f"{visit.url}{path}: is not ready ({reason})")


def _no_model(visit: Visit, model: str, names: list[str]) -> QueryFailedError:
    known = f"; it has {', '.join(names[:_MOST_NAMES])}" if names else ""
    return QueryFailedError(f"{visit.url}: has no model {model!r}{known}")


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return None
