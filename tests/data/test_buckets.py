import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.data.buckets import plan_buckets, take_bucket
from fedbbpt_jax.models.classifiers import MaskedText
from fedbbpt_jax.types import Examples

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30).map(np.array)
checked = settings(max_examples=60, deadline=None, derandomize=True)


def num_tokens(buckets) -> int:
    return sum(bucket.length * len(bucket.rows) for bucket in buckets)


def fewest_tokens(lengths: np.ndarray, max_buckets: int, multiple: int) -> int:
    """Of all choices of at most so many lengths."""
    padded = np.minimum(-(-lengths // multiple) * multiple, lengths.max())
    steps = sorted(set(padded.tolist()))
    return min(
        sum(min(length for length in (*chosen, steps[-1]) if length >= own) for own in padded)
        for size in range(min(max_buckets, len(steps)))
        for chosen in itertools.combinations(steps[:-1], size)
    )


@given(LENGTHS, st.integers(1, 6), st.sampled_from([1, 8, 16]))
@checked
def test_every_example_is_in_one_bucket_and_fits(lengths, max_buckets, multiple):
    buckets = plan_buckets(lengths, max_buckets, multiple)
    assert len(buckets) <= max_buckets
    assert sorted(np.concatenate([bucket.rows for bucket in buckets])) == list(range(len(lengths)))
    assert [bucket.length for bucket in buckets] == sorted({bucket.length for bucket in buckets})
    assert all(len(bucket.rows) for bucket in buckets)
    for bucket in buckets:
        assert (lengths[bucket.rows] <= bucket.length).all()
        assert (np.diff(bucket.rows) > 0).all()
        assert bucket.length % multiple == 0 or bucket.length == lengths.max()
        assert isinstance(bucket.length, int)


@given(LENGTHS, st.integers(1, 4), st.sampled_from([4, 8]))
@checked
def test_no_plan_has_fewer_tokens(lengths, max_buckets, multiple):
    buckets = plan_buckets(lengths, max_buckets, multiple)
    assert num_tokens(buckets) == fewest_tokens(lengths, max_buckets, multiple)


def test_equal_lengths_need_one_bucket():
    (bucket,) = plan_buckets(np.full(9, 17), max_buckets=5)
    assert (bucket.length, bucket.rows.tolist()) == (17, list(range(9)))


@pytest.mark.parametrize(
    ("lengths", "options"),
    [([], {}), ([0, 3], {}), ([3], {"max_buckets": 0}), ([3], {"multiple": 0}), ([-1], {})],
)
def test_nothing_to_plan(lengths, options):
    with pytest.raises(ValueError, match="expected lengths, max_buckets and multiple of at least 1, got"):
        plan_buckets(np.array(lengths, int), **options)


@given(LENGTHS, st.integers(1, 4))
@checked
def test_no_token_is_lost(lengths, max_buckets):
    attended = np.arange(64) < lengths[:, None]
    ids = np.where(attended, 5 + np.arange(len(lengths))[:, None], 1).astype(np.int32)
    labels = np.arange(len(lengths), dtype=np.int32)
    examples = Examples(MaskedText(ids, attended), np.zeros((len(lengths), 0), np.float32), labels)
    for bucket in plan_buckets(lengths, max_buckets):
        own = take_bucket(examples, bucket)
        assert own.inputs.ids.shape == own.inputs.attended.shape == (len(bucket.rows), bucket.length)
        assert own.features.shape == (len(bucket.rows), 0)
        np.testing.assert_array_equal(own.inputs.attended.sum(1), lengths[own.labels])
        np.testing.assert_array_equal(own.inputs.ids[:, 0], 5 + own.labels)
