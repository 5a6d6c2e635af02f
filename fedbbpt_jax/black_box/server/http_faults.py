"""A bad API on purpose: seeded faults between a server and its clients, for tests and for research.

What happens to a request depends on the seed, on its `Idempotency-Key` (its body, if it has none) and on how often it
came before, and not on what else arrives when. Refusals come before anything is computed; hung, cut and spoilt answers
come after, so that a client may have to ask again for what the server has answered, and counted, already.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import tomllib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbbpt_jax.black_box.faults import bfloat16, exact, float16, noisy, rounded
from fedbbpt_jax.black_box.server.http_errors import HTTPError, error_body, error_headers
from fedbbpt_jax.black_box.server.served_model import FINGERPRINT, SPOIL
from fedbbpt_jax.errors import TaskError

ASGIApp = Any
KINDS = (
    "rate_limited",
    "server_error",
    "timeout",
    "reset",
    "truncated",
    "malformed",
    "nan",
    "dropped_label",
    "reordered",
    "short",
)
"""What a request meets at most one of, in this order of their probabilities."""
FLIPPED = hashlib.sha256(b"another model").hexdigest()
_DTYPES = {"float32": exact, "float16": float16, "bfloat16": bfloat16}
_REMEMBERED, _MOST_BYTES = 65_536, 64 << 20


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how often; nothing, if left out.

    Attributes:
      seed: of all of it.
      rate_limited: probability of 429 with `Retry-After`.
      server_error: probability of 500, 502 or 503.
      timeout: probability that the answer is computed and never sent.
      reset: probability that the connection is closed instead of the answer.
      truncated: probability that the connection is closed within the answer.
      malformed: probability of an answer that is none.
      nan: probability of a score that is no number.
      dropped_label: probability that the last class has no score.
      reordered: probability that scores come as [B, K, N], or choices in another order.
      short: probability that the last example has no scores.
      retry_after: seconds that a 429 asks for.
      hang_seconds: until a connection without an answer is closed.
      latency: median of the time that every answer waits, seconds.
      latency_sigma: of its lognormal distribution.
      decimals: of the scores.
      dtype: that the scores went through.
      noise: standard deviation of normal noise on every score.
      flip_after: requests after which the fingerprint is another one.
    """

    seed: int = 0
    rate_limited: float = 0.0
    server_error: float = 0.0
    timeout: float = 0.0
    reset: float = 0.0
    truncated: float = 0.0
    malformed: float = 0.0
    nan: float = 0.0
    dropped_label: float = 0.0
    reordered: float = 0.0
    short: float = 0.0
    retry_after: float = 0.0
    hang_seconds: float = 30.0
    latency: float = 0.0
    latency_sigma: float = 0.5
    decimals: int | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    noise: float = 0.0
    flip_after: int | None = None

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
          ValueError: a probability is none, they exceed 1 together, or a time or deviation is negative.
        """
        chances = {kind: getattr(self, kind) for kind in KINDS}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ValueError(f"the fault {name} must have a probability in [0, 1], got {chance}")
        if sum(chances.values()) > 1 + 1e-9:
            raise ValueError(f"faults must have probabilities of at most 1 together, got {sum(chances.values()):g}")
        for name in ("retry_after", "hang_seconds", "latency", "latency_sigma", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"the fault {name} must not be negative, got {getattr(self, name)}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"the fault dtype must be one of {', '.join(_DTYPES)}, got {self.dtype}")


class Plan(NamedTuple):
    """What happens to one attempt.

    Attributes:
      kind: one of `KINDS`, or None.
      latency: seconds.
      seed: of what is random in it.
    """

    kind: str | None
    latency: float
    seed: int


def read_faults(file: Path) -> Faults:
    """Returns the faults that a JSON or TOML file describes by the names of their attributes.

    Raises:
      TaskError: the file cannot be read, or names something else.
    """
    try:
        text = file.expanduser().read_text("utf-8")
        content = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
        known = {field.name for field in fields(Faults)}
        if not isinstance(content, dict) or content.keys() - known:
            raise ValueError(f"expected names out of {', '.join(sorted(known))}, got {content}")
        return Faults(**content)
    except (OSError, ValueError, TypeError) as error:
        raise TaskError(f"cannot read the faults in {file}: {error}") from error


def plan(faults: Faults, key: bytes, attempt: int) -> Plan:
    """Returns what happens to the attempt of a request, the first being 0; always the same.

    >>> plan(Faults(rate_limited=1.0), b"a", 0).kind
    'rate_limited'
    """
    material = hashlib.sha256(f"{faults.seed} {attempt} ".encode() + key).digest()
    rng = np.random.default_rng(np.frombuffer(material, np.uint32))
    edges = np.cumsum([getattr(faults, kind) for kind in KINDS])
    place = int(np.searchsorted(edges, rng.random(), side="right"))
    latency = faults.latency * float(np.exp(faults.latency_sigma * rng.standard_normal()))
    return Plan(KINDS[place] if place < len(KINDS) else None, latency, int(rng.integers(2**31)))


def spoil(faults: Faults, plan: Plan, scores: np.ndarray) -> np.ndarray:
    """Returns scores `[K, B, N]` as they are answered: noise, then the type, then the decimals, then the fault."""
    key = jax.random.key(plan.seed)
    answered = noisy(faults.noise)(jnp.asarray(scores), key) if faults.noise else jnp.asarray(scores)
    answered = _DTYPES[faults.dtype]()(answered, key)
    if faults.decimals is not None:
        answered = rounded(faults.decimals)(answered, key)
    found = np.array(answered)
    match plan.kind:
        case "nan":
            found.flat[plan.seed % found.size] = np.nan
        case "dropped_label":
            found = found[..., :-1]
        case "reordered":
            found = found.swapaxes(0, 1)
        case "short":
            found = found[:, :-1]
    return found


def with_faults(app: ASGIApp, faults: Faults, on_fault: Callable[[str], None] = lambda kind: None) -> ASGIApp:
    """Returns an ASGI application that answers as badly as described; only questions are meant, not metadata.

    Args:
      app: of `create_app`; nothing may stand between this and the server, whose connections it closes.
      faults: what goes wrong.
      on_fault: told of each by its kind.
    """
    attempts: OrderedDict[bytes, int] = OrderedDict()
    num_passed = 0

    def attempt_of(key: bytes) -> int:
        attempts[key] = attempts.pop(key, -1) + 1
        if len(attempts) > _REMEMBERED:
            attempts.popitem(last=False)
        return attempts[key]

    async def faulty(scope: Any, receive: Any, send: Any) -> None:
        nonlocal num_passed
        if scope["type"] != "http":
            return await app(scope, receive, send)
        if faults.flip_after is not None and num_passed >= faults.flip_after:
            scope[FINGERPRINT] = FLIPPED
        if scope["method"] != "POST":
            return await app(scope, receive, send)
        key, receive = await _key(scope, receive)
        own = plan(faults, key, attempt_of(key))
        if own.kind is not None:
            on_fault(own.kind)
        await asyncio.sleep(own.latency)
        if own.kind in ("rate_limited", "server_error"):
            return await _refuse(scope["path"], faults, own, send)
        num_passed += 1
        scope[SPOIL] = lambda scores: spoil(faults, own, scores)
        if own.kind in ("timeout", "reset", "truncated", "malformed"):
            return await _lose(app, scope, receive, send, faults, own)
        await app(scope, receive, send)

    return faulty


async def _key(scope: Any, receive: Any) -> tuple[bytes, Any]:
    """Returns what tells a request from others, and what gives its body again."""
    headers = dict(scope["headers"])
    if b"idempotency-key" in headers:
        return headers[b"idempotency-key"], receive
    messages, length, more = [], 0, True
    while more and length <= _MOST_BYTES:
        messages.append(message := await receive())
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    digest = hashlib.sha256(scope["path"].encode())
    for message in messages:
        digest.update(message.get("body", b""))
    left = iter(messages)

    async def again() -> Any:
        return next(left, None) or await receive()

    return digest.digest(), again


async def _refuse(path: str, faults: Faults, own: Plan, send: Any) -> None:
    if own.kind == "rate_limited":
        error = HTTPError(429, "too many requests", "rate_limit_exceeded", retry_after=faults.retry_after)
    else:
        error = HTTPError((500, 502, 503)[own.seed % 3], "the server failed", "internal_error")
    headers = {"content-type": "application/json"} | error_headers(error)
    await _send(send, error.status, headers, json.dumps(error_body(path, error)).encode())


async def _lose(app: ASGIApp, scope: Any, receive: Any, send: Any, faults: Faults, own: Plan) -> None:
    """Lets the application answer, and keeps all or a part of the answer."""
    status, body = 500, b""

    async def catch(message: Any) -> None:
        nonlocal status, body
        status = message.get("status", status)
        body += message.get("body", b"")

    await app(scope, receive, catch)
    if own.kind == "malformed":
        garbage = (b'{"outputs": [', b"<html>bad gateway</html>", b"", b"[]", b"\x00\xff" * 20)[own.seed % 5]
        return await _send(send, status, {"content-type": "application/json"}, garbage)
    if own.kind == "truncated":
        length = {"content-type": "application/octet-stream", "content-length": str(len(body))}
        await _send(send, status, length, body[: own.seed % max(len(body), 1)], more_body=_transport(send) is not None)
        if _transport(send) is None:
            return
    if own.kind == "timeout":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(faults.hang_seconds):
                await _gone(receive)
    if _transport(send) is None:
        raise ConnectionResetError("a connection was closed, as was asked for")
    _transport(send).close()
    await _gone(receive)


async def _gone(receive: Any) -> None:
    """Waits until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Any, status: int, headers: dict[str, str], body: bytes, *, more_body: bool = False) -> None:
    headers = {"content-length": str(len(body))} | headers
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


def _transport(send: Any) -> Any:
    """Returns the connection behind uvicorn's `send`; None in tests without a socket."""
    return getattr(getattr(send, "__self__", None), "transport", None)
