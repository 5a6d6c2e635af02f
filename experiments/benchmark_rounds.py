"""The ways to run a round, side by side: what vmapping, chunks, scans, cached features and devices are worth.

    python experiments/benchmark_rounds.py

Ten clients, 10 candidates, 4 local steps, 4 examples on the default task: 1,600 requests a round, 8 rounds. Every way
is timed five times in turn; the table gives the median, the least and the most, relative to the default's median, and
how many cores were busy. The last two lines are of a process of their own, whose one processor poses as eight devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fedbbpt_jax.black_box.frozen import frozen
from fedbbpt_jax.federated.cohort import pack
from fedbbpt_jax.federated.mesh import make_mesh, place_clients, replicate
from fedbbpt_jax.federated.participation import uniform_cohort
from fedbbpt_jax.federated.placement import compile_rounds, shard_rounds
from fedbbpt_jax.models.classifiers import ImageClassifier
from fedbbpt_jax.models.loading import load_clip, tokenize
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.prepare import Setup, prepare
from fedbbpt_jax.types import BlackBox, Query, Response

CLIENTS, ROUNDS = 10, np.arange(8, dtype=np.int32)
EXPERIMENT = Experiment(num_clients=CLIENTS, partition="iid", budget=10**6)
SIZES = {"local_steps": EXPERIMENT.local_steps, "batch_size": EXPERIMENT.batch_size}
DEVICES = 8
Way = Callable[[], object]


def main() -> None:
    setup = prepare(EXPERIMENT)
    method, everyone = setup.programs.method, uniform_cohort(CLIENTS)
    rounds_of = partial(compile_rounds, method, everyone, **SIZES)
    ways: dict[str, Way] = {
        "chunks of 16, all rounds in one scan (the default)": play(setup, rounds_of()),
        "a call for each round": one_by_one(setup, rounds_of()),
        "all candidates at once": play(setup, rounds_of(chunk_size=10**6)),
        "a loop of Python over the clients": client_by_client(setup),
        "the texts of the classes encoded in every query": play(
            setup._replace(rounds_box=forgetful(setup)), rounds_of()
        ),
    }
    print_ratios(times(ways))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    subprocess.run([sys.executable, __file__, "devices"], env={**os.environ, "XLA_FLAGS": flags}, check=True)


def over_devices() -> None:
    """Prints sharded rounds relative to those on one device."""
    setup = prepare(EXPERIMENT)
    method, everyone, mesh = setup.programs.method, uniform_cohort(CLIENTS), make_mesh(DEVICES)
    spread = setup._replace(
        rounds_box=replicate(setup.box, mesh),
        clients=place_clients(pack(setup.task.train, setup.parts, DEVICES), mesh),
        server=replicate(setup.server, mesh),
    )
    ways: dict[str, Way] = {
        "one of 8 devices": play(setup, compile_rounds(method, everyone, **SIZES)),
        "clients over 8 devices": play(spread, shard_rounds(method, everyone, mesh, **SIZES)),
    }
    print_ratios(times(ways))


def play(setup: Setup, run_rounds: Callable) -> Way:
    return lambda: run_rounds(setup.rounds_box, setup.server, setup.clients, setup.key, ROUNDS)


def one_by_one(setup: Setup, run_rounds: Callable) -> Way:
    def way() -> object:
        server = setup.server
        for index in ROUNDS.reshape(-1, 1):
            server, info = run_rounds(setup.rounds_box, server, setup.clients, setup.key, index)
            float(info.step.loss[0])  # as a loop does that looks at every round
        return server

    return way


def client_by_client(setup: Setup) -> Way:
    """Returns rounds whose clients are called one after the other, and averaged on the host."""
    run_rounds = compile_rounds(setup.programs.method, uniform_cohort(1), **SIZES)
    clients = [jax.tree.map(jnp.asarray, pack(setup.task.train, [part])) for part in setup.parts]

    def way() -> object:
        server = setup.server
        for index in ROUNDS.reshape(-1, 1):
            after = [run_rounds(setup.rounds_box, server, c, setup.key, jnp.asarray(index))[0] for c in clients]
            server = jax.tree.map(lambda *x: jnp.stack(x).mean(0).astype(x[0].dtype), *after)
        return server

    return way


def forgetful(setup: Setup) -> BlackBox:
    """Returns the default's box without its memory: it encodes the texts of the classes in every query."""
    clip = load_clip(MINI_CLIP)
    texts = [setup.task.templates[0].replace("{}", name) for name in setup.task.class_names]

    def answer(params: dict, ids: Array, attended: Array, query: Query) -> Response:
        model = nnx.merge(clip.graphdef, params)
        return frozen(ImageClassifier(model, model.encode_text(ids, attended), clip.pixels))(query)

    return jax.tree_util.Partial(answer, clip.params, *map(jnp.asarray, tokenize(clip.tokenizer, texts)))


def times(ways: dict[str, Way], repeats: int = 5) -> dict[str, np.ndarray]:
    """Returns the seconds of several turns of each way, by the clock and of all cores: `[turns, 2]`."""
    for way in ways.values():
        jax.block_until_ready(way())  # compiles
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(way())
            seconds[name].append((time.perf_counter() - started, time.process_time() - busy))
    return {name: np.array(of_way) for name, of_way in seconds.items()}


def print_ratios(seconds: dict[str, np.ndarray]) -> None:
    first = np.median(next(iter(seconds.values()))[:, 0])
    for name, turns in seconds.items():
        wall, cpu = turns.T
        spread = f"{np.median(wall) / first:.2f} x ({wall.min() / first:.2f} to {wall.max() / first:.2f})"
        print(f"{name:55} {spread}, {np.median(cpu / wall):.1f} cores", flush=True)


if __name__ == "__main__":
    over_devices() if sys.argv[1:] == ["devices"] else main()
