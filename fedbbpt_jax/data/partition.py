"""Who holds which training examples. Every example goes to exactly one client.

Each split is a list of the rows of each client, ascending; the same seed gives the same split on every machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np

from fedbbpt_jax.data.contingency import apportion, draw_without_replacement, traded

Partition = Callable[[np.ndarray, int, int], list[np.ndarray]]
"""`(labels, num_clients, seed) -> the rows of each client`."""

PARTITIONS: dict[str, str] = {
    "iid": "uniformly at random, equal sizes",
    "dirichlet:ALPHA": "each class in proportions drawn from Dir(ALPHA): 0.1 is extreme, 100 nearly IID",
    "dirichlet-quantity:ALPHA": "clients' sizes and their class shares both drawn from Dir(ALPHA)",
    "pathological:K": "K classes per client",
    "power-law:EXPONENT": "IID labels; the client of rank r holds a share that falls as r^-EXPONENT",
    "feature-shift": "IID labels; the pictures of each client have a corruption of their own",
    "column:NAME": "the data's own: a client for each value of a column of the table",
}


def find_partition(text: str) -> Partition:
    """Returns the split that a name of `PARTITIONS` stands for, with a number in place of the capitals.

    Of "feature-shift" this is the split alone, that of "iid": its pictures are changed by `shift_clients`. The split by
    a column (`client_column`) is no function of the labels: `by_column` makes it.

    Raises:
      ValueError: there is no such split, or its number is out of range.

    Example:
      >>> split = find_partition("pathological:2")
      >>> [len(part) for part in split(np.repeat(np.arange(4), 6), 4, 0)]
      [6, 6, 6, 6]
    """
    kind, _, value = text.partition(":")
    number = _number(value)
    *names, last = PARTITIONS
    expected = f"{', '.join(names)} or {last}"
    match kind:
        case "iid" | "feature-shift" if text == kind:
            return iid
        case "dirichlet" | "dirichlet-quantity":
            split = dirichlet if kind == "dirichlet" else dirichlet_quantity
            if 0 < number < math.inf:
                return lambda labels, num_clients, seed: split(labels, num_clients, number, seed)
            expected = f"{kind}:ALPHA with ALPHA > 0"
        case "pathological":
            if number >= 1 and number.is_integer():
                return lambda labels, num_clients, seed: pathological(labels, num_clients, int(number), seed)
            expected = "pathological:K with K a whole number of at least 1"
        case "power-law":
            if 0 <= number < math.inf:
                return lambda labels, num_clients, seed: power_law(labels, num_clients, number, seed)
            expected = "power-law:EXPONENT with EXPONENT at least 0"
    raise ValueError(f"--partition must be {expected}, got {text!r}")


def client_column(text: str) -> str | None:
    """Returns the column that says whose an example is, None where another split is meant.

    Raises:
      ValueError: the column has no name.

    Example:
      >>> client_column("column:hospital"), client_column("iid")
      ('hospital', None)
    """
    kind, _, name = text.partition(":")
    if kind != "column":
        return None
    if not name:
        raise ValueError(f"--partition must be column:NAME, of a column of the data, got {text!r}")
    return name


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
      ValueError: alpha is not positive, `min_examples` is below 1, or there are fewer examples than clients.

    Source: Li et al., 2022, "Federated Learning on Non-IID Data Silos: An Experimental Study", distribution-based
    label imbalance; Hsu et al., 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", draw the classes of each client instead.

    Example:
      >>> parts = dirichlet(np.repeat(np.arange(10), 16), num_clients=5, alpha=0.3, seed=0)
      >>> sorted(np.concatenate(parts)) == list(range(160))
      True
    """
    _check(labels, num_clients, min_examples, alpha)
    rng = np.random.default_rng(seed)
    rows, owners = [], []
    for label in np.unique(labels):
        rows.append(rng.permutation(np.flatnonzero(labels == label)))
        cuts = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(rows[-1])
        owners.append(np.searchsorted(cuts.round(), np.arange(len(rows[-1])), side="right"))
    held = [np.concatenate(rows)[places] for places in _places(np.concatenate(owners), num_clients)]
    return _topped_up(held, _least(labels, num_clients, min_examples), rng)


