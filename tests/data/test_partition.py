import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.data.partition import (
    PARTITIONS,
    by_column,
    dirichlet,
    dirichlet_quantity,
    find_partition,
    iid,
    pathological,
    power_law,
)

LABELS = np.repeat(np.arange(10), 160)
NAMES = [
    *("iid", "feature-shift", "dirichlet:0.1", "dirichlet:100", "dirichlet-quantity:0.1", "dirichlet-quantity:100"),
    *("pathological:2", "pathological:10", "power-law:0", "power-law:1.5"),
]
WITH_A_MINIMUM = {"dirichlet": dirichlet, "dirichlet-quantity": dirichlet_quantity, "power-law": power_law}


@pytest.fixture(params=NAMES)
def split(request):
    return find_partition(request.param)


def class_counts(parts, labels=LABELS) -> np.ndarray:
    """Returns the examples of the classes at each client `[clients, classes]`."""
    return np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


def class_shares(parts, labels=LABELS) -> np.ndarray:
    counts = class_counts(parts, labels)
    return counts / counts.sum(1, keepdims=True)


def sizes_of(parts) -> list[int]:
    return [len(part) for part in parts]


def assert_each_row_once(parts, num_rows: int) -> None:
    """Each row at one client, ascending, as integers that index."""
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_rows))
    assert all(np.issubdtype(part.dtype, np.integer) and (np.diff(part) > 0).all() for part in parts)


def equal(parts, others) -> bool:
    return len(parts) == len(others) and all(np.array_equal(a, b) for a, b in zip(parts, others, strict=True))


