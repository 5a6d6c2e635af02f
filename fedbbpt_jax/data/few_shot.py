"""Which examples of a labelled set are drawn: shots per class, a stratified part, a stratified sample."""

from __future__ import annotations

import numpy as np

Seed = int | tuple[int, ...]


def class_ranks(labels: np.ndarray, seed: Seed) -> np.ndarray:
    """Returns the place of each example in a random order of its own class: int `[n]`, 0 for the first.

    Args:
      labels: int `[n]`.
      seed: the same seed gives the same ranks on every machine.

    Example:
      >>> sorted(class_ranks(np.array([7, 7, 3, 7]), seed=0)[[0, 1, 3]].tolist())
      [0, 1, 2]
    """
    rng = np.random.default_rng(seed)
    ranks = np.empty(len(labels), int)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        ranks[rows] = rng.permutation(len(rows))
    return ranks


def class_positions(labels: np.ndarray, seed: Seed) -> np.ndarray:
    """Returns the ranks as shares of the class, (rank + 1/2) / size: float `[n]` in (0, 1).

    The examples with the smallest positions hold every class in proportion, however many are taken (the divisor
    method of Webster and Sainte-Laguë).
    """
    return (class_ranks(labels, seed) + 0.5) / np.bincount(labels)[labels]


def stratified_sample(labels: np.ndarray, limit: int, seed: Seed) -> np.ndarray:
    """Returns `limit` rows, ascending, that hold the classes in proportion; all rows where there are no more.

    A smaller sample is part of a larger one of the same seed.

    Args:
      labels: int `[n]`, from 0.
      limit: how many rows.
      seed: the same seed gives the same rows on every machine.
    """
    return np.sort(np.argsort(class_positions(labels, seed), kind="stable")[:limit])


def stratified_part(labels: np.ndarray, share: float, seed: Seed) -> np.ndarray:
    """Returns a mask bool `[n]` of a random share of each class, rounded; exactly a half is rounded down."""
    return class_positions(labels, seed) < share
