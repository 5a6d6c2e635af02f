"""Four harder questions on the embedded digits: the share of the white-box gain that is recovered, over seeds 0-2.

    python experiments/stretch.py

Settings were chosen on validation data of seeds 100-102 (`experiments/tune.py loc coordinator quarter`). The ceiling is
the white-box prompt of the low-resolution generator on the same task and shots, also for the coordinator.
"""

from __future__ import annotations

from dataclasses import replace

from fedbbpt_jax.data import shifts
from fedbbpt_jax.data.digit_tasks import DIGIT_TASKS, DigitTask
from fedbbpt_jax.training.compare import recovered_share, run_white_box
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.report import format_mean
from fedbbpt_jax.training.run import run

SEEDS = (0, 1, 2)
HARDER_SENSOR = DigitTask(
    "sensor at 0.75", lambda x, own, part, rng, test: shifts.mix(x, shifts.sensor_pattern(), 0.75)
)
QUESTIONS = {
    "sensor, iid, 16,000 requests": Experiment(partition="iid", budget=16_000),
    "sensor at strength 0.75": Experiment(task="sensor-0.75"),
    "loc, iid, 200,000 requests": Experiment(
        task="loc", partition="iid", budget=200_000, perturbation_size=0.1, lr=0.1
    ),
    "coordinator": Experiment(generator="coordinator"),
}


def main() -> None:
    DIGIT_TASKS["sensor-0.75"] = HARDER_SENSOR
    for question, experiment in QUESTIONS.items():
        outcomes = [run(replace(experiment, seed=seed)) for seed in SEEDS]
        ceilings = [run_white_box(replace(experiment, generator="low-resolution", seed=seed)) for seed in SEEDS]
        shares = [
            share for o, c in zip(outcomes, ceilings, strict=True) if (share := recovered_share(o, c)) is not None
        ]
        print(
            f"{question}: zero-shot {format_mean([o.summary['zero_shot_accuracy'] for o in outcomes])}, "
            f"test {format_mean([o.summary['test_accuracy'] for o in outcomes])}, "
            f"white-box {format_mean([c.test_accuracy for c in ceilings])}, recovered {format_mean(shares)} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