def digest(parts) -> str:
    text = " ".join(",".join(map(str, part.tolist())) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


cases = st.integers(1, 40).flatmap(
    lambda num_clients: st.tuples(
        st.lists(st.integers(0, 9), min_size=num_clients, max_size=200).map(np.array),
        st.just(num_clients),
        st.integers(0, 2**32 - 1),
    )
)
several = settings(max_examples=60, deadline=None, derandomize=True)


@given(cases)
@several
def test_iid_gives_every_row_to_exactly_one_client(case):
    labels, num_clients, seed = case
    parts = iid(labels, num_clients, seed)
    assert_each_row_once(parts, len(labels))
    assert len(parts) == num_clients
    assert max(sizes_of(parts)) - min(sizes_of(parts)) <= 1


@pytest.mark.parametrize("kind", WITH_A_MINIMUM)
@given(cases, st.floats(1e-3, 1e3), st.integers(1, 20))
@several
def test_every_row_at_exactly_one_client_and_a_minimum_at_each(kind, case, number, min_examples):
    """The number is alpha or the exponent."""
    labels, num_clients, seed = case
    parts = WITH_A_MINIMUM[kind](labels, num_clients, number, seed, min_examples)
    assert_each_row_once(parts, len(labels))
    assert len(parts) == num_clients
    assert min(sizes_of(parts)) >= max(1, min(min_examples, len(labels) // (2 * num_clients)))


@given(cases, st.integers(1, 10))
@several
def test_pathological_keeps_its_promise(case, classes_per_client):
    """At most k classes each; exactly k, or all slots that the data allow: one per example and client of each class."""
    labels, num_clients, seed = case
    num_classes = len(np.unique(labels))
    if classes_per_client > num_classes or num_clients * classes_per_client < num_classes:
        with pytest.raises(ValueError, match="classes"):
            pathological(labels, num_clients, classes_per_client, seed)
        return
    parts = pathological(labels, num_clients, classes_per_client, seed)
    assert_each_row_once(parts, len(labels))
    held = (class_counts(parts, labels) > 0).sum(1)
    possible = np.minimum(np.bincount(labels), num_clients).sum()
    assert held.max() <= classes_per_client
    assert held.min() >= 1
    assert held.sum() == min(num_clients * classes_per_client, possible)
    assert held.max() - held.min() <= 1


def test_same_seed_gives_the_same_split_and_another_seed_another(split):
    first, again, other = (split(LABELS, 7, seed) for seed in (3, 3, 4))
    assert equal(first, again)
    assert not equal(first, other)


def test_one_client_holds_everything():
    for name in ("iid", "dirichlet:0.1", "dirichlet-quantity:0.1", "pathological:10", "power-law:1"):
        (part,) = find_partition(name)(LABELS, 1, 0)
        assert (part == np.arange(1600)).all()


@pytest.mark.parametrize("name", ["iid", "dirichlet:5", "dirichlet-quantity:5", "pathological:1", "power-law:1"])
def test_which_examples_of_a_class_a_client_gets_is_drawn(name):
    """Not the first of them, or the next: rows may be sorted by something that is no label."""
    parts = find_partition(name)(np.zeros(1000, int), 4, 0)
    assert all(np.unique(np.diff(part)).size > 1 for part in parts)


def test_labels_need_not_count_from_0(split):
    """The same classes by other numbers, in the same order, are split the same."""
    assert equal(split(LABELS, 7, 0), split(100 * LABELS - 50, 7, 0))


# Published results rest on these splits, which were made when they were published.


def test_splits_of_few_rows_stay_what_they_were():
    labels = np.repeat(np.arange(3), 6)
    assert [part.tolist() for part in iid(labels, 4, 0)] == [
        [0, 2, 3, 10, 12],
        [4, 5, 7, 13, 16],
        [6, 9, 11, 14],
        [1, 8, 15, 17],
    ]
    assert [part.tolist() for part in dirichlet(labels, 3, 0.1, 1, min_examples=3)] == [
        [6, 7, 8, 9, 10, 11],
        [2, 3, 4, 5, 12, 14, 15, 16, 17],
        [0, 1, 13],
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("iid", ["0339b92b84a16d5b", "fd15ea4f48dfa1d1"]),
        ("dirichlet:0.1", ["022cd19227026a73", "c5b409a1e8d60fbb"]),
        ("dirichlet:0.3", ["946ec409b575ca27", "1336b9431dd9966a"]),
        ("dirichlet:100", ["651d3209519adbf5", "b902da6de0d52f57"]),
    ],
)
def test_splits_of_the_published_runs_stay_what_they_were(name, expected):
    labels = np.repeat(np.arange(10), 16)
    assert [digest(find_partition(name)(labels, 5, seed)) for seed in (0, 1)] == expected


def test_splits_among_many_stay_what_they_were():
    labels = np.arange(20_000) % 10
    assert digest(iid(labels, 2000, 0)) == "295291266d7b359f"
    assert digest(dirichlet(labels, 2000, 0.05, 0)) == "8452a3c33c248fb6"


@given(cases, st.floats(1e-3, 1e3), st.integers(1, 20))
@several
def test_dirichlet_tops_up_as_its_plain_form_does(case, alpha, min_examples):
    """The plain form looks through all clients for every row that it moves."""
    labels, num_clients, seed = case
    rng = np.random.default_rng(seed)
    plain: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(rows)
        for part, piece in zip(plain, np.split(rows, cuts.round().astype(int)), strict=True):
            part.extend(piece)
    while len(smallest := min(plain, key=len)) < min(min_examples, max(1, len(labels) // (2 * num_clients))):
        largest = max(plain, key=len)
        smallest.append(largest.pop(int(rng.integers(len(largest)))))
    assert equal(dirichlet(labels, num_clients, alpha, seed, min_examples), [np.sort(part) for part in plain])


# Each against the law that it states.


@pytest.mark.parametrize("split", [dirichlet, dirichlet_quantity])
@pytest.mark.parametrize("seed", range(5))
def test_a_large_alpha_is_nearly_iid(split, seed):
    """Shares of Dir(1e4) move a class, or a size, by 1 %; drawing 320 examples moves a share by 0.017 (1 s.d.)."""
    parts = split(LABELS, 5, 1e4, seed)
    np.testing.assert_allclose(class_shares(parts), 0.1, atol=0.02 if split is dirichlet else 0.07)
    np.testing.assert_allclose(sizes_of(parts), 320, atol=20)


@pytest.mark.parametrize("split", [dirichlet, dirichlet_quantity])
@pytest.mark.parametrize("seed", range(5))
def test_a_small_alpha_is_skewed(split, seed):
    """The largest class of a client holds far more than the tenth of an even split."""
    parts = split(LABELS, 10, 0.05, seed)
    assert class_shares(parts).max(1).mean() > 0.4
    assert max(sizes_of(parts)) > 2 * min(sizes_of(parts))


@pytest.mark.parametrize("split", [dirichlet, dirichlet_quantity])
def test_small_clients_are_topped_up(split):
    """At alpha 0.01 most of 20 clients would hold nothing."""
    parts = split(LABELS, 20, 0.01, seed=0, min_examples=8)
    assert min(sizes_of(parts)) == 8


@pytest.mark.parametrize("split", [dirichlet, dirichlet_quantity])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_class_shares_are_dirichlet(split, alpha):
    """Shares of Dir(alpha), 10 classes, have variance 0.09 / (10·alpha + 1).

    Of 4 seeds of 200 clients, those of 100 examples or more: drawing adds at most 0.0009 to the variance, on average
    far less; the mean of so many shares is known to some 4 %.
    """
    labels = np.arange(100_000) % 10
    parts = [part for seed in range(4) for part in split(labels, 200, alpha, seed) if len(part) >= 100]
    shares = class_shares(parts, labels)
    np.testing.assert_allclose(shares.mean(0), 0.1, atol=0.02)
    np.testing.assert_allclose(shares.var(), 0.09 / (10 * alpha + 1), rtol=0.12)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_sizes_are_dirichlet(alpha):
    """Shares of Dir_C(alpha) have variance (C - 1) / C² / (C·alpha + 1), here from 20 seeds of 100 clients."""
    sizes = np.array([sizes_of(dirichlet_quantity(LABELS, 100, alpha, seed, 1)) for seed in range(20)])
    np.testing.assert_allclose((sizes / 1600).var(), 99 / 100**2 / (100 * alpha + 1), rtol=0.2)


def test_sizes_are_more_unequal_than_those_of_dirichlet():
    unequal = [np.std(sizes_of(dirichlet_quantity(LABELS, 50, 0.5, seed))) for seed in range(5)]
    equal = [np.std(sizes_of(dirichlet(LABELS, 50, 0.5, seed))) for seed in range(5)]
    assert min(unequal) > 2 * max(equal)


def test_shares_scatter_around_those_of_all_data():
    """Of a class of 1 in 50 they are Beta(9.8, 0.2), of variance 0.02 · 0.98 / 11; around 1 in 2 it would be 13 times.

    100 clients determine so skewed a variance to some 30 %; the mean of 5 seeds.
    """
    labels = (np.arange(50_000) % 50 == 0).astype(int)
    parts = [part for seed in range(5) for part in dirichlet_quantity(labels, 100, 5.0, seed) if len(part) >= 100]
    shares = class_shares(parts, labels)[:, 1]
    np.testing.assert_allclose(shares.var(), 0.02 * 0.98 / 11, rtol=0.3)


@pytest.mark.parametrize("classes_per_client", [1, 2, 5, 9, 10])
def test_pathological_clients_hold_so_many_classes_and_equal_sizes(classes_per_client):
    """20 clients of k classes hold each of 10 classes 2·k times, so that every shard has 160 / (2·k) examples."""
    counts = class_counts(pathological(LABELS, 20, classes_per_client, seed=0))
    assert ((counts > 0).sum(1) == classes_per_client).all()
    assert ((counts > 0).sum(0) == 2 * classes_per_client).all()
    assert np.abs(counts[counts > 0] - 80 / classes_per_client).max() < 1


def test_pathological_classes_are_held_by_their_share_of_the_data():
    """Of 40 shards of 20 examples; the class of 1 is held by somebody, that of 479 by 20 at most."""
    labels = np.repeat(np.arange(4), [479, 240, 80, 1])
    counts = class_counts(pathological(labels, 20, 2, seed=0), labels)
    assert (counts > 0).sum(0).tolist() == [20, 14, 5, 1]
    assert ((counts > 0).sum(1) == 2).all()


def test_pathological_pairs_of_classes_are_drawn_evenly():
    """2,000 clients of 2 classes of 10: each of 45 pairs at 44 clients, with standard deviation below 6.7."""
    labels = np.arange(20_000) % 10
    held = (class_counts(pathological(labels, 2000, 2, seed=0), labels) > 0).astype(int)
    pairs = (held.T @ held)[np.triu_indices(10, 1)]
    assert pairs.sum() == 2000
    assert (np.abs(pairs - 2000 / 45) < 27).all()
    neighbours = (held[:-1] * held[1:]).sum(1).mean()
    assert abs(neighbours - 2 * 2 / 10) < 0.05  # classes that two clients share by chance, ±0.012


def test_which_pathological_classes_are_cut_more_often_is_drawn():
    """15 shards of 10 classes of one size: 5 classes are cut in two, not always the same."""
    twice = [(class_counts(pathological(LABELS, 5, 3, seed)) > 0).sum(0) for seed in range(10)]
    assert all(sorted(row) == [1] * 5 + [2] * 5 for row in twice)
    assert len({tuple(row) for row in twice}) > 5


def test_who_gets_the_odd_example_of_a_class_is_drawn():
    """A class of 161 is cut in 81 and 80; were the 81 always the first client's, 10 classes would agree on it."""
    labels = np.repeat(np.arange(10), 161)
    counts = class_counts(pathological(labels, 20, 1, seed=0), labels)
    assert len({column[column > 0][0] for column in counts.T}) == 2


def test_power_law_by_hand():
    """100 / (1 + 1/2 + 1/3 + 1/4) = 48; squares: 100 / (1 + 1/4 + 1/9 + 1/16) = 70.2."""
    assert sizes_of(power_law(np.zeros(100), 4, 1.0, seed=0)) == [48, 24, 16, 12]
    assert sizes_of(power_law(np.zeros(100), 4, 2.0, seed=0, min_examples=1)) == [70, 18, 8, 4]


def test_power_law_sizes_fall_by_the_exponent():
    sizes = np.array(sizes_of(power_law(np.zeros(1_000_000), 100, 1.3, seed=0)))
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(sizes), 1)[0]
    np.testing.assert_allclose(slope, -1.3, atol=1e-3)  # rounding to integers of some 700 and more


def test_power_law_labels_are_iid():
    """A share of 100 examples or more has a standard deviation of 0.03 at most."""
    shares = class_shares(power_law(LABELS, 5, 1.0, seed=0))
    np.testing.assert_allclose(shares, 0.1, atol=0.1)


def test_power_law_tops_up_from_all_others_in_proportion():
    sizes = sizes_of(power_law(np.zeros(300), 6, 3.0, seed=0, min_examples=8))
    assert sizes[3:] == [8, 8, 8]
    np.testing.assert_allclose(sizes[0] / sizes[1], 8, rtol=0.05)


@given(cases)
@several
def test_power_law_of_exponent_0_is_iid(case):
    assert equal(power_law(case[0], case[1], 0.0, case[2]), iid(*case))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50))
@several
def test_a_column_is_a_client_per_value(values):
    column = np.array(values)
    parts = by_column(column)
    assert_each_row_once(parts, len(values))
    assert [set(column[part].tolist()) for part in parts] == [{value} for value in sorted(set(values))]


def test_a_column_of_names():
    assert [part.tolist() for part in by_column(np.array(["b", "a", "c", "a"], dtype=object))] == [[1, 3], [0], [2]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "one value per example, got shape \\(0,\\)"),
        ([[1, 2]], "one value per example, got shape \\(1, 2\\)"),
        (["a", ""], "row 1 names no client, got ''"),
        (np.array(["a", None], object), "row 1 names no client, got None"),
        ([1.0, 2.0, float("nan")], "row 2 names no client, got .*nan"),
        (np.array([1, "a"], object), "all texts or all numbers"),
    ],
)
def test_bad_columns(values, message):
    with pytest.raises(ValueError, match=message):
        by_column(np.asarray(values))


