"""Tables of counts, clients by classes, whose sums are given: how many to each, and who holds what."""

from __future__ import annotations

import math

import numpy as np


def apportion(shares: np.ndarray, total: int, least: int, most: np.ndarray | float = math.inf) -> np.ndarray:
    """Returns integers that add up to `total`, in proportion to `shares` as far as their bounds allow, `[C]`.

    Exact values are clip(a·shares, least, most) with the one factor a that gives the sum; they are rounded by largest
    remainder, ties in favour of the first.

    Args:
      shares: at least 0, `[C]`; those of 0 get the least.
      total: the sum, between the sums of the bounds.
      least: bound below, of each.
      most: bound above, integers `[C]`, or none.

    Raises:
      ValueError: the bounds do not allow the sum.

    Example:
      >>> apportion(np.array([6.0, 3.0, 1.0, 0.0]), total=20, least=2)
      array([11,  5,  2,  2])
    """
    shares = shares / max(shares.sum(), 1e-300)
    ceilings = np.minimum(np.broadcast_to(most, shares.shape), total)
    if not least * len(shares) <= total <= np.where(shares > 0, ceilings, least).sum():
        raise ValueError(f"{total} cannot be shared out among {len(shares)} of at least {least} and at most {most}")
    low, high = 0.0, float(total)
    while np.clip(high * shares, least, ceilings).sum() < total:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * shares, least, ceilings).sum() < total else (low, middle)
    exact = np.clip(high * shares, least, ceilings)
    whole = np.floor(exact + 1e-9).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


def draw_without_replacement(
    mixtures: np.ndarray, sizes: np.ndarray, supply: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Returns how many examples of each class each client gets, int `[C, N]`; rows add up to sizes, columns to supply.

    All clients draw at once. Where a class is wanted more often than it is left, chance decides who gets one; the
    others draw again among the classes that are left, by their own mixture, or by what is left if that holds none.

    Args:
      mixtures: the probabilities of the classes at each client, `[C, N]`.
      sizes: examples of each client, int `[C]`.
      supply: examples of each class, int `[N]`, with the sum of the sizes.
      rng: what is drawn from.

    Example:
      >>> mixtures = np.array([[1.0, 0.0], [0.5, 0.5]])
      >>> draw_without_replacement(mixtures, np.array([3, 3]), np.array([3, 3]), np.random.default_rng(0)).sum(0)
      array([3, 3])
    """
    counts = np.zeros(mixtures.shape, int)
    while (left := supply - counts.sum(0)).any():
        chances = mixtures * (left > 0)
        mass = chances.sum(1, keepdims=True)
        chances = np.where(mass > 0, chances / np.where(mass > 0, mass, 1), left / left.sum())
        wanted = rng.multinomial(sizes - counts.sum(1), chances)
        for label in np.flatnonzero(wanted.sum(0) > left):
            wanted[:, label] = rng.multivariate_hypergeometric(wanted[:, label], left[label], method="marginals")
        counts += wanted
    return counts


def traded(held: np.ndarray, rng: np.random.Generator, num_rounds: int = 16) -> np.ndarray:
    """Returns a random table of who holds what, bool `[C, N]`, with the row and column sums of `held`.

    In each round all clients meet in pairs, and each pair deals out anew the classes that only one of the two holds.

    Args:
      held: whether a client holds a class, bool `[C, N]`.
      rng: what is drawn from.
      num_rounds: 16 forget where they started: among 2,000 clients neighbours are as alike as any two.

    Source: Strona et al., 2014, "A fast and unbiased procedure to randomize ecological binary matrices with fixed row
    and column totals" (the curveball algorithm); all pairs at once as in Carstens et al., 2018, "Parallel and
    I/O-efficient Randomisation of Massive Networks using Global Curveball Trades".

    Example:
      >>> traded(np.eye(4, dtype=bool), np.random.default_rng(0)).sum(1)
      array([1, 1, 1, 1])
    """
    held = held.copy()
    half = len(held) // 2
    for _ in range(num_rounds):
        pairs = rng.permutation(len(held))[: 2 * half].reshape(2, half)
        one, other = held[pairs]
        apart = one != other
        ranks = np.where(apart, rng.random(apart.shape), 2).argsort(1).argsort(1)
        first = apart & (ranks < (one & apart).sum(1, keepdims=True))
        held[pairs] = (one & other) | np.stack([first, apart & ~first])
    return held
