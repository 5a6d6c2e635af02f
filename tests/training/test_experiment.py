from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.data.images import grid_means
from fedbbpt_jax.data.partition import dirichlet, iid
from fedbbpt_jax.estimators.catalogue import ESTIMATORS
from fedbbpt_jax.training.build import PromptSizes, build_generator, build_method
from fedbbpt_jax.training.experiment import GENERATORS, POLICIES, Experiment, estimator_descriptions
from fedbbpt_jax.training.load import split_among_clients
from fedbbpt_jax.training.resolve import requests_per_round, resolve
from fedbbpt_jax.types import Examples, Task

SIZES = {"num_clients": 5, "num_directions": 5, "local_steps": 4, "batch_size": 8}  # 1,600 requests per round
NAN, INF = float("nan"), float("inf")
FEATURE_SIZE = 48
SIZES_OF_PROMPTS = PromptSizes(image_size=32, feature_size=FEATURE_SIZE, vocabulary=(7, 8, 9))


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
    sizes = {"shots": 4, "cohort": 2, "num_clients": 3, "num_rounds": 4, "perturbation_size": 0.2, "lr": 0.5}
    asked = Experiment(task="loc", server_lr=0.1, placement="host", seed=6, **sizes)
    found = asdict(resolve(asked))
    left_out = {name for name, value in asdict(asked).items() if value is None and found[name] is not None}
    assert left_out == {"model", "generator", "client_state", "num_directions"}
    assert found == asdict(asked) | {name: found[name] for name in left_out}


def test_digits_have_four_shots_for_each_of_many_clients():
    assert resolve(Experiment()).shots == 16
    assert resolve(Experiment(num_clients=10_000, cohort=64)).shots == 4000
    assert resolve(Experiment(task="eurosat", num_clients=10_000, cohort=64)).shots == 16


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
    assert set(estimator_descriptions()) == {*ESTIMATORS, "spsa-gc", *POLICIES}


@pytest.mark.parametrize("estimator", estimator_descriptions())
def test_requests_per_round_agree_with_the_optimizer(estimator):
    e = resolve(Experiment(estimator=estimator, num_directions=3))
    candidates = build_method(e, SIZES_OF_PROMPTS).optimizer.num_candidates
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
    ("partition", "column:", "column:NAME"),
    *[
        (name, value, "at least 1")
        for name in ("num_clients", "local_steps", "batch_size", "num_directions", "eval_every")
        for value in (0, -3)
    ],
    *[(name, value, "positive") for name in ("shots", "cohort", "num_rounds") for value in (0, -3)],
    *[(name, value, "positive") for name in ("perturbation_size", "lr") for value in (0.0, -0.5, NAN, INF)],
    ("chunk_size", -1, "at least 1, or 0"),
    ("seed", -1, "between 0 and"),
    ("seed", 2**32, "between 0 and"),
    ("cohort", 6, "at most --num-clients 5"),
    ("budget", 1599, "one round of 1600 requests"),
    ("budget", 0, "one round of 1600 requests"),
    ("budget", -1, "one round of 1600 requests"),
    *[
        ("partition", f"dirichlet{value}", "dirichlet:ALPHA with ALPHA > 0")
        for value in ("", ":", ":x", ":0", ":-1", ":nan", ":inf")
    ],
    *[("partition", value, "iid, dirichlet:ALPHA, .* or column:NAME") for value in ("", "IID", "iid:1", "shards:2")],
    *[("dropout", value, "in .0, 1.") for value in (-0.1, 1.0, NAN)],
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES, ids=[f"{n}={v}" for n, v, _ in BAD_VALUES])
def test_bad_values_are_named_with_what_was_received_and_expected(name, value, expected):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must .*{expected}") as error:
        resolve(Experiment(**SIZES | {name: value}))
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("generator", GENERATORS)
def test_generators_make_prompts_of_the_size_of_the_images(generator):
    estimator = "policy-gradient" if generator == "tokens" else "spsa"
    sizes = SIZES_OF_PROMPTS._replace(num_layers=3)
    init, generate = build_generator(resolve(Experiment(generator=generator, estimator=estimator)), sizes)
    features = np.zeros((10, FEATURE_SIZE), np.float32)
    prompt = jax.eval_shape(lambda key: generate(init(key), features), jax.random.key(0))
    others = {"soft": (50,), "deep": (3, 50), "tokens": (5,), "coordinator": (10, 32, 32, 3)}
    assert prompt.shape == others.get(generator, (32, 32, 3))


def holding(train, clients=None):
    return Task("t", (), (), train, train, train, train_clients=clients)


def test_a_column_says_whose_an_example_is():
    labels = np.zeros(4, np.int32)
    task = holding(Examples(labels, labels, labels), np.array(["b", "a", "b", "c"]))
    _, parts = split_among_clients(resolve(Experiment(partition="column:ward", num_clients=3)), task)
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3]]
    with pytest.raises(ValueError, match="names 3 clients among the 4 training examples: pass --num-clients 3, got 5"):
        split_among_clients(resolve(Experiment(partition="column:ward")), task)


@pytest.mark.parametrize(
    ("partition", "expected"),
    [("iid", lambda labels: iid(labels, 4, 7)), ("dirichlet:0.3", lambda labels: dirichlet(labels, 4, 0.3, 7))],
    ids=["iid", "dirichlet"],
)
def test_partition_is_read(partition, expected):
    labels = np.repeat(np.arange(10), 16)
    train = Examples(labels, labels, labels)
    seen, parts = split_among_clients(resolve(Experiment(partition=partition, num_clients=4, seed=7)), holding(train))
    assert seen is train
    assert all(np.array_equal(a, b) for a, b in zip(parts, expected(labels), strict=True))


def test_a_feature_shift_changes_pictures_and_what_is_seen_of_them():
    pictures = np.random.default_rng(0).random((40, 32, 32, 3)).astype(np.float32)
    train = Examples(pictures, grid_means(pictures), np.repeat(np.arange(10), 4).astype(np.int32))
    e = resolve(Experiment(partition="feature-shift", num_clients=4))
    seen, parts = split_among_clients(e, holding(train))
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(iid(train.labels, 4, 0)))
    assert (seen.inputs != pictures).any((1, 2, 3)).all()
    np.testing.assert_array_equal(seen.features, grid_means(seen.inputs))


@pytest.mark.parametrize(
    ("choices", "num_models", "num_bytes"),
    [
        ({}, 1, 3 * 192 * 4),
        ({"client_state": "reset"}, 1, 192 * 4),
        ({"client_state": "kept"}, 1, 192 * 4),
        ({"server_optimizer": "fedadam"}, 1, 3 * 192 * 4),
        ({"federation": "personal"}, 3, 3 * 192 * 4),
        ({"federation": "personal", "server_optimizer": "fedyogi"}, 3, 3 * 192 * 4),
        ({"federation": "isolated"}, 3, 0),
    ],
    ids=str,
)
def test_federation_is_read(choices, num_models, num_bytes):
    """How many models it ends in, and what a client sends: parameters with Adam's two moments, or without."""
    e = resolve(replace(Experiment(num_clients=3), **choices))
    method = build_method(e, SIZES_OF_PROMPTS)
    client = method.optimizer.init(method.generator.init(jax.random.key(0)))
    models = method.federation.outcomes(method.federation.init(client))
    assert {len(leaf) for leaf in jax.tree.leaves(models)} == {num_models}
    assert method.federation.payload_bytes(client) == (num_bytes, num_bytes)
