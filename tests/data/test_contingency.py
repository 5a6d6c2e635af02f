import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.data.contingency import apportion, draw_without_replacement, traded

several = settings(max_examples=100, deadline=None, derandomize=True)


@given(
    st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1, max_size=30),
    st.integers(0, 5),
    st.integers(0, 1000),
    st.data(),
)
@several
def test_apportioned_integers_keep_their_bounds_and_sum(shares, least, extra, data):
    most = np.array([least + data.draw(st.integers(0, 50)) for _ in shares])
    total = least * len(shares) + extra
    shares = np.array(shares)
    if total > np.where(shares > 0, most, least).sum():
        with pytest.raises(ValueError, match=f"{total} cannot be shared out"):
            apportion(shares, total, least, most)
        return
    sizes = apportion(shares, total, least, most)
    assert sizes.sum() == total
    assert (sizes >= least).all()
    assert (sizes <= most).all()


def test_apportioned_by_hand():
    """7 · 5/9 = 3.9, 7 · 3/9 = 2.3, 7 · 1/9 = 0.8; with at most 3, then 4 · 3/4 and 4 · 1/4 of what is left."""
    shares = np.array([5.0, 3.0, 1.0])
    assert apportion(shares, 7, 0).tolist() == [4, 2, 1]
    assert apportion(shares, 7, 0, np.array([3, 9, 9])).tolist() == [3, 3, 1]
    assert apportion(shares, 7, 2).tolist() == [3, 2, 2]
    assert apportion(np.ones(4), 6, 1).tolist() == [2, 2, 1, 1]


def test_too_little_for_all():
    with pytest.raises(ValueError, match="5 cannot be shared out among 3 of at least 2"):
        apportion(np.ones(3), 5, 2)


@given(st.integers(1, 8), st.integers(1, 6), st.floats(1e-3, 10), st.integers(0, 2**32 - 1))
@several
def test_draws_keep_both_sums(num_clients, num_classes, alpha, seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 9, (num_clients, num_classes))
    mixtures = rng.dirichlet(np.full(num_classes, alpha), num_clients)
    counts = draw_without_replacement(mixtures, table.sum(1), table.sum(0), rng)
    assert (counts >= 0).all()
    assert (counts.sum(0) == table.sum(0)).all()
    assert (counts.sum(1) == table.sum(1)).all()


def test_a_class_that_all_want_goes_to_nobody_in_particular():
    """Both want class 0 alone, of which there are 600: each gets half of it, with standard deviation 8.7."""
    mixtures = np.array([[1.0, 0.0], [1.0, 0.0]])
    counts = draw_without_replacement(mixtures, np.full(2, 600), np.full(2, 600), np.random.default_rng(0))
    assert (np.abs(counts - 300) < 45).all()


def test_who_finds_a_class_exhausted_draws_among_the_others_by_its_own_mixture():
    """Client 0 gets the class it wants and leaves the other one's mixture 3 : 1 of what is left."""
    mixtures = np.array([[1.0, 0.0, 0.0], [0.0, 0.75, 0.25]])
    sizes, supply = np.array([300, 4000]), np.array([300, 3000, 1000])
    counts = draw_without_replacement(mixtures, sizes, supply, np.random.default_rng(0))
    assert counts.tolist() == [[300, 0, 0], [0, 3000, 1000]]


@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**32 - 1))
@several
def test_trades_keep_both_sums_and_what_they_were_given(num_clients, num_classes, seed):
    rng = np.random.default_rng(seed)
    held = rng.random((num_clients, num_classes)) < 0.4
    before = held.copy()
    after = traded(held, rng)
    assert (held == before).all()
    assert (after.sum(0) == held.sum(0)).all()
    assert (after.sum(1) == held.sum(1)).all()


def test_trades_reach_all_tables_evenly():
    """Of one class each for 3 clients there are 6 tables: 100 of each in 600, with standard deviation 9.1."""
    rng = np.random.default_rng(0)
    seen = [tuple(traded(np.eye(3, dtype=bool), rng).argmax(1).tolist()) for _ in range(600)]
    counts = [seen.count(table) for table in set(seen)]
    assert len(counts) == 6
    assert all(abs(count - 100) < 40 for count in counts)
