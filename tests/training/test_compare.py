"""What a comparison holds fixed: every run spends what the method spends."""

import pytest

from fedbbpt_jax.training.compare import variants
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.resolve import requests_per_round, resolve

TEXTS = [
    {"task": "agnews", "optimizer": "cma-es"},
    {"task": "agnews", "estimator": "policy-gradient", "cohort": 3, "num_rounds": 4},
]


@pytest.mark.parametrize(
    "sizes", [{}, {"num_rounds": 8}, {"partition": "iid", "local_steps": 2, "budget": 10_000}, *TEXTS]
)
def test_all_runs_spend_the_requests_of_the_method(sizes):
    """Also where rounds, and not the budget, end the run: the centralised one has more rounds of fewer steps."""
    runs = {label: resolve(e) for label, e in variants(Experiment(**sizes)).items()}
    spent = {label: e.num_rounds * requests_per_round(e) for label, e in runs.items()}
    method = resolve(Experiment(**sizes))
    total = method.num_rounds * requests_per_round(method)
    quarter = spent.pop("federated, 1/4 budget")
    assert spent == dict.fromkeys(spent, total)
    assert total / 4 - requests_per_round(method) < quarter <= total / 4


def test_baselines_differ_in_one_thing_each():
    runs = {label: resolve(e) for label, e in variants(Experiment()).items()}
    assert runs["federated, iid"].partition == "iid"
    assert {runs[label].federation for label in ("local only", "local only, iid")} == {"isolated"}
    assert runs["centralised"].local_steps == 1
    published = runs["SPSA-GC as published"]
    assert (published.lr, published.perturbation_size) == (0.01, 0.01)
    assert runs["SPSA-GC tuned"].lr != published.lr


def test_baselines_of_texts():
    """A covariance has no mean: one party with the whole cohort's candidates; isolated clients share nothing."""
    runs = {label: resolve(e) for label, e in variants(Experiment("agnews", optimizer="fedbpt")).items()}
    central = runs["centralised"]
    assert (central.optimizer, central.num_clients, central.num_directions) == ("cma-es", 1, 5 * 5)
    assert (runs["local only"].optimizer, runs["local only"].federation) == ("cma-es", "isolated")
    assert not any("SPSA" in label for label in runs)
