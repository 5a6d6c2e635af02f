"""A server of vectors in the process, which fails as it is told, and time that passes when somebody sleeps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import numpy as np

from fedbbpt_jax.black_box.client.pacing import Clock
from fedbbpt_jax.black_box.protocol import HEAD_LENGTH, decode, encode

N = 4
METADATA: dict[str, Any] = {
    "name": "vectors",
    "platform": "jax",
    "inputs": [
        {"name": "prompt", "datatype": "FP32", "shape": [-1, N]},
        {"name": "inputs", "datatype": "FP32", "shape": [-1, N]},
    ],
    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, -1, N]}],
    "parameters": {"system_fingerprint": "v1", "max_rows": 64},
}

Fault = Callable[[httpx.Request], Any]
"""Raises, or returns a response in place of the answer, or None to answer."""


class FakeTime:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now, self.sleep, lambda: 0.0)


class FakeServer:
    """Scores are the input plus the prompt. Faults are taken in turn, one for each message; none are left: it answers.

    Attributes:
      requests: that came.
      billed: rows that were computed.
      idempotent: whether what comes again under its key is not billed again.
    """

    def __init__(self, *, metadata: Any = METADATA, idempotent: bool = True) -> None:
        self.metadata, self.idempotent = metadata, idempotent
        self.fingerprint, self.faults = "v1", []
        self.requests: list[httpx.Request] = []
        self.billed, self.in_flight, self.most_in_flight = 0, 0, 0
        self._answered: set[str] = set()

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.handle)

    @property
    def posts(self) -> list[httpx.Request]:
        return [request for request in self.requests if request.method == "POST"]

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.method == "GET":
            return self.describe(request.url.path)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            fault = self.faults.pop(0) if self.faults else None
            response = fault(request) if fault else None
            if asyncio.iscoroutine(response):
                response = await response
            return self.answer(request) if response is None else response
        finally:
            self.in_flight -= 1

    def describe(self, path: str) -> httpx.Response:
        if path == "/v2/health/ready":
            return httpx.Response(200)
        if path == "/v2/models/vectors":
            return httpx.Response(200, json=self.metadata)
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "vectors"}, {"id": "digits"}]})
        return httpx.Response(404, json={"error": "not found"})

    def answer(self, request: httpx.Request, change: Callable = lambda scores: scores, **head: Any) -> httpx.Response:
        """Computes and bills the answer to a request, with changes to its scores and its head."""
        tensors, asked = decode("inputs", request.content, int(request.headers[HEAD_LENGTH]))
        prompt, inputs = tensors["prompt"], tensors["inputs"]
        prompt = prompt[:, None] if prompt.ndim == 2 else prompt
        scores = (inputs[None] + prompt).astype(np.float32)
        key = request.headers["Idempotency-Key"]
        if not (self.idempotent and key in self._answered):
            self.billed += scores.shape[0] * scores.shape[1]
        self._answered.add(key)
        parameters = {"system_fingerprint": self.fingerprint, "num_requests": scores.shape[0] * scores.shape[1]}
        body, length = encode(
            "outputs", {"scores": change(scores)}, {"id": asked["id"], "parameters": parameters} | head
        )
        return httpx.Response(200, content=body, headers={HEAD_LENGTH: str(length)})


def status(code: int, headers: dict[str, str] | None = None, /, **error: str) -> Fault:
    """Returns the fault of an answer with this status."""
    return lambda request: httpx.Response(code, headers=headers, content=json.dumps({"error": error}).encode())


def broken(error: type[Exception]) -> Fault:
    """Returns the fault of a connection that breaks."""

    def fail(request: httpx.Request) -> None:
        raise error("broken")

    return fail
