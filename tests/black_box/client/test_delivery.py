"""What real connections do, over loopback: which of their failures may have been billed."""

import asyncio
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2 as httpx
import numpy as np
import pytest
from fake_server import FakeServer, N

from fedbbpt_jax.black_box.client.connection import Terms
from fedbbpt_jax.black_box.client.delivery import explanation
from fedbbpt_jax.black_box.client.pacing import Patience
from fedbbpt_jax.black_box.ledger.costs import Balance, Cost
from fedbbpt_jax.black_box.ledger.ledger import open_ledger
from fedbbpt_jax.black_box.remote import connect
from fedbbpt_jax.types import Query

QUICK = Patience(first_delay=0.001)
QUERY = Query(np.ones((2, 3, N), np.float32), np.arange(2 * 5 * N, dtype=np.float32).reshape(2, 5, N))


class Handler(BaseHTTPRequestHandler):
    """Answers as the fake server, after what the connection does to it."""

    protocol_version = "HTTP/1.1"
    fake: FakeServer
    accidents: list

    def do_GET(self):
        self.handle_one()

    def do_POST(self):
        self.handle_one()

    def handle_one(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = httpx.Request(self.command, f"http://box{self.path}", headers=dict(self.headers), content=content)
        response = asyncio.run(self.fake.handle(request))
        accident = self.accidents.pop(0) if self.accidents and self.command == "POST" else None
        if accident == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        if accident == "slow":
            time.sleep(1.0)
        self.send_response(response.status_code)
        for name, value in response.headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.content)))
        if accident == "compressed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(response.content[:20] if accident == "truncated" else response.content)
        self.close_connection = accident == "truncated"

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    """A server on loopback, its fake inside, and the accidents to come."""
    fake, accidents = FakeServer(), []

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_):
            """The client hangs up where a test says so."""

    server = Quiet(("127.0.0.1", 0), type("Served", (Handler,), {"fake": fake, "accidents": accidents}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", fake, accidents
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("accident", [None, "reset", "slow", "truncated", "compressed"])
def test_accidents_of_a_connection_are_survived_and_paid_once(served, accident):
    url, fake, accidents = served
    accidents += [accident, accident]
    ledger = open_ledger(None, "run")
    patience = QUICK._replace(attempt_seconds=0.5) if accident == "slow" else QUICK
    with connect(url, "vectors", ledger, num_classes=N, terms=Terms("charged once", patience)) as box:
        scores, valid = box(QUERY)
        assert box.counts["attempts"] == (2 if accident is None else 4)
    np.testing.assert_array_equal(scores, QUERY.inputs[:, None] + QUERY.prompt[:, :, None])
    assert valid.all()
    assert fake.billed == 30
    assert ledger.balance() == Balance(answered=Cost(30))


def test_a_server_that_is_gone_costs_nothing(served):
    url, _, _ = served
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{other.getsockname()[1]}"  # taken, and nobody listens
        ledger = open_ledger(None, "run")
        with connect(url, "vectors", ledger, num_classes=N, terms=Terms(patience=QUICK)) as box:
            box._connection._client.base_url = f"http://{gone}"
            assert not box(QUERY).valid.any()
            assert box.counts["connection"] == 12
    assert ledger.balance() == Balance()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"error": {"message": "a\\nb", "type": "t", "code": null}}', ("t", "a b")),
        (b'{"error": {"code": "insufficient_quota", "type": "t"}}', ("insufficient_quota", "")),
        (b'{"error": "words"}', ("", "words")),
        (b'{"detail": "words"}', ("", "words")),
        (b'{"detail": [{"msg": "words"}]}', ("", "")),
        (b'{"error": {"message": 7}}', ("", "7")),
        (b"[1, 2]", ("", "")),
        (b"\xff", ("", "")),
        (b"[" * 60000, ("", "")),
    ],
)
def test_a_reason_is_read_from_any_error(body, found):
    assert explanation(body) == found


def test_a_reason_is_short():
    assert len(explanation(b'{"error": "' + b"a " * 9999 + b'"}')[1]) == 200
