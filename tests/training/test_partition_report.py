import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console

from fedbbpt_jax.data.partition import dirichlet, iid, pathological, power_law
from fedbbpt_jax.training.partition_report import (
    class_counts,
    partition_summary,
    partition_table,
    write_partition_figure,
)

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LABELS = np.arange(2000) % 10


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def picture(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    return pixels


def printed(table, width: int = 120) -> list[str]:
    """Returns the lines of a table."""
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_counts_are_those_of_a_loop():
    parts = dirichlet(LABELS, 30, 0.2, seed=0)
    expected = [[(LABELS[part] == label).sum() for label in range(10)] for part in parts]
    assert class_counts(parts, LABELS, 10).tolist() == expected


def test_classes_that_nobody_holds_are_counted_too():
    assert class_counts([np.array([1]), np.array([0])], np.array([0, 2]), 5).tolist() == [
        [0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0],
    ]


def test_summary_by_hand():
    """Shares 1, 0 and 1/3, 2/3 against 1/2, 1/2: distances 1/2 and 1/6."""
    summary = partition_summary([np.array([0]), np.array([1, 2, 3])], np.array([0, 0, 1, 1]), 2, packing_waste=0.25)
    assert summary.pop("mean_distance") == pytest.approx(1 / 3)
    assert summary == {
        "num_clients": 2,
        "min_examples": 1,
        "median_examples": 2.0,
        "max_examples": 3,
        "mean_classes": 1.5,
        "packing_waste": 0.25,
    }


def test_summary_of_what_is_known_of_a_split():
    """IID of equal class counts is at distance 0 in the mean of many; k of 10 classes are at 1 - k/10."""
    assert partition_summary(pathological(LABELS, 20, 3, 0), LABELS, 10)["mean_distance"] == pytest.approx(
        0.7, abs=0.01
    )
    assert partition_summary(iid(LABELS, 4, 0), LABELS, 10)["mean_distance"] < 0.06
    assert partition_summary([np.arange(2000)], LABELS, 10)["mean_distance"] == 0
    assert "packing_waste" not in partition_summary(iid(LABELS, 4, 0), LABELS, 10)


def test_summary_can_be_written_down():
    summary = partition_summary(iid(LABELS, 4, 0), LABELS, 10, packing_waste=np.float32(0.5))
    assert {type(value) for value in summary.values()} == {int, float}


def test_table_of_few_clients():
    parts = [np.arange(3), np.arange(3, 2000)]
    header, first, second = map(str.split, printed(partition_table(parts, LABELS, WORDS)))
    assert header == ["client", *WORDS, "total"]
    assert first == ["0", "1", "1", "1", *["·"] * 7, "3"]
    assert second == ["1", "199", "199", "199", *["200"] * 7, "1,997"]


def test_table_of_many_clients_shows_20_and_quantiles_of_all():
    parts = np.split(np.arange(1275), np.cumsum(np.arange(1, 50)))  # sizes 1, 2, ..., 50
    lines = printed(partition_table(parts, LABELS, WORDS), width=200)
    assert [line.split()[0] for line in lines[1:21]] == [str(client) for client in range(20)]
    assert " ".join(lines[21:]) == (
        "… and 30 more. Examples of a client: 1 at least, 6 at 10 %, 26 median, 45 at 90 %, 50 at most; "
        "9.1 classes on average"
    )


def test_table_of_20_clients_has_no_more_to_say():
    assert len(printed(partition_table(iid(LABELS, 20, 0), LABELS, WORDS))) == 21


def test_table_of_many_classes_names_the_largest_three():
    labels = np.repeat(np.arange(15), np.arange(15, 0, -1))
    names = [f"class [{label}]" for label in range(15)]  # brackets that a console must not read as markup
    parts = [np.arange(15 + 14 + 13 + 12), np.arange(54, 120)]
    header, first, _ = printed(partition_table(parts, labels, names))
    assert header.split() == ["client", "classes", "total", "most", "of"]
    assert first.split(maxsplit=3) == ["0", "4", "54", "class [0]: 15, class [1]: 14, class [2]: 13"]
    one = printed(partition_table([np.array([0]), np.arange(1, 120)], labels, names))[1]
    assert one.split(maxsplit=3) == ["0", "1", "1", "class [0]: 1"]


@pytest.mark.parametrize("width", [80, 120])
def test_long_names_leave_numbers_whole(width):
    labels = np.arange(60_000) % 10
    names = ["brushland or shrubland", "industrial buildings", "permanent crop land [x]", "highway", "pasture"] * 2
    lines = printed(partition_table(iid(labels, 6, 0), labels, names), width)
    rows = [line.split() for line in lines if line.split()[0] in "012345"]
    assert len(rows) == 6
    for row in rows:
        counts = [int(word.replace(",", "")) for word in row[1:]]
        assert sum(counts[:-1]) == counts[-1] == 10_000
    assert "[x]" in "".join(lines)


CASES = {
    "1 client": (lambda labels: iid(labels, 1, 0), 10),
    "5 clients": (lambda labels: dirichlet(labels, 5, 0.3, 0), 10),
    "50 clients": (lambda labels: dirichlet(labels, 50, 0.3, 0), 10),
    "61 clients, 2 classes": (lambda labels: dirichlet(labels, 61, 0.3, 0), 2),
    "10,000 clients": (lambda labels: power_law(labels, 10_000, 1.0, 0), 10),
    "1,000 classes": (lambda labels: dirichlet(labels, 10, 0.3, 0), 1000),
}


SLOW = ("61 clients, 2 classes", "10,000 clients", "1,000 classes")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_figure_shows_the_split(case, tmp_path):
    split, num_classes = CASES[case]
    labels = np.arange(30_000) % num_classes
    names = [f"class {label}" for label in range(num_classes)]
    parts = split(labels)
    largest = int(np.argmax([len(part) for part in parts]))
    fewer = [part[::2] if client == largest else part for client, part in enumerate(parts)]
    for name, shown in {"whole": parts, "fewer": fewer}.items():
        write_partition_figure(tmp_path / f"{name}.png", shown, labels, names)
    whole, other = (picture(tmp_path / f"{name}.png") for name in ("whole", "fewer"))
    assert whole.shape != other.shape or (whole != other).any()


def test_the_same_split_is_the_same_figure(tmp_path):
    for name in ("first.png", "again.png"):
        write_partition_figure(tmp_path / name, iid(LABELS, 5, 0), LABELS, WORDS)
    assert (picture(tmp_path / "first.png") == picture(tmp_path / "again.png")).all()


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a figure and returns the matrix of its heat map `[classes, columns]`."""

    def draw(parts, labels, names) -> np.ndarray:
        shown = []
        imshow = Axes.imshow
        monkeypatch.setattr(Axes, "imshow", lambda *args, **options: shown.append(args[1]) or imshow(*args, **options))
        write_partition_figure(tmp_path / "drawn.png", parts, labels, names)
        (matrix,) = shown
        return np.asarray(matrix)

    return draw


def test_heat_map_of_few_clients_is_in_their_order(drawn):
    parts = dirichlet(LABELS, 12, 0.3, 0)
    counts = class_counts(parts, LABELS, 10)
    np.testing.assert_allclose(drawn(parts, LABELS, WORDS), (counts / counts.sum(1, keepdims=True)).T)


def test_heat_map_of_many_clients_is_sorted_by_their_largest_class(drawn):
    parts = pathological(LABELS, 100, 1, 0)
    expected = np.repeat(np.eye(10), 10, axis=1)
    np.testing.assert_allclose(drawn(parts, LABELS, WORDS), expected)


def test_heat_map_of_a_class_begins_with_who_holds_most_of_it(drawn):
    matrix = drawn(dirichlet(LABELS, 100, 0.3, 0), LABELS, WORDS)
    largest, share = matrix.argmax(0), matrix.max(0)
    assert (np.diff(largest) >= 0).all()
    assert (np.diff(share)[np.diff(largest) == 0] <= 0).all()


def test_heat_map_of_very_many_clients_has_means_of_neighbours(drawn):
    labels = np.arange(20_000) % 10
    matrix = drawn(pathological(labels, 2000, 2, 0), labels, WORDS)
    assert matrix.shape == (10, 500)
    np.testing.assert_allclose(matrix.sum(0), 1)
    assert (np.diff(matrix.argmax(0)) >= 0).mean() > 0.98