def test_ten_thousand_clients(split):
    labels = np.random.default_rng(0).integers(0, 10, 100_000)
    parts = split(labels, 10_000, 0)
    assert len(parts) == 10_000
    assert (np.sort(np.concatenate(parts)) == np.arange(100_000)).all()
    assert min(sizes_of(parts)) >= 5


def test_ten_thousand_clients_of_a_column():
    values = np.random.default_rng(0).permutation(100_000) % 10_000
    assert sizes_of(by_column(values)) == [10] * 10_000


@pytest.mark.parametrize("num_clients", [0, -1])
def test_no_clients(split, num_clients):
    with pytest.raises(ValueError, match=f"num_clients must be at least 1, got {num_clients}"):
        split(LABELS, num_clients, 0)


def test_more_clients_than_examples(split):
    with pytest.raises(ValueError, match="3 examples cannot be split among 4 clients"):
        split(np.zeros(3, int), 4, 0)


@pytest.mark.parametrize("split", [dirichlet, dirichlet_quantity])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_bad_alpha(split, alpha):
    with pytest.raises(ValueError, match=re.escape(f"alpha must be positive and at most 1e100, got {alpha}")):
        split(LABELS, 5, alpha, seed=0)


@pytest.mark.parametrize("exponent", [-0.1, float("nan"), float("inf")])
def test_bad_exponent(exponent):
    with pytest.raises(ValueError, match=f"exponent must be at least 0 and finite, got {exponent}"):
        power_law(LABELS, 5, exponent, seed=0)


