import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.data.partition import dirichlet, iid

LABELS = np.repeat(np.arange(10), 160)
SPLITS = {
    "iid": iid,
    "dirichlet-0.1": lambda labels, num_clients, seed: dirichlet(labels, num_clients, 0.1, seed),
    "dirichlet-100": lambda labels, num_clients, seed: dirichlet(labels, num_clients, 100.0, seed),
}


@pytest.fixture(params=SPLITS)
def split(request):
    return SPLITS[request.param]


def class_shares(parts, labels=LABELS) -> np.ndarray:
    """Returns the proportions of the classes at each client `[clients, classes]`."""
    counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
    return counts / counts.sum(1, keepdims=True)


cases = st.integers(1, 40).flatmap(
    lambda num_clients: st.tuples(
        st.lists(st.integers(0, 9), min_size=num_clients, max_size=200), st.just(num_clients), st.integers(0, 2**32 - 1)
    )
)


@given(cases)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_iid_gives_every_row_to_exactly_one_client(case):
    labels, num_clients, seed = np.array(case[0]), *case[1:]
    parts = iid(labels, num_clients, seed)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert len(sizes) == num_clients
    assert max(sizes) - min(sizes) <= 1


@given(cases, st.floats(1e-3, 1e3), st.integers(1, 20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_dirichlet_gives_every_row_to_exactly_one_client(case, alpha, min_examples):
    labels, num_clients, seed = np.array(case[0]), *case[1:]
    parts = dirichlet(labels, num_clients, alpha, seed, min_examples)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert len(parts) == num_clients
    assert min(len(part) for part in parts) >= max(1, min(min_examples, len(labels) // (2 * num_clients)))


def test_same_seed_gives_the_same_split_and_another_seed_another(split):
    first, again, other = (split(LABELS, 7, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_large_alpha_is_nearly_iid(seed):
    """A share of Dir(1e4 · 5 clients) has standard deviation 0.2 % of the class: rounding dominates."""
    shares = class_shares(dirichlet(LABELS, 5, 1e4, seed))
    np.testing.assert_allclose(shares, 0.1, atol=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_alpha_is_skewed(seed):
    """The largest class of a client holds far more than the tenth of an even split."""
    parts = dirichlet(LABELS, 10, 0.05, seed)
    assert class_shares(parts).max(1).mean() > 0.4
    assert max(map(len, parts)) > 2 * min(map(len, parts))


def test_small_clients_are_topped_up():
    """At alpha 0.01 most of 20 clients would hold nothing."""
    parts = dirichlet(LABELS, 20, 0.01, seed=0, min_examples=8)
    assert min(map(len, parts)) == 8


@pytest.mark.parametrize("num_clients", [0, -1])
def test_no_clients(split, num_clients):
    with pytest.raises(ValueError, match=f"num_clients must be at least 1, got {num_clients}"):
        split(LABELS, num_clients, 0)


def test_more_clients_than_examples(split):
    with pytest.raises(ValueError, match="3 examples cannot be split among 4 clients"):
        split(np.zeros(3, int), 4, 0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=f"alpha must be positive.*got {alpha}"):
        dirichlet(LABELS, 5, alpha, seed=0)
