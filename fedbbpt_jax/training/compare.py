"""The method beside its baselines, at equal requests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax

from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.training.evaluate import compile_evaluation
from fedbbpt_jax.training.experiment import Experiment, build_generator, resolve
from fedbbpt_jax.training.prepare import load_classifier, on_device
from fedbbpt_jax.training.run import Outcome, Row, run
from fedbbpt_jax.training.white_box import compile_white_box

# Chosen on validation data of seeds 100-102: experiments/tune_baselines.py.
CENTRALISED_LR = 0.03
SPSA_GC_TUNED_LR = 0.01
WHITE_BOX_STEPS, WHITE_BOX_LR = 150, 0.1


class WhiteBox(NamedTuple):
    """Accuracies of a prompt tuned by autodiff through the frozen model, with the same generator on the same shots."""

    validation_accuracy: float
    test_accuracy: float


class SeedResult(NamedTuple):
    """All that was run for one seed.

    Attributes:
      outcomes: label to outcome; the first is the method itself.
      white_box: the ceiling, None where it was not asked for.
    """

    outcomes: dict[str, Outcome]
    white_box: WhiteBox | None

    @property
    def interrupted(self) -> bool:
        """Whether the last run was ended by hand."""
        return any(outcome.summary["stopped_by"] == "interrupted" for outcome in self.outcomes.values())


def recovered_share(outcome: Outcome, white_box: WhiteBox) -> float:
    """Returns the part of the white-box gain in test accuracy over zero-shot that a run reached; 1 is all of it."""
    zero_shot = outcome.summary["zero_shot_accuracy"]
    return (outcome.summary["test_accuracy"] - zero_shot) / (white_box.test_accuracy - zero_shot)


def variants(base: Experiment) -> dict[str, Experiment]:
    """Returns the black-box runs of a comparison by label; all but the quarter budget spend the same requests.

    The centralised run averages after every step over an even split of all data: the same directions and examples per
    step as the federation, as if one party held everything.
    """
    e = resolve(base)
    skewed = e.partition if e.partition != "iid" else "dirichlet:0.3"
    federated = replace(base, federation="fedavg", partition=skewed)
    isolated = replace(base, federation="isolated", partition=skewed)
    every_step = {"local_steps": 1, "eval_every": e.eval_every * e.local_steps, "num_rounds": None}
    published = {"estimator": "spsa-gc", "lr": None, "perturbation_size": None}
    return {
        f"federated, {skewed}": federated,
        "federated, iid": replace(federated, partition="iid"),
        f"federated, {skewed}, 1/4 budget": replace(federated, budget=e.budget // 4),
        "centralised": replace(federated, partition="iid", lr=CENTRALISED_LR, **every_step),
        f"local only, {skewed}": isolated,
        "local only, iid": replace(isolated, partition="iid"),
        f"SPSA-GC as published, {skewed}": replace(federated, **published),
        f"SPSA-GC tuned step, {skewed}": replace(federated, **published | {"lr": SPSA_GC_TUNED_LR}),
    }


def run_variants(experiments: Mapping[str, Experiment], on_row: Callable[[str, Row], None]) -> dict[str, Outcome]:
    """Returns label to outcome, up to and with the one that was interrupted, if any.

    Args:
      experiments: by label.
      on_row: called with a label and each row of its metrics.
    """
    outcomes = {}
    for label, experiment in experiments.items():
        outcomes[label] = run(experiment, functools.partial(on_row, label))
        if outcomes[label].summary["stopped_by"] == "interrupted":
            break
    return outcomes


def run_white_box(experiment: Experiment) -> WhiteBox:
    """Returns the white-box ceiling of an experiment's task, generator and shots."""
    e = resolve(experiment)
    task = load_task(e.task, shots=e.shots, seed=e.seed)
    classifier = load_classifier(e, task)
    generator, tune, evaluate = _programs(replace(e, seed=0), task.image_size, task.feature_size)
    params = tune(classifier, generator.init(jax.random.key(e.seed)), on_device(task.train))
    model = jax.tree.map(lambda x: x[None], params)
    return WhiteBox(*(float(evaluate(classifier, model, on_device(p)).accuracy) for p in (task.validation, task.test)))


@functools.lru_cache(maxsize=4)
def _programs(e: Experiment, image_size: int, feature_size: int):
    """Returns the generator, its white-box tuning and its evaluation, the same for every seed."""
    generator = build_generator(e, image_size, feature_size)
    tune = compile_white_box(generator, cross_entropy, num_steps=WHITE_BOX_STEPS, learning_rate=WHITE_BOX_LR)
    return generator, tune, compile_evaluation(generator, cross_entropy)