@pytest.mark.parametrize("split", WITH_A_MINIMUM.values())
def test_no_client_may_be_left_without_data(split):
    with pytest.raises(ValueError, match="min_examples must be at least 1, got 0"):
        split(LABELS, 5, 1.0, 0, 0)


@pytest.mark.parametrize("classes_per_client", [0, -1, 11])
def test_bad_number_of_classes(classes_per_client):
    with pytest.raises(ValueError, match=f"between 1 and 10 classes, got {classes_per_client}"):
        pathological(LABELS, 20, classes_per_client, seed=0)


def test_too_few_clients_for_all_classes():
    with pytest.raises(ValueError, match="3 clients of 3 classes cannot hold 10 classes"):
        pathological(LABELS, 3, 3, seed=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("iid", iid),
        ("feature-shift", iid),
        ("dirichlet:0.3", lambda *case: dirichlet(*case[:2], 0.3, case[2])),
        ("dirichlet-quantity:3", lambda *case: dirichlet_quantity(*case[:2], 3, case[2])),
        ("pathological:3", lambda *case: pathological(*case[:2], 3, case[2])),
        ("power-law:0.7", lambda *case: power_law(*case[:2], 0.7, case[2])),
    ],
)
def test_names_are_read(text, expected):
    assert equal(find_partition(text)(LABELS, 7, 5), expected(LABELS, 7, 5))


