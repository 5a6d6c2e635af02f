"""Runs of a served model, killed at random moments and resumed until they are done: nothing is lost, or paid twice.

    python experiments/killed_runs.py --kills 200

Each run is played undisturbed on one server, and killed (SIGKILL) again and again on a server of its own. Then its
metrics, summary and prompt must be those of the undisturbed run, bit for bit; and that server must have computed, by
its own count, what the run's ledger was charged for, each query once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import httpx2
import tyro
from bad_api import served

from fedbbpt_jax import cli
from fedbbpt_jax.black_box.ledger.ledger import replay_ledger

SIZES = "--num-clients 2 --num-directions 2 --local-steps 2 --num-rounds 60 --eval-every 4 --quiet"
CONTEXT = multiprocessing.get_context("forkserver")
SLOW_TO_IMPORT = ["fedbbpt_jax.cli", "sklearn.model_selection", "transformers.models.clip.image_processing_pil_clip"]
OWN = ("seconds", "attempts")  # what a run may say otherwise than its undisturbed twin


@dataclass(frozen=True)
class KilledRuns:
    """How long it goes on.

    Attributes:
      kills: in all.
      workers: runs at one time.
      seed: of the moments.
    """

    kills: int = 200
    workers: int = 2
    seed: int = 0


class Found(NamedTuple):
    """Of one run: how often it was killed, the requests of its ledger, and those that the server sent again."""

    kills: int
    num_requests: int
    repeated: int


def main(k: KilledRuns) -> None:
    """Prints a line for each run, and the sums at the end."""
    with served([]) as calm, tempfile.TemporaryDirectory() as folder:
        start_forkserver(Path(folder))
        numbers, found = iter(range(10**6)), []

        def work(worker: int) -> None:
            while sum(f.kills for f in found) < k.kills:
                number = next(numbers)
                rng = random.Random(f"{k.seed} {number}")
                with served([]) as shaken:
                    found.append(one_run(Path(folder) / str(number), number, calm, shaken, rng))

        with ThreadPoolExecutor(k.workers) as pool:
            list(pool.map(work, range(k.workers)))
    kills, num_requests, repeated = (sum(column) for column in zip(*found, strict=True))
    print(f"{kills} kills in {len(found)} runs: all ended as their undisturbed twins, bit for bit")
    print(f"{num_requests:,} requests charged, answered and computed once, {repeated:,} of them sent again")


def start_forkserver(folder: Path) -> None:
    """Starts what runs are forked from; they compile little, and once. Servers, which make the scores, go without."""
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    CONTEXT.set_forkserver_preload(SLOW_TO_IMPORT)
    forkserver.ensure_running()
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        del os.environ[name]


def one_run(folder: Path, seed: int, calm: str, shaken: str, rng: random.Random) -> Found:
    """Plays a run twice, kills the second one at random moments of its life, and compares them."""
    started = time.monotonic()
    twin = start(*SIZES.split(), "--seed", seed, "--url", calm, "--output-dir", folder / "calm")
    check(twin)
    life, kills = time.monotonic() - started, 0
    fresh = (*SIZES.split(), "--seed", seed, "--url", shaken, "--output-dir", folder / "shaken")
    process = start(*fresh)
    while is_alive_after(process, life / 3 * rng.random()):  # often: while it starts, asks, saves and removes
        process.kill()
        process.join()
        kills += 1
        if (folder / "shaken" / "config.json").exists():
            process = start("--resume", folder / "shaken", "--quiet")
        else:
            shutil.rmtree(folder / "shaken", ignore_errors=True)
            process = start(*fresh)
    check(process)
    differ = set(results(folder / "shaken").items()) ^ set(results(folder / "calm").items())
    assert not differ, (seed, kills, sorted(differ))
    budget = json.loads((folder / "shaken" / "config.json").read_text())["budget"]
    with replay_ledger(folder / "shaken" / "state" / f"seed-{seed}" / "run-0" / "journal") as ledger:
        assert ledger.balance("training").charged.num_requests <= budget
        balance = ledger.balance()
    computed = counter(shaken, "fedbbpt_requests_computed_total")
    assert balance.answered.num_requests == balance.charged.num_requests == computed
    repeated = counter(shaken, "fedbbpt_requests_answered_total") - computed
    print(f"run {seed}: {kills} kills, {computed:,} requests, {repeated} of them sent again", flush=True)
    return Found(kills, computed, repeated)


def start(*arguments: object) -> ForkServerProcess:
    """Returns a run in a process of its own, forked from one that has imported everything and computed nothing."""
    process = CONTEXT.Process(target=run, args=(["run", *map(str, arguments)],))
    process.start()
    return process


def run(arguments: list[str]) -> None:
    """Ends the process with the exit code of a command."""
    raise SystemExit(cli.main(arguments))


def is_alive_after(process: ForkServerProcess, seconds: float) -> bool:
    """Returns whether a process goes on for so long."""
    process.join(seconds)
    return process.is_alive()


def check(process: ForkServerProcess) -> None:
    """Waits for the end of a process, which must be a good one."""
    process.join()
    assert process.exitcode == 0


def results(folder: Path) -> dict[str, str]:
    """Returns all that a run has found, but for times and attempts, by its place."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows.append(json.loads((folder / "summary.json").read_text()))
    prompt = hashlib.sha256((folder / "prompt.safetensors").read_bytes()).hexdigest()
    found = {f"{n} {name}": repr(x) for n, row in enumerate(rows) for name, x in row.items() if not name.endswith(OWN)}
    return found | {"prompt": prompt}


def counter(address: str, name: str) -> int:
    """Returns a number that a server counts."""
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main(tyro.cli(KilledRuns))
