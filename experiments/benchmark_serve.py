"""Images per second of mini-clip in this process and behind `fedbbpt serve`, side by side on the same cores.

    python experiments/benchmark_serve.py --connections 32 --rounds 3

Each connection sends the minibatch of a client's step, K prompts on B images, and waits for the answer before it sends
the next. In this process the same queries are asked one after another, as a compiled program of all their rows.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import httpx2
import jax
import numpy as np
import tyro

from fedbbpt_jax.black_box.protocol import HEAD_LENGTH, decode, encode
from fedbbpt_jax.black_box.rows import in_rows
from fedbbpt_jax.commands.serve import Serve, row_like, served_experiment
from fedbbpt_jax.training.load import load_classifier, load_experiment_task
from fedbbpt_jax.types import Query

SERVE = "import sys; from fedbbpt_jax.cli import main; sys.exit(main(['serve', 'mini-clip', '--port', '0']))"


@dataclass(frozen=True)
class Benchmark:
    """What is measured.

    Attributes:
      connections: that ask at one time.
      num_prompts: K of a request.
      batch_size: B of a request.
      seconds: of each measurement.
      rounds: measurements of each kind, in turn.
    """

    connections: int = 32
    num_prompts: int = 10
    batch_size: int = 4
    seconds: float = 8.0
    rounds: int = 3


def in_process(ask, query: Query, seconds: float) -> float:
    """Returns images per second of queries asked one after another."""
    np.asarray(ask(query).scores)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        np.asarray(ask(query).scores)
        count += query.prompt.shape[1] * query.inputs.shape[1]
    return count / (time.perf_counter() - started)


async def served(address: str, query: Query, b: Benchmark) -> float:
    """Returns images per second of queries sent by all connections at once."""
    tensors = {"prompt": query.prompt[0], "inputs": query.inputs[0]}
    body, length = encode("inputs", tensors, {"parameters": {"binary_data_output": True}})
    count, end = 0, time.perf_counter() + b.seconds

    async def connection(client: httpx2.AsyncClient) -> None:
        nonlocal count
        while time.perf_counter() < end:
            response = await client.post(f"{address}/infer", content=body, headers={HEAD_LENGTH: str(length)})
            response.raise_for_status()
            decode("outputs", response.content, int(response.headers[HEAD_LENGTH]))
            count += b.num_prompts * b.batch_size

    started = time.perf_counter()
    limits = httpx2.Limits(max_connections=b.connections, max_keepalive_connections=b.connections)
    async with httpx2.AsyncClient(limits=limits, timeout=60) as client:
        await asyncio.gather(*(connection(client) for _ in range(b.connections)))
    return count / (time.perf_counter() - started)


def main(b: Benchmark) -> None:
    """Prints a line of JSON for each round, and the ratio of the medians."""
    e = served_experiment(Serve(task="sensor"))
    task = load_experiment_task(e)
    box, like, rng = load_classifier(e, task), row_like(e, task), np.random.default_rng(0)
    prompt = rng.normal(0, 0.05, (1, b.num_prompts, *like.prompt.shape[2:])).astype(np.float32)
    query = Query(prompt, np.asarray(task.train.inputs)[None, : b.batch_size])
    whole = jax.jit(lambda box, query: box(query))
    rows = in_rows(box, like, b.num_prompts * b.batch_size)
    with subprocess.Popen([sys.executable, "-c", SERVE], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = server.stderr.readline().split()[1].rstrip(",")
            found: list[tuple[float, float, float]] = []
            for _ in range(b.rounds):
                local = in_process(lambda q: whole(box, q), query, b.seconds), in_process(rows, query, b.seconds)
                found.append((*local, asyncio.run(served(address, query, b))))
                names = ("in_process", "in_process_rows", "served")
                print(json.dumps(dict(zip(names, map(round, found[-1]), strict=True))), flush=True)
        finally:
            server.terminate()
    whole_rate, rows_rate, served_rate = np.median(found, axis=0)
    print(json.dumps({"ratio": served_rate / whole_rate, "ratio_to_rows": served_rate / rows_rate}))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
