"""Who takes part: chances, weights, drop-out and traces, and what they have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.federated.participation import (
    read_availability,
    uniform_cohort,
    weighted_cohort,
    with_availability,
    with_dropout,
    with_equal_weights,
)

SIZES = jnp.array([1, 2, 3, 4, 10])
KINDS = {
    "uniform": uniform_cohort(3),
    "everyone": uniform_cohort(5),
    "weighted": weighted_cohort(3),
    "equal": with_equal_weights(uniform_cohort(3)),
    "drop-out": with_dropout(uniform_cohort(3), 0.3),
    "trace": with_availability(uniform_cohort(3), np.array([[True, False, True, True, False]])),
}
N = 4000


def drawn(participation, key, index=0, number=N):
    ids, weights = jax.vmap(lambda k: participation.draw(k, index, SIZES))(jax.random.split(key, number))
    return np.asarray(ids), np.asarray(weights)


@pytest.mark.parametrize("name", KINDS)
def test_ids_increase_without_repeats_and_weights_fit(name, key):
    ids, weights = drawn(KINDS[name], key, number=50)
    assert ids.shape == weights.shape == (50, KINDS[name].cohort_size)
    assert (np.diff(ids) > 0).all()
    assert weights.dtype == np.float32
    assert (weights >= 0).all()


def test_uniform_weights_are_sizes(key):
    ids, weights = drawn(KINDS["uniform"], key, number=50)
    np.testing.assert_array_equal(weights, np.asarray(SIZES)[ids])


def test_a_weighted_cohort_of_one_follows_the_sizes(key):
    """4 standard errors of a share of at most 1/2."""
    ids, weights = drawn(weighted_cohort(1), key)
    shares = np.bincount(ids.ravel(), minlength=5) / N
    np.testing.assert_allclose(shares, np.asarray(SIZES) / 20, atol=4 * 0.5 / np.sqrt(N))
    assert (weights == 1).all()


def test_a_weighted_cohort_is_drawn_one_after_the_other(key):
    """The chance of a pair is p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    ids, _ = drawn(weighted_cohort(2), key)
    p = np.asarray(SIZES) / 20
    expected = np.triu(np.outer(p, p) / (1 - p)[:, None] + np.outer(p, p) / (1 - p)[None], 1)
    found = np.zeros((5, 5))
    np.add.at(found, (ids[:, 0], ids[:, 1]), 1 / N)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(N))


def test_drop_out_has_its_rate_for_each_client_alone(key):
    _, weights = drawn(with_dropout(uniform_cohort(5), 0.3), key)
    away = weights == 0
    np.testing.assert_allclose(away.mean(0), 0.3, atol=4 * np.sqrt(0.21 / N))
    assert np.abs(np.corrcoef(away.T) - np.eye(5)).max() < 4 / np.sqrt(N)


def test_who_drops_out_does_not_depend_on_the_cohort(key):
    everyone, some = (with_dropout(kind, 0.5).draw(key, 0, SIZES) for kind in (uniform_cohort(5), uniform_cohort(3)))
    np.testing.assert_array_equal(np.asarray(everyone[1])[some[0]], some[1])


def test_a_trace_begins_anew_after_its_last_round(key):
    trace = np.array([[True] * 5, [False] * 5, [True, False] * 2 + [True]])
    for index in range(6):
        _, weights = with_availability(uniform_cohort(5), trace).draw(key, index, SIZES)
        np.testing.assert_array_equal(np.asarray(weights) > 0, trace[index % 3])


def test_a_trace_is_read_from_a_file(tmp_path):
    trace = np.array([[True, False], [False, True]])
    np.save(tmp_path / "trace.npy", trace)
    np.testing.assert_array_equal(read_availability(tmp_path / "trace.npy", 2), trace)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones((3, 5), bool), r"holds bool .3, 5.; expected bool .rounds, 2."),
        (np.ones((3, 2)), "holds float64"),
        (np.ones((0, 2), bool), "holds bool .0, 2."),
        (np.array([{}]), "cannot read a trace"),
        (None, "cannot read a trace"),
    ],
)
def test_files_that_hold_no_trace(tmp_path, content, message):
    if content is not None:
        np.save(tmp_path / "trace.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_availability(tmp_path / "trace.npy", 2)


def test_a_file_of_several_arrays_is_no_trace(tmp_path):
    np.savez(tmp_path / "trace.npz", a=np.ones((3, 2), bool))
    with pytest.raises(ValueError, match="several arrays"):
        read_availability(tmp_path / "trace.npz", 2)


BAD = {
    "empty": (lambda: uniform_cohort(0), "cohort_size must be at least 1, got 0"),
    "empty-weighted": (lambda: weighted_cohort(0), "cohort_size must be at least 1"),
    "large": (lambda: uniform_cohort(6).draw(jax.random.key(0), 0, SIZES), "a cohort of 6 is larger than the populati"),
    "large-weighted": (lambda: weighted_cohort(6).draw(jax.random.key(0), 0, SIZES), "larger than the population of 5"),
    "rate": (lambda: with_dropout(uniform_cohort(2), 1.0), "must be in .0, 1., got 1.0"),
    "trace-numbers": (lambda: with_availability(uniform_cohort(2), np.ones((2, 5))), "got float64"),
    "trace-clients": (
        lambda: with_availability(uniform_cohort(2), np.ones((2, 4), bool)).draw(jax.random.key(0), 0, SIZES),
        "the trace has 4 clients, the data 5",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_has_no_meaning_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
