"""Against scikit-learn, which counts from the labels and predictions themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from sklearn.metrics import confusion_matrix as theirs

from fedbbpt_jax.training.metrics import METRICS, confusion_matrix

TOLERANCE = 1e-6  # float32 shares

SKLEARN = {
    "accuracy": lambda labels, predictions, size: accuracy_score(labels, predictions),
    "f1": lambda labels, predictions, size: f1_score(labels, predictions, labels=[0, 1], zero_division=0.0),
    "macro-f1": lambda labels, predictions, size: f1_score(
        labels, predictions, labels=range(size), average="macro", zero_division=0.0
    ),
    "matthews": lambda labels, predictions, size: matthews_corrcoef(labels, predictions),
}


def pairs(size: int):
    label = st.integers(0, size - 1)
    return st.lists(st.tuples(label, label), min_size=1, max_size=40).map(lambda rows: (size, np.array(rows)))


def scores(size: int, labels, predictions) -> dict[str, float]:
    confusion = confusion_matrix(jnp.asarray(labels), jnp.asarray(predictions), size)
    return {name: float(metric(confusion)) for name, metric in METRICS.items() if name != "f1" or size == 2}


def check(size: int, labels, predictions) -> None:
    for name, score in scores(size, labels, predictions).items():
        expected = SKLEARN[name](labels, predictions, size)
        assert score == pytest.approx(expected, abs=TOLERANCE), name


@given(st.sampled_from([2, 3, 6]).flatmap(pairs))
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_metrics_equal_those_of_scikit_learn(drawn):
    size, rows = drawn
    check(size, rows[:, 0], rows[:, 1])


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_many_examples(share):
    """As many as QQP's development set: products of counts would not fit int32."""
    rng = np.random.default_rng(0)
    labels = (rng.random(40_430) < share).astype(int)
    check(2, labels, np.where(rng.random(40_430) < 0.8, labels, 1 - labels))


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize(("label", "prediction"), [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_one_class_only(label, prediction):
    check(2, np.full(7, label), np.full(7, prediction))
    assert scores(2, np.full(7, label), np.full(7, prediction))["matthews"] == 0


def test_all_right_and_all_wrong():
    labels = np.array([0, 1, 1, 0, 1])
    assert scores(2, labels, labels) == pytest.approx(dict.fromkeys(METRICS, 1.0), abs=TOLERANCE)
    wrong = scores(2, labels, 1 - labels)
    assert (wrong["accuracy"], wrong["f1"], wrong["matthews"]) == (0, 0, pytest.approx(-1))


def test_counts_add_up_over_batches_and_padding_does_not_count():
    rng = np.random.default_rng(1)
    labels, predictions = rng.integers(0, 3, (2, 20))
    counted = np.arange(24) < 20
    batches = [np.pad(x, (0, 4)).reshape(3, 8) for x in (labels, predictions)]
    count = jax.jit(lambda *batch: jax.vmap(lambda *x: confusion_matrix(x[0], x[1], 3, x[2]))(*batch).sum(0))
    total = count(*batches, counted.reshape(3, 8))
    np.testing.assert_array_equal(total, theirs(labels, predictions))
    assert total.dtype == jnp.int32


def test_metrics_run_under_jit_and_vmap():
    confusions = jnp.array([[[3, 1], [2, 4]], [[5, 0], [0, 0]]])
    for metric in METRICS.values():
        together = jax.jit(jax.vmap(metric))(confusions)
        assert together.dtype == jnp.float32
        np.testing.assert_allclose(together, [metric(confusions[0]), metric(confusions[1])], atol=TOLERANCE)