def dirichlet_quantity(
    labels: np.ndarray, num_clients: int, alpha: float, seed: int, min_examples: int = 8
) -> list[np.ndarray]:
    r"""Returns the rows of each client when sizes and class shares are drawn from Dirichlet distributions.

    Client j holds $n_j = n q_j$ examples, $q \sim \mathrm{Dir}_C(\alpha)$, and draws their classes from shares of its
    own, $m_j \sim \mathrm{Dir}_N(\alpha N p)$ around the class shares p of all data: $\mathrm{Dir}(\alpha)$ where
    classes are balanced. Draws are without replacement: whose class is exhausted draws among those that are left, by
    $m_j$ again.

    Args:
      labels: int `[n]`.
      num_clients: C.
      alpha: concentration of both; 0.1 is extreme, 100 is nearly IID.
      seed: the same seed gives the same split on every machine.
      min_examples: the least that a client holds, lowered to n / (2·clients) where the data are few; the others share
        the rest in the proportions drawn.

    Raises:
      ValueError: alpha is not positive, `min_examples` is below 1, or there are fewer examples than clients.

    Source: Li et al., 2022, "Federated Learning on Non-IID Data Silos: An Experimental Study", quantity skew, for the
    sizes; Hsu et al., 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", for the classes. Differs from Hsu in drawing for all clients at once, not for one after the
    other, so that no client is last and left with the rest.

    Example:
      >>> parts = dirichlet_quantity(np.repeat(np.arange(10), 16), num_clients=5, alpha=0.3, seed=0)
      >>> sorted(np.concatenate(parts)) == list(range(160))
      True
    """
    _check(labels, num_clients, min_examples, alpha)
    rng = np.random.default_rng(seed)
    _, classes, supply = np.unique(labels, return_inverse=True, return_counts=True)
    shares = rng.dirichlet(np.full(num_clients, alpha))
    sizes = apportion(shares, len(labels), _least(labels, num_clients, min_examples))
    mixtures = rng.dirichlet(alpha * len(supply) * supply / len(labels), num_clients)  # [C, N]
    return _dealt(classes, draw_without_replacement(mixtures, sizes, supply, rng), rng)


def pathological(labels: np.ndarray, num_clients: int, classes_per_client: int, seed: int) -> list[np.ndarray]:
    """Returns the rows of each client when each holds few classes, chosen at random.

    Every class is cut into shards of equal size, as many as its share of the data asks for, at least one and at most
    one per client; every client gets `classes_per_client` shards of different classes. Fewer only where classes have
    too few examples to be cut so often. Clients have equal sizes where classes have and the shards divide evenly
    among them; no client is topped up, as that would take a class that it does not hold.

    Args:
      labels: int `[n]`.
      num_clients: C.
      classes_per_client: the most classes that a client holds, and as a rule exactly so many.
      seed: the same seed gives the same split on every machine.

    Raises:
      ValueError: `classes_per_client` is not between 1 and the number of classes N, C times as many are fewer than N,
        or there are fewer examples than clients.

    Source: McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", section
    3: 100 clients, two shards each of 200 that are cut from the data sorted by label. Differs from it in that no
    shard spans two classes and no client gets two shards of one; this is #C=k of Li et al., 2022, with every class
    held by someone. Classes are shuffled among clients by the trades of Strona et al., 2014, "A fast and unbiased
    procedure to randomize ecological binary matrices with fixed row and column totals".

    Example:
      >>> labels = np.repeat(np.arange(10), 16)
      >>> parts = pathological(labels, num_clients=5, classes_per_client=2, seed=0)
      >>> [len(np.unique(labels[part])) for part in parts]
      [2, 2, 2, 2, 2]
    """
    _check(labels, num_clients)
    _, classes, supply = np.unique(labels, return_inverse=True, return_counts=True)
    if not 1 <= classes_per_client <= len(supply):
        raise ValueError(f"classes_per_client must be between 1 and {len(supply)} classes, got {classes_per_client}")
    if num_clients * classes_per_client < len(supply):
        raise ValueError(f"{num_clients} clients of {classes_per_client} classes cannot hold {len(supply)} classes")
    rng = np.random.default_rng(seed)
    most = np.minimum(supply, num_clients)
    order = rng.permutation(len(supply))  # which classes are cut once more than others is left to chance
    num_shards = apportion(supply[order], min(num_clients * classes_per_client, most.sum()), 1, most[order])
    shards = np.repeat(order, num_shards)
    held = np.zeros((num_clients, len(supply)), bool)
    held[np.arange(len(shards)) % num_clients, shards] = True  # at most C shards of a class in a row: no client twice
    held = traded(held, rng)
    counts = np.zeros(held.shape, int)
    for label, holders in enumerate(held.T):
        owners = rng.permutation(np.flatnonzero(holders))
        counts[owners, label] = [len(shard) for shard in np.array_split(np.arange(supply[label]), len(owners))]
    return _dealt(classes, counts, rng)


