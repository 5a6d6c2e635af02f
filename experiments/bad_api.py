"""The main job by a good server and by a bad one: a fifth of all queries fails, and a tenth of the clients stays away.

    python experiments/bad_api.py

Both runs of a seed have 64,000 answered queries, the bad one on average: its rounds are more, since fewer come.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.run import run

SEEDS = range(5)
BUDGET, DROPOUT = 64_000, 0.1
FAULTS = {"rate-limited": 0.1, "server-error": 0.05, "timeout": 0.03, "malformed": 0.02, "hang-seconds": 0.5}
SERVE = "import sys; from fedbbpt_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    with served([]) as good, served([f"--fault.{name}={value}" for name, value in FAULTS.items()]) as bad:
        pairs = [both(seed, good, bad) for seed in SEEDS]
    differences = 100 * np.array([faulty - clean for clean, faulty in pairs])
    mean, error = differences.mean(), differences.std(ddof=1) / len(SEEDS) ** 0.5
    # 2.776 is the 97.5 % quantile of Student's t with 4 degrees of freedom.
    print(f"bad minus good: {mean:.2f} points, 95 % interval {mean - 2.776 * error:.2f} to {mean + 2.776 * error:.2f}")


def both(seed: int, good: str, bad: str) -> tuple[float, float]:
    """Returns test accuracies by a good and a bad server."""
    clean = run(Experiment(seed=seed, url=good, budget=BUDGET))
    with tempfile.TemporaryDirectory() as folder:
        e = Experiment(seed=seed, url=bad, budget=round(BUDGET / (1 - DROPOUT)), dropout=DROPOUT)
        faulty = run(e, folder=Path(folder))
    counts, s = faulty.summary["attempts"], faulty.summary
    needed = counts["attempts"] - sum(n for kind, n in counts.items() if kind != "attempts")
    print(
        f"seed {seed}: good {100 * clean.summary['test_accuracy']:.1f} % of {clean.summary['num_valid']:,} answers, "
        f"bad {100 * s['test_accuracy']:.1f} % of {s['num_valid']:,}, {s['num_requests'] - s['num_valid']} given up, "
        f"{counts['attempts'] / needed:.3f} attempts for each message needed; {counts}",
        flush=True,
    )
    return clean.summary["test_accuracy"], faulty.summary["test_accuracy"]


@contextmanager
def served(faults: list[str]) -> Iterator[str]:
    """Gives the address of a server in another process."""
    command = [sys.executable, "-c", SERVE, "serve", "mini-clip", "--task", "sensor", "--port", "0", *faults]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()  # "serving http://HOST:PORT/v2/models/mini-clip, fingerprint ..."
        yield line.split()[1].partition("/v2/")[0]
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
