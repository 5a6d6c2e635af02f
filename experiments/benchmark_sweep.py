"""What a sweep saves: 16 small runs in one program, in turn, and as commands of their own.

    python experiments/benchmark_sweep.py

Four seeds and four step sizes, two rounds each; seconds of the whole command, relative to the sweep.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

SEEDS, LRS = ("0", "1", "2", "3"), ("0.003", "0.01", "0.03", "0.1")
SMALL = ("--num-rounds", "2", "--quiet")
FEDBBPT = (sys.executable, "-c", "import sys; from fedbbpt_jax.cli import main; sys.exit(main())", "run", *SMALL)


def main() -> None:
    everything = ("--seeds", ",".join(SEEDS), "--lr", ",".join(LRS))
    sweep = seconds([everything])
    per_step_size = seconds([("--seeds", ",".join(SEEDS), "--lr", lr) for lr in LRS])
    alone = seconds([("--seed", seed, "--lr", lr) for seed in SEEDS for lr in LRS])
    print(f"one command, 16 runs in one program {1:5.1f} x")
    print(f"4 commands of 4 runs in turn        {per_step_size / sweep:5.1f} x")
    print(f"16 commands of one run              {alone / sweep:5.1f} x")


def seconds(commands: Sequence[Sequence[str]]) -> float:
    """Returns how long the commands take one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for i, options in enumerate(commands):
            subprocess.run([*FEDBBPT, *options, "--output-dir", f"{folder}/{i}"], check=True)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