def power_law(
    labels: np.ndarray, num_clients: int, exponent: float, seed: int, min_examples: int = 8
) -> list[np.ndarray]:
    r"""Returns the rows of each client in a random split of sizes $n_r \propto r^{-\mathrm{exponent}}$, r = 1, ..., C.

    Labels are IID. The first client is the largest; with exponent 0 the split is that of `iid`.

    Args:
      labels: int `[n]`.
      num_clients: C.
      exponent: 0 gives equal sizes, 1 Zipf's law.
      seed: the same seed gives the same split on every machine.
      min_examples: the least that a client holds, lowered to n / (2·clients) where the data are few; the others share
        the rest in proportion.

    Raises:
      ValueError: the exponent is negative, `min_examples` is below 1, or there are fewer examples than clients.

    Source: Li et al., 2020, "Federated Optimization in Heterogeneous Networks", section 5: sizes by a power law.

    Example:
      >>> [len(part) for part in power_law(np.zeros(100), num_clients=4, exponent=1.0, seed=0)]
      [48, 24, 16, 12]
    """
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be at least 0 and finite, got {exponent}")
    _check(labels, num_clients, min_examples)
    shares = np.arange(1.0, num_clients + 1) ** -exponent
    sizes = apportion(shares, len(labels), _least(labels, num_clients, min_examples))
    rows = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(part) for part in np.split(rows, np.cumsum(sizes)[:-1])]


def by_column(values: np.ndarray) -> list[np.ndarray]:
    """Returns the rows of each client when a column of the data says whose they are.

    Args:
      values: the client of each row, names or numbers, `[n]`; there is a client per distinct value, in the order of
        `np.unique(values)`.

    Raises:
      ValueError: there is no row, a row names no client (None, nan or an empty text), or the values are of kinds that
        have no order among each other.

    Example:
      >>> [part.tolist() for part in by_column(np.array(["ward b", "ward a", "ward b"]))]
      [[1], [0, 2]]
    """
    values = np.asarray(values)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"the clients' column must be one value per example, got shape {values.shape}")
    for row, value in enumerate(values.tolist()):
        if value is None or value == "" or value != value:
            raise ValueError(f"row {row} names no client, got {value!r}")
    try:
        names, owners = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise ValueError(f"the clients' column must be all texts or all numbers: {error}") from error
    return _places(owners, len(names))


def _check(labels: np.ndarray, num_clients: int, min_examples: int = 1, alpha: float = 1.0) -> None:
    if not 0 < alpha <= 1e100:  # far larger ones overflow in a sum
        raise ValueError(f"alpha must be positive and at most 1e100, got {alpha}")
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")
    if len(labels) < num_clients:
        raise ValueError(f"{len(labels)} examples cannot be split among {num_clients} clients")
    if min_examples < 1:
        raise ValueError(f"min_examples must be at least 1, got {min_examples}")


def _least(labels: np.ndarray, num_clients: int, min_examples: int) -> int:
    return min(min_examples, max(1, len(labels) // (2 * num_clients)))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _places(owners: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Returns the places of each client in `owners`, ascending."""
    sizes = np.bincount(owners, minlength=num_clients)
    return np.split(np.argsort(owners, kind="stable"), np.cumsum(sizes)[:-1])


def _dealt(classes: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns the rows of each client that holds `counts[client, class]` random examples of each class."""
    owners = np.empty(len(classes), int)
    for label, column in enumerate(counts.T):
        owners[rng.permutation(np.flatnonzero(classes == label))] = np.repeat(np.arange(len(column)), column)
    return _places(owners, len(counts))


def _topped_up(parts: list[np.ndarray], least: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns parts of at least `least` rows: a random row of the largest goes to the smallest, one at a time.

    Clients hold `least` rows on average or more. So while one is short the largest can spare a row, and no client that
    was topped up is the largest.
    """
    held = [part.tolist() for part in parts]
    short = [(len(part), i) for i, part in enumerate(held) if len(part) < least]
    largest = [(-len(part), i) for i, part in enumerate(held)]
    heapq.heapify(short)
    heapq.heapify(largest)
    while short:
        size, receiver = heapq.heappop(short)
        giver = largest[0][1]
        held[receiver].append(held[giver].pop(int(rng.integers(len(held[giver])))))
        heapq.heapreplace(largest, (-len(held[giver]), giver))
        if size + 1 < least:
            heapq.heappush(short, (size + 1, receiver))
    return [np.sort(np.asarray(part)) for part in held]
