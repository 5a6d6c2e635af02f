"""Texts of similar length together, so that an evaluation of many of them computes little padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from fedbbpt_jax.types import Examples


class Bucket(NamedTuple):
    """Which examples are computed together.

    Attributes:
      length: T, to which each of them is padded or cut.
      rows: int `[m]`, ascending.
    """

    length: int
    rows: np.ndarray


def plan_buckets(lengths: np.ndarray, max_buckets: int = 4, multiple: int = 8) -> tuple[Bucket, ...]:
    """Returns the buckets, shortest first, that hold every example once with the fewest tokens, padding included.

    Every length is one more program to compile, so that there are few.

    Args:
      lengths: tokens of each example, int `[n]`.
      max_buckets: most buckets.
      multiple: lengths of buckets are multiples of this, but not above the longest example.

    Raises:
      ValueError: there is no example, or a number is not positive.

    Example:
      >>> [(bucket.length, bucket.rows.tolist()) for bucket in plan_buckets(np.array([5, 30, 7, 31]), max_buckets=2)]
      [(8, [0, 2]), (31, [1, 3])]
    """
    if not len(lengths) or np.min(lengths) < 1 or max_buckets < 1 or multiple < 1:
        raise ValueError(
            f"expected lengths, max_buckets and multiple of at least 1, got {len(lengths)} lengths from "
            f"{np.min(lengths, initial=0)}, {max_buckets} and {multiple}"
        )
    padded = np.minimum(-(-np.asarray(lengths) // multiple) * multiple, np.max(lengths))
    steps, counts = np.unique(padded, return_counts=True)
    ends = _best_ends(steps, counts, min(max_buckets, len(steps)))
    within = np.searchsorted(steps[ends], padded)
    return tuple(Bucket(int(steps[end]), np.flatnonzero(within == place)) for place, end in enumerate(ends))


def _best_ends(steps: np.ndarray, counts: np.ndarray, num_buckets: int) -> list[int]:
    """Returns which of the lengths `steps`, ascending, are those of the buckets; `counts` examples have each.

    Dynamic programming: the fewest tokens of the first m lengths in k buckets are those of the first l < m in k - 1
    buckets and one bucket more, for the best l. More buckets always save tokens.
    """
    below = np.concatenate([[0], np.cumsum(counts)])
    fewest, starts = np.full(len(steps) + 1, np.inf), []
    fewest[0] = 0
    for _ in range(num_buckets):
        together = fewest[:-1, None] + steps * (below[1:] - below[:-1, None])  # [l, m - 1]
        together = np.where(np.tri(len(steps), dtype=bool).T, together, np.inf)
        starts.append(together.argmin(0))
        fewest = np.concatenate([[np.inf], together.min(0)])
    ends = [len(steps)]
    for start in starts[:0:-1]:
        ends.append(int(start[ends[-1] - 1]))
    return [end - 1 for end in ends[::-1]]


def take_bucket(examples: Examples, bucket: Bucket) -> Examples:
    """Returns the examples of a bucket, without the padding that none of them needs.

    Args:
      examples: with inputs whose every array is `[n, T]`, padded at the right, such as `MaskedText`.
      bucket: of the same examples.
    """

    def cut(x: Any) -> Any:
        return x[bucket.rows][:, : bucket.length]

    features, labels = examples.features[bucket.rows], examples.labels[bucket.rows]
    return Examples(jax.tree.map(cut, examples.inputs), features, labels)
