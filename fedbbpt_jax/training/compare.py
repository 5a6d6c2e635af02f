"""The method beside its baselines, at equal requests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.training.build import PromptSizes, build_generator
from fedbbpt_jax.training.evaluate import compile_evaluation
from fedbbpt_jax.training.experiment import Experiment, ResolvedExperiment
from fedbbpt_jax.training.load import (
    client_end,
    load_classifier,
    load_experiment_task,
    prompt_sizes,
    split_among_clients,
)
from fedbbpt_jax.training.prepare import on_device
from fedbbpt_jax.training.progress import Row
from fedbbpt_jax.training.resolve import is_of_texts, requests_per_round, resolve, without_data
from fedbbpt_jax.training.run import Outcome, run
from fedbbpt_jax.training.white_box import compile_federated_white_box, compile_white_box
from fedbbpt_jax.types import PromptGenerator, Task

# Chosen on validation data of seeds 100-102 by experiments/tune.py. 400 steps at 0.03 are 0.4 ± 1.1 points better as a
# white box and take nearly three times as long.
CENTRALISED_LR = 0.02
LOCAL_LR = 0.01
SPSA_GC_TUNED = {"lr": 0.002, "perturbation_size": 0.05}
WHITE_BOX_STEPS, WHITE_BOX_LR = 150, 0.1


Runs = dict[str, Experiment]


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


def recovered_share(outcome: Outcome, white_box: WhiteBox) -> float | None:
    """Returns the part of the white-box gain in test accuracy over zero-shot that a run reached; None if none is."""
    zero_shot = outcome.summary["zero_shot_accuracy"]
    gain = white_box.test_accuracy - zero_shot
    return (outcome.summary["test_accuracy"] - zero_shot) / gain if gain else None


def variants(base: Experiment) -> Runs:
    """Returns the black-box runs of a comparison by label; all but the quarter budget spend the same requests.

    Where no partition is named it is that of `base`, or dirichlet:0.3 where that is iid.
    """
    e = resolve(base)
    base = replace(base, budget=e.num_rounds * requests_per_round(e), num_rounds=None)  # what the method spends
    skewed = e.partition if e.partition != "iid" else "dirichlet:0.3"
    federated = replace(base, federation="fedavg", partition=skewed)
    centralised, isolated, others = (_text_baselines if is_of_texts(e) else _image_baselines)(e, federated)
    return {
        "federated": federated,
        "federated, iid": replace(federated, partition="iid"),
        "federated, 1/4 budget": replace(federated, budget=base.budget // 4),
        "centralised": centralised,
        "local only": isolated,
        "local only, iid": replace(isolated, partition="iid"),
        **others,
    }


def _image_baselines(e: ResolvedExperiment, federated: Experiment) -> tuple[Experiment, Experiment, Runs]:
    """Returns the centralised run, the isolated clients, and others.

    The centralised run averages after every step over an even split of all data: the same directions and examples per
    step as the federation, as if one party held everything.
    """
    every_step = {"local_steps": 1, "eval_every": e.eval_every * e.local_steps}
    published = {"estimator": "spsa-gc", "lr": None, "perturbation_size": None}
    return (
        replace(federated, partition="iid", lr=CENTRALISED_LR, **every_step),
        replace(federated, federation="isolated", lr=LOCAL_LR),
        {
            "SPSA-GC as published": replace(federated, **published),
            "SPSA-GC tuned": replace(federated, **published | SPSA_GC_TUNED),
        },
    )


def _text_baselines(e: ResolvedExperiment, federated: Experiment) -> tuple[Experiment, Experiment, Runs]:
    """Returns the centralised run, the isolated clients, and others.

    The centralised run is one party that holds everything and asks for as many candidates as the cohort. A covariance
    has no mean, so that averaging after every step would be something else. Isolated clients share no distributions.
    """
    if e.optimizer == "fedbpt":
        federated = replace(federated, optimizer="cma-es")
    together = {"num_clients": 1, "cohort": None, "num_directions": e.cohort * e.num_directions, "partition": "iid"}
    return replace(federated, **together), replace(federated, federation="isolated"), {}


def run_seeds(
    experiments: Mapping[int, Mapping[str, Experiment]],
    on_row: Callable[[str, Row], None],
    folder: Path | None = None,
    *,
    white_box: bool,
) -> tuple[list[SeedResult], bool]:
    """Returns the result of each seed, and whether an interrupt ended them: what was reached until then is kept.

    Args:
      experiments: by seed and label; the first label is the method itself.
      on_row: called with a label and each row of its metrics.
      folder: in which each run has one of its own (`run`).
      white_box: whether to find the ceiling of each seed too.

    Raises:
      KeyboardInterrupt: an interrupt came before anything was reached.
    """
    results: list[SeedResult] = []
    outcomes: dict[str, Outcome] = {}
    try:
        for seed, variants_of_seed in experiments.items():
            outcomes = {}
            for number, (label, experiment) in enumerate(variants_of_seed.items()):
                own = None if folder is None else folder / f"seed-{seed}" / f"run-{number}"
                outcomes[label] = run(experiment, functools.partial(on_row, label), own)
                if outcomes[label].summary["stopped_by"] == "interrupted":
                    raise KeyboardInterrupt
            ceiling = run_white_box(next(iter(variants_of_seed.values()))) if white_box else None
            results.append(SeedResult(outcomes, ceiling))
            outcomes = {}
    except KeyboardInterrupt:
        if outcomes:
            results.append(SeedResult(outcomes, None))
        if not results:
            raise
        return results, True
    return results, False


def run_white_box(experiment: Experiment) -> WhiteBox:
    """Returns the white-box ceiling of an experiment's task, generator and shots: of words, that of a soft prompt."""
    return _white_box(experiment, lambda programs, e, task: programs.tune)