def test_every_name_of_the_table_is_read():
    for name in PARTITIONS.keys() - {"column:NAME"}:
        kind, colon, _ = name.partition(":")
        assert len(find_partition(f"{kind}:2" if colon else kind)(LABELS, 8, 0)) == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[
            (text, ", ".join(list(PARTITIONS)[:-1]) + " or column:NAME")
            for text in ("", "IID", "iid:1", "iid:", "shards:2", "feature-shift:1", "columns", " dirichlet:1")
        ],
        *[
            (f"{kind}{value}", f"{kind}:ALPHA with ALPHA > 0")
            for kind in ("dirichlet", "dirichlet-quantity")
            for value in ("", ":", ":x", ":0", ":-1", ":nan", ":inf", ":1:2")
        ],
        *[
            (f"pathological{value}", "pathological:K with K a whole number of at least 1")
            for value in ("", ":", ":x", ":0", ":-1", ":1.5", ":nan", ":inf")
        ],
        *[
            (f"power-law{value}", "power-law:EXPONENT with EXPONENT at least 0")
            for value in ("", ":", ":x", ":-1", ":nan", ":inf")
        ],
    ],
)
def test_bad_names(text, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(f'--partition must be {expected}, got {text!r}')}$"):
        find_partition(text)


def test_who_names_no_known_split_is_told_of_dirichlet():
    with pytest.raises(ValueError, match="iid, dirichlet:ALPHA"):
        find_partition("dirichelt:0.3")
