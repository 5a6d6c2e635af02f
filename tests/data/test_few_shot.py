from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.data.few_shot import class_ranks, stratified_part, stratified_sample

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(np.array)
SEEDS = st.integers(0, 2**32 - 1)
checked = settings(max_examples=60, deadline=None, derandomize=True)


@given(LABELS, SEEDS)
@checked
def test_ranks_number_each_class(labels, seed):
    ranks = class_ranks(labels, seed)
    for label, count in Counter(labels.tolist()).items():
        assert sorted(ranks[labels == label]) == list(range(count))


@given(LABELS, st.integers(1, 130), SEEDS)
@checked
def test_a_sample_has_the_size_and_is_part_of_a_larger_one(labels, limit, seed):
    rows = stratified_sample(labels, limit, seed)
    assert len(rows) == min(limit, len(labels))
    assert (np.diff(rows) > 0).all()
    assert set(rows) <= set(stratified_sample(labels, limit + 5, seed))


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 200), SEEDS)
@checked
def test_a_sample_of_even_classes_is_even(num_classes, size, limit, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), size))
    counts = np.bincount(labels[stratified_sample(labels, limit, seed)], minlength=num_classes)
    assert np.ptp(counts) <= 1


def test_a_sample_of_uneven_classes_is_in_proportion():
    labels = np.repeat([0, 1, 2], [700, 200, 100])
    counts = np.bincount(labels[stratified_sample(labels, 100, seed=1)])
    assert counts.tolist() == [70, 20, 10]


@given(LABELS, st.floats(0.05, 0.95), SEEDS)
@checked
def test_a_part_has_its_share_of_each_class(labels, share, seed):
    part = stratified_part(labels, share, seed)
    for label, count in Counter(labels.tolist()).items():
        assert abs(part[labels == label].sum() - share * count) <= 0.5 + 1e-9


def test_seeds_draw_differently_and_repeatably():
    labels = np.zeros(50, int)
    first, again, other = (class_ranks(labels, seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
