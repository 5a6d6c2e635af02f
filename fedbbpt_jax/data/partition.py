"""Who holds which training examples. Every example goes to exactly one client."""

from __future__ import annotations

import numpy as np


def iid(labels: np.ndarray, num_clients: int, seed: int) -> list[np.ndarray]:
    """Returns the rows of each client in a uniformly random split of sizes that differ by at most one.

    Args:
      labels: int `[n]`.
      num_clients: how many parts.
      seed: the same seed gives the same split on every machine.

    Raises:
      ValueError: there are fewer examples than clients.

    Example:
      >>> [len(part) for part in iid(np.zeros(10), num_clients=3, seed=0)]
      [4, 3, 3]
    """
    _check(labels, num_clients)
    rows = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(part) for part in np.array_split(rows, num_clients)]


def dirichlet(labels: np.ndarray, num_clients: int, alpha: float, seed: int, min_examples: int = 8) -> list[np.ndarray]:
    r"""Returns the rows of each client when each class is spread by proportions $p \sim \mathrm{Dir}(\alpha)$.

    Small alpha gives clients of few classes and unequal sizes. Clients short of `min_examples` are topped up with
    random rows of the largest client.

    Args:
      labels: int `[n]`.
      num_clients: how many parts.
      alpha: concentration; 0.1 is extreme, 100 is nearly IID.
      seed: the same seed gives the same split on every machine.
      min_examples: the least that a client holds, lowered to n / (2·clients) where the data are few.

    Raises:
      ValueError: alpha is not positive, or there are fewer examples than clients.

    Source: Hsu et al., 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification".

    Example:
      >>> parts = dirichlet(np.repeat(np.arange(10), 16), num_clients=5, alpha=0.3, seed=0)
      >>> sorted(np.concatenate(parts)) == list(range(160))
      True
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    _check(labels, num_clients)
    rng = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(rows)
        for part, piece in zip(parts, np.split(rows, cuts.round().astype(int)), strict=True):
            part.extend(piece)
    least = min(min_examples, max(1, len(labels) // (2 * num_clients)))
    while len(smallest := min(parts, key=len)) < least:
        largest = max(parts, key=len)
        smallest.append(largest.pop(int(rng.integers(len(largest)))))
    return [np.sort(np.asarray(part)) for part in parts]


def _check(labels: np.ndarray, num_clients: int) -> None:
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")
    if len(labels) < num_clients:
        raise ValueError(f"{len(labels)} examples cannot be split among {num_clients} clients")
