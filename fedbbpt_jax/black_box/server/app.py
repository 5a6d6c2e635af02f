"""A frozen model as a query-only HTTP server: it gives scores, and no weights, gradients or hidden states.

No address is fetched for a client, and nothing is loaded but what the server was started with.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fedbbpt_jax.black_box.server.http_errors import HTTPError, error_body, error_headers
from fedbbpt_jax.black_box.server.limits import Limits
from fedbbpt_jax.black_box.server.openai_routes import openai_routes
from fedbbpt_jax.black_box.server.served_model import ServedModel
from fedbbpt_jax.black_box.server.service import Service, new_service
from fedbbpt_jax.black_box.server.v2_routes import v2_routes

ASGIApp = Any


def create_app(model: ServedModel, *, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """Returns the server of a model: the Open Inference Protocol V2, OpenAI's routes, and /metrics.

    Args:
      model: what is served.
      token: that every request must bear, on every route; None for a server that only its own machine reaches.
      limits: of requests.

    Raises:
      ValueError: the token is empty or has characters that no header carries.
    """
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ValueError("a token must be printable ASCII without spaces")
    service = new_service(model, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="fedbbpt", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(v2_routes(service))
    app.include_router(openai_routes(service))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    faults = Counter("fedbbpt_faults", "Injected faults by kind", ["kind"], registry=service.metrics.registry)
    app.state.count_fault = lambda kind: faults.labels(kind).inc()
    _answer_errors(app)
    app.add_middleware(guarded, service=service, token=token)
    return app


def check_address(host: str, token: str | None) -> None:
    """Checks that a server that others reach asks for a token.

    Raises:
      ValueError: it does not.

    Example:
      >>> check_address("127.0.0.1", None)
      >>> check_address("0.0.0.0", "a secret")
    """
    if not is_loopback(host) and not token:
        raise ValueError(f"others reach {host}: set a token in the environment variable FEDBBPT_TOKEN")


def is_loopback(host: str) -> bool:
    """Returns whether a host, without its port, is this machine by name or number.

    Example:
      >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("example.org")
      (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guarded(app: ASGIApp, service: Service, token: str | None) -> ASGIApp:
    """Returns an ASGI application that answers who bears the token, not too many at a time, and counts them.

    Every answer has the `x-request-id` of the request, or a new one.
    """
    expected = None if token is None else f"Bearer {token}".encode()

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        started, metrics = time.perf_counter(), service.metrics

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                metrics.http.labels(message["status"]).inc()
                metrics.http_seconds.observe(time.perf_counter() - started)
            await send(message)

        refusal = _refusal(service, expected, headers)
        if refusal is not None:
            return await _refused(scope["path"], refusal)(scope, receive, named)
        service.in_flight.num_requests += 1
        try:
            await app(scope, receive, named)
        finally:
            service.in_flight.num_requests -= 1

    return guard


def _refusal(service: Service, expected: bytes | None, headers: dict[bytes, bytes]) -> HTTPError | None:
    given = headers.get(b"authorization", b"")
    given = b"Bearer " + given[7:] if given[:7].lower() == b"bearer " else b""
    if expected is not None and not hmac.compare_digest(given, expected):
        return HTTPError(401, "a bearer token is needed, and this is not it", "invalid_api_key")
    # Without a token the server is for this machine only; a page in its browser comes under a name of its own.
    host = re.sub(rb":\d*$", b"", headers.get(b"host", b"localhost")).decode("latin-1").strip("[]")
    if expected is None and not is_loopback(host):
        return HTTPError(403, "without a token, only localhost is answered", "forbidden_host")
    if service.in_flight.num_requests >= service.limits.requests:
        return HTTPError(503, "too many requests wait for an answer", "overloaded", retry_after=1.0)
    return None


def _refused(path: str, error: HTTPError) -> Response:
    return JSONResponse(error_body(path, error), error.status, error_headers(error))


def _answer_errors(app: FastAPI) -> None:
    """Gives every error the form of its route, and none the text of an exception that nobody expected."""

    @app.exception_handler(HTTPError)
    async def own(request: Request, error: HTTPError) -> Response:
        return _refused(request.url.path, error)

    @app.exception_handler(HTTPException)
    async def of_routes(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        refused = _refused(request.url.path, HTTPError(error.status_code, str(error.detail), code))
        refused.headers.update(error.headers or {})
        return refused

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _refused(request.url.path, HTTPError(400, "the address is not what the route takes", "invalid_request"))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _refused(request.url.path, HTTPError(500, "the server failed", "internal_error"))
