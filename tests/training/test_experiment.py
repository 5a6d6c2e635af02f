from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.data.partition import dirichlet, iid
from fedbbpt_jax.estimators.catalogue import ESTIMATORS
from fedbbpt_jax.training.experiment import (
    GENERATORS,
    Experiment,
    build_generator,
    build_method,
    estimator_descriptions,
    requests_per_round,
    resolve,
    split_among_clients,
)

SIZES = {"num_clients": 5, "num_directions": 5, "local_steps": 4, "batch_size": 8}  # 1,600 requests per round
NAN, INF = float("nan"), float("inf")
IMAGE_SIZE, FEATURE_SIZE = 32, 48


def test_sizes_left_out_are_resolved():
    """64,000 requests pay for 40 rounds of 5 clients, 10 candidates, 4 steps and 8 examples."""
    e = resolve(Experiment(**SIZES, budget=64_000))
    assert (e.cohort, e.num_rounds, e.perturbation_size, e.lr) == (5, 40, 0.05, 0.03)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"optimizer": "sgd"}, (0.05, 0.02)),
        ({"estimator": "spsa-one-sided"}, (0.05, 0.03)),
        ({"estimator": "spsa-segmented"}, (0.05, 0.03)),
        ({"estimator": "spsa-gc"}, (0.01, 0.01)),
        ({"estimator": "spsa-gc", "optimizer": "sgd"}, (0.01, 0.01)),
    ],
    ids=lambda x: "-".join(x.values()) if isinstance(x, dict) else "",
)
def test_sizes_follow_the_estimator_and_the_optimizer(choices, expected):
    e = resolve(Experiment(**choices))
    assert (e.perturbation_size, e.lr) == expected


def test_what_was_asked_for_is_kept():
    asked = Experiment(task="loc", cohort=2, num_clients=3, num_rounds=4, perturbation_size=0.2, lr=0.5, seed=6)
    assert asdict(resolve(asked)) == asdict(asked)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, "sensor"),
        ({"data": "photos/flowers/"}, "flowers"),
        ({"data": "someone/flowers"}, "flowers"),
        ({"task": "eurosat", "data": "copy"}, "eurosat"),
    ],
)
def test_a_task_left_out_is_the_default_or_named_after_its_data(choices, expected):
    assert resolve(Experiment(**choices)).task == expected


def test_resolving_twice_changes_nothing():
    once = resolve(Experiment(cohort=2))
    assert resolve(once) == once


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("spsa", 480), ("spsa-segmented", 480), ("spsa-gc", 480), ("spsa-one-sided", 288)],
)
def test_requests_per_round_by_hand(estimator, expected):
    """2 of 3 clients · (2·5 or 5 + 1) candidates · 4 steps · 6 examples."""
    e = Experiment(num_clients=3, cohort=2, num_directions=5, local_steps=4, batch_size=6, estimator=estimator)
    assert requests_per_round(resolve(e)) == expected


def test_an_experiment_can_name_every_estimator_of_the_catalogue_and_the_published_method():
    assert set(estimator_descriptions()) == {*ESTIMATORS, "spsa-gc"}


@pytest.mark.parametrize("estimator", estimator_descriptions())
def test_requests_per_round_agree_with_the_optimizer(estimator):
    e = resolve(Experiment(estimator=estimator, num_directions=3))
    candidates = build_method(e, IMAGE_SIZE, FEATURE_SIZE).optimizer.num_candidates
    assert requests_per_round(e) == e.cohort * candidates * e.local_steps * e.batch_size


sizes = st.integers(1, 12)


@given(
    st.fixed_dictionaries(
        {
            "num_clients": sizes,
            "num_directions": sizes,
            "local_steps": sizes,
            "batch_size": sizes,
            "budget": st.integers(1, 10**6),
            "num_rounds": st.none() | st.integers(1, 1000),
            "estimator": st.sampled_from(sorted(estimator_descriptions())),
        }
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_budget_is_never_exceeded_and_is_used(sizes):
    """As many rounds as asked for, or one more would be too many."""
    asked = Experiment(**sizes)
    if asked.budget < requests_per_round(asked):
        with pytest.raises(ValueError, match="--budget must pay for one round"):
            resolve(asked)
        return
    e = resolve(asked)
    assert 1 <= e.num_rounds * requests_per_round(e) <= e.budget
    assert e.num_rounds == asked.num_rounds or (e.num_rounds + 1) * requests_per_round(e) > e.budget


BAD_VALUES = [
    *[
        (name, value, "at least 1")
        for name in ("shots", "num_clients", "local_steps", "batch_size", "num_directions", "eval_every", "chunk_size")
        for value in (0, -3)
    ],
    *[(name, value, "positive") for name in ("cohort", "num_rounds") for value in (0, -3)],
    *[(name, value, "positive") for name in ("perturbation_size", "lr") for value in (0.0, -0.5, NAN, INF)],
    ("seed", -1, "between 0 and"),
    ("seed", 2**32, "between 0 and"),
    ("cohort", 6, "at most --num-clients 5"),
    ("budget", 1599, "one round of 1600 requests"),
    ("budget", 0, "one round of 1600 requests"),
    ("budget", -1, "one round of 1600 requests"),
    *[
        ("partition", value, "iid or dirichlet:ALPHA with ALPHA > 0")
        for value in (
            *("", "IID", "iid:1", "dirichlet", "dirichlet:", "dirichlet:x", "shards:2"),
            *("dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf"),
        )
    ],
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES, ids=[f"{n}={v}" for n, v, _ in BAD_VALUES])
def test_bad_values_are_named_with_what_was_received_and_expected(name, value, expected):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must .*{expected}") as error:
        resolve(Experiment(**SIZES | {name: value}))
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("generator", GENERATORS)
def test_generators_make_prompts_of_the_size_of_the_images(generator):
    init, generate = build_generator(Experiment(generator=generator), IMAGE_SIZE, FEATURE_SIZE)
    features = np.zeros((10, FEATURE_SIZE), np.float32)
    prompt = jax.eval_shape(lambda key: generate(init(key), features), jax.random.key(0))
    assert prompt.shape == ((10, 32, 32, 3) if generator == "coordinator" else (32, 32, 3))


@pytest.mark.parametrize(
    ("partition", "expected"),
    [("iid", lambda labels: iid(labels, 4, 7)), ("dirichlet:0.3", lambda labels: dirichlet(labels, 4, 0.3, 7))],
    ids=["iid", "dirichlet"],
)
def test_partition_is_read(partition, expected):
    labels = np.repeat(np.arange(10), 16)
    parts = split_among_clients(Experiment(partition=partition, num_clients=4, seed=7), labels)
    assert all(np.array_equal(a, b) for a, b in zip(parts, expected(labels), strict=True))


@pytest.mark.parametrize("federation", ["fedavg", "isolated"])
def test_federation_is_read(federation):
    """Clients that stay apart end in a model each and send nothing; FedAvg ends in one."""
    e = resolve(replace(Experiment(num_clients=3), federation=federation))
    method = build_method(e, IMAGE_SIZE, FEATURE_SIZE)
    client = method.optimizer.init(method.generator.init(jax.random.key(0)))
    models = method.federation.outcomes(method.federation.init(client))
    num_models = {len(leaf) for leaf in jax.tree.leaves(models)}
    assert num_models == {1 if federation == "fedavg" else 3}
    assert (method.federation.payload_bytes(client) == (0, 0)) == (federation == "isolated")