def run_federated_white_box(experiment: Experiment) -> WhiteBox:
    """Returns what FedAvg of white-box prompts comes to, with the experiment's clients and local steps (FedPrompt)."""

    def tune(programs: Programs, e: ResolvedExperiment, task: Task):
        _, parts = split_among_clients(e, task)
        held = np.stack([np.isin(np.arange(len(task.train.labels)), part) for part in parts])
        return lambda classifier, params, examples: programs.tune_federated(classifier, params, examples, held)

    return _white_box(experiment, tune)


class Programs(NamedTuple):
    """White-box tuning and its evaluation, the same for every seed."""

    generator: PromptGenerator
    tune: Callable
    tune_federated: Callable
    evaluate: Callable


def _white_box(experiment: Experiment, choose: Callable) -> WhiteBox:
    if resolve(experiment).generator == "tokens":
        experiment = replace(experiment, generator="soft", estimator="spsa")
    e = resolve(experiment)
    task = load_experiment_task(e)
    classifier = client_end(e, load_classifier(e, task))
    programs = _programs(without_data(e), prompt_sizes(e, task))
    start = programs.generator.init(jax.random.key(e.seed))
    params = choose(programs, e, task)(classifier, start, on_device(task.train))
    model = jax.tree.map(lambda x: x[None], params)
    parts = on_device(task.validation), on_device(task.test)
    return WhiteBox(*(float(programs.evaluate(classifier, model, part).accuracy) for part in parts))


@functools.lru_cache(maxsize=4)
def _programs(e: ResolvedExperiment, sizes: PromptSizes) -> Programs:
    generator = build_generator(e, sizes)
    tune = compile_white_box(generator, cross_entropy, num_steps=WHITE_BOX_STEPS, learning_rate=WHITE_BOX_LR)
    rounds = {"num_rounds": -(-WHITE_BOX_STEPS // e.local_steps), "local_steps": e.local_steps}
    federated = compile_federated_white_box(generator, cross_entropy, **rounds, learning_rate=WHITE_BOX_LR)
    return Programs(generator, tune, federated, compile_evaluation(generator, cross_entropy))
