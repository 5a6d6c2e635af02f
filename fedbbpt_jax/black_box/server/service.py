"""What all routes of the server share: its limits, how a body is read, and how a question is answered, once."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedbbpt_jax.black_box.rows import Cut
from fedbbpt_jax.black_box.server.batcher import Batch, Batcher, QueueFullError
from fedbbpt_jax.black_box.server.http_errors import HTTPError
from fedbbpt_jax.black_box.server.idempotency import Answers, KeyReusedError
from fedbbpt_jax.black_box.server.limits import Limits
from fedbbpt_jax.black_box.server.served_model import FINGERPRINT, SPOIL, ServedModel, ServedRows


class Metrics(NamedTuple):
    """What Prometheus is told."""

    registry: CollectorRegistry
    http: Counter
    http_seconds: Histogram
    answered: Counter
    computed: Counter
    batches: Counter
    fill: Histogram
    batch_seconds: Histogram


@dataclass
class InFlight:
    """What is in the server at this moment."""

    num_requests: int = 0
    num_bytes: int = 0


class Service(NamedTuple):
    """A served model with all that is needed to answer; each kind of rows has a batcher, under its `id`."""

    model: ServedModel
    limits: Limits
    batchers: Mapping[int, Batcher]
    answers: Answers[np.ndarray]
    metrics: Metrics
    in_flight: InFlight

    async def close(self) -> None:
        """Answers all that wait, and ends the threads."""
        for batcher in self.batchers.values():
            await batcher.close()

    def compute(self, rows: ServedRows, cut: Cut) -> Callable[[], Awaitable[np.ndarray]]:
        """Returns what computes the rows of a cut, rows of that kind."""
        return lambda: self.batchers[id(rows)].answer(cut)


def new_service(model: ServedModel, limits: Limits) -> Service:
    """Returns the service of a model; nothing runs before the first question."""
    metrics = _new_metrics()

    def on_batch(batch: Batch) -> None:
        metrics.batches.inc()
        metrics.fill.observe(batch.count / batch.size)
        metrics.batch_seconds.observe(batch.seconds)

    # Rows are small programs, each of which keeps one core busy; an accelerator computes one batch after another.
    num_threads = min(os.cpu_count() or 1, 8) if jax.default_backend() == "cpu" else 1
    batchers = {id(rows): Batcher(rows, limits.waiting_rows, on_batch, num_threads) for rows in model.kinds_of_rows}
    rows_waiting = Gauge("fedbbpt_rows_waiting", "Rows that wait for a batch", registry=metrics.registry)
    rows_waiting.set_function(lambda: sum(b.num_waiting for b in batchers.values()))
    answers: Answers[np.ndarray] = Answers(limits.answers, limits.answer_bytes)
    return Service(model, limits, batchers, answers, metrics, InFlight())


@asynccontextmanager
async def received(service: Service, request: Request) -> AsyncIterator[bytes]:
    """Gives the body of a request, which counts as being in memory until the end.

    Raises:
      HTTPError: it is too long, too slow or encoded, or there is no room for it.
    """
    limits, in_flight = service.limits, service.in_flight
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPError(415, "a body must not be compressed", "unsupported_encoding")
    too_long = HTTPError(413, f"a body must be at most {limits.body_bytes} bytes", "body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limits.body_bytes:
        raise too_long
    chunks, length = [], 0
    try:
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    length += len(chunk)
                    in_flight.num_bytes += len(chunk)
                    if length > limits.body_bytes:
                        raise too_long
                    if in_flight.num_bytes > limits.total_bytes:
                        raise HTTPError(503, "too many bytes wait for an answer", "overloaded", retry_after=1.0)
                    chunks.append(chunk)
        except TimeoutError as error:
            raise HTTPError(408, "the body did not come in time", "body_too_slow") from error
        yield b"".join(chunks)
    finally:
        in_flight.num_bytes -= length


async def answer(
    service: Service, request: Request, body: bytes, num_requests: int, make: Callable[[], Awaitable[np.ndarray]]
) -> np.ndarray:
    """Returns the answer to a request; the same key and body get it again, and it is neither computed nor counted.

    Args:
      service: what answers.
      request: whose headers may hold an `Idempotency-Key`.
      body: of the request.
      num_requests: that it asks, prompts times examples.
      make: computes the answer.

    Raises:
      HTTPError: there is no room for it, or its key is no key or came with another request.
    """
    metrics = service.metrics
    check_rows(service.limits, num_requests)

    async def counted() -> np.ndarray:
        try:
            found = await make()
        except QueueFullError as full:
            raise HTTPError(429, str(full), "rate_limit_exceeded", retry_after=full.retry_after) from full
        metrics.computed.inc(num_requests)
        return found

    key = request.headers.get("idempotency-key")
    if key is None:
        scores = await asyncio.shield(asyncio.ensure_future(counted()))
    else:
        if not 0 < len(key) <= 255 or not key.isprintable():
            raise HTTPError(400, "an Idempotency-Key has 1 to 255 printable characters", "invalid_idempotency_key")
        try:
            scores, _ = await service.answers.once(key, _digest(request, body), counted, lambda x: x.nbytes)
        except KeyReusedError as error:
            raise HTTPError(422, "this Idempotency-Key came with another request", "idempotency_key_reused") from error
    metrics.answered.inc(num_requests)
    return scores


def check_rows(limits: Limits, num_requests: int) -> None:
    """Checks that a request does not ask for too much.

    Raises:
      HTTPError: it does.
    """
    if num_requests > limits.rows:
        raise HTTPError(413, f"a request may ask for {limits.rows} rows, got {num_requests}", "too_many_rows")


def as_answered(request: Request, scores: np.ndarray) -> np.ndarray:
    """Returns scores `[K, B, N]` as they leave: as they are, unless faults are injected."""
    return request.scope.get(SPOIL, lambda x: x)(scores)


def fingerprint(service: Service, request: Request) -> str:
    """Returns the fingerprint that a request is answered with."""
    return request.scope.get(FINGERPRINT, service.model.fingerprint)


def _digest(request: Request, body: bytes) -> bytes:
    """Returns what tells a request from another one: where it goes, and what it says."""
    head = f"{request.url.path}\n{request.headers.get('inference-header-content-length', '')}\n"
    return hashlib.sha256(head.encode() + body).digest()


def _new_metrics() -> Metrics:
    registry = CollectorRegistry()
    seconds = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    return Metrics(
        registry,
        Counter("fedbbpt_http_requests", "HTTP requests by status", ["status"], registry=registry),
        Histogram("fedbbpt_http_seconds", "Time to an answer", buckets=seconds, registry=registry),
        Counter("fedbbpt_requests_answered", "Prompts on examples, repeats included", registry=registry),
        Counter("fedbbpt_requests_computed", "Prompts on examples, each repeat once", registry=registry),
        Counter("fedbbpt_batches", "Batches computed", registry=registry),
        Histogram(
            "fedbbpt_batch_fill",
            "Share of a batch that was asked for",
            buckets=[n / 8 for n in range(1, 9)],
            registry=registry,
        ),
        Histogram("fedbbpt_batch_seconds", "Time of a batch", buckets=seconds, registry=registry),
    )
