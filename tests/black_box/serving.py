"""A served model that is quick to make, and requests to it: in one process, or over a real socket."""

import asyncio
import contextlib
import functools
import socket
import threading

import httpx2
import jax
import numpy as np
import uvicorn
from conftest import linear_box

from fedbbpt_jax.black_box.protocol import HEAD_LENGTH, decode, encode
from fedbbpt_jax.black_box.server.app import create_app
from fedbbpt_jax.black_box.server.served_model import served_model
from fedbbpt_jax.types import Query

INFER = "/v2/models/linear/infer"
TOKEN = "correct-horse"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@functools.cache
def linear():
    """Returns a model of vectors of 4 numbers, whose scores are the input plus the prompt on a curve."""
    one = Query(np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 4), np.float32))
    return served_model("linear", jax.tree_util.Partial(linear_box), one, ("a", "b", "c", "d"), num_rows=4)


def app_of(model=None, **options):
    return create_app(model or linear(), **options)


def vectors(num_prompts=2, num_examples=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "prompt": rng.normal(size=(num_prompts, 4)).astype("f"),
        "inputs": rng.normal(size=(num_examples, 4)).astype("f"),
    }


def message(tensors=None, **head):
    """Returns the body and headers of a request that wants binary scores."""
    wanted = {"outputs": [{"name": "scores", "parameters": {"binary_data": True}}]}
    body, length = encode("inputs", vectors() if tensors is None else tensors, wanted | head)
    return body, {HEAD_LENGTH: str(length)}


def scores_of(response):
    """Returns the scores and the head of an answer."""
    assert response.status_code == 200, response.text
    length = response.headers.get(HEAD_LENGTH)
    tensors, head = decode("outputs", response.content, None if length is None else int(length))
    return tensors["scores"], head


def expected_scores(prompt, inputs):
    moved = prompt[:, None] + inputs[None]
    return moved + 0.3 * np.sin(moved)


@contextlib.asynccontextmanager
async def client_of(app, **options):
    transport = httpx2.ASGITransport(app=app, **options)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
        yield client


def send(app, *requests, **options):
    """Returns the responses to requests `(method, address, body, headers)`, sent one after another."""

    async def all_of_them():
        async with client_of(app, **options) as client:
            return [await client.request(m, url, content=body, headers=headers) for m, url, body, headers in requests]

    return asyncio.run(all_of_them())


def infer(app, tensors=None, headers=None, **head):
    body, own = message(tensors, **head)
    return send(app, ("POST", INFER, body, own | (headers or {})))[0]


@contextlib.contextmanager
def listening(app):
    """Serves an application on a free port of loopback, in another thread; gives its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # Without a logging configuration, since that would close the handlers that other libraries have.
        config = uvicorn.Config(app, log_config=None, log_level="warning", lifespan="on", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
                assert thread.is_alive()
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
