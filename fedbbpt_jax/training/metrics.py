"""What is reported of a classifier, from its confusion matrix: counts of labels and predictions.

Counts of batches, buckets or devices add up, and every metric is a function of the sum; all of it runs under `jit`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.types import Metric


def confusion_matrix(labels: Array, predictions: Array, num_classes: int, counted: Array | None = None) -> Array:
    """Returns how many examples of each label got each prediction, int32 `[N, N]`, labels first.

    Args:
      labels: int `[...]`.
      predictions: int `[...]`.
      num_classes: N.
      counted: bool `[...]`, False leaves an example out; all count if left out.

    Example:
      >>> confusion_matrix(jnp.array([0, 0, 1]), jnp.array([0, 1, 1]), 2).tolist()
      [[1, 1], [0, 1]]
    """
    counted = jnp.ones(jnp.shape(labels), bool) if counted is None else counted
    return jnp.zeros((num_classes, num_classes), jnp.int32).at[labels, predictions].add(counted.astype(jnp.int32))


def accuracy(confusion: Array) -> Array:
    r"""Returns the share of correct predictions, $\sum_c C_{cc} / \sum_{cd} C_{cd}$; float32 scalar.

    Args:
      confusion: `[N, N]`, labels first.
    """
    return jnp.trace(confusion) / jnp.maximum(confusion.sum(), 1)


def f1(confusion: Array) -> Array:
    r"""Returns the F1 score of class 1, $2 C_{11} / (\sum_c C_{1c} + \sum_c C_{c1})$; float32 scalar, 0 for 0 / 0.

    Args:
      confusion: `[2, 2]`, labels first.
    """
    return _f1_of_classes(confusion)[1]


def macro_f1(confusion: Array) -> Array:
    """Returns the mean of the F1 scores of all N classes; float32 scalar, with 0 for 0 / 0.

    Args:
      confusion: `[N, N]`, labels first.
    """
    return _f1_of_classes(confusion).mean()


def matthews(confusion: Array) -> Array:
    r"""Returns the correlation of labels and predictions; float32 scalar, 0 where either has one class only.

    With the shares $p_{cd} = C_{cd} / n$ and their sums $t_c$ of labels and $q_c$ of predictions,
    $$ \frac{\sum_c p_{cc} - \sum_c t_c q_c}{\sqrt{(1 - \sum_c t_c^2)(1 - \sum_c q_c^2)}}. $$

    Source: Gorodkin, 2004, "Comparing two K-category assignments by a K-category correlation coefficient"; for two
    classes, Matthews, 1975.

    Args:
      confusion: `[N, N]`, labels first.
    """
    shares = _shares(confusion)
    of_labels, of_predictions = shares.sum(1), shares.sum(0)
    variances = (of_labels * (1 - of_labels)).sum() * (of_predictions * (1 - of_predictions)).sum()
    covariance = jnp.trace(shares) - (of_labels * of_predictions).sum()
    one_class = ((confusion.sum(1) > 0).sum() < 2) | ((confusion.sum(0) > 0).sum() < 2)
    return jnp.where(one_class, 0.0, covariance / jnp.sqrt(jnp.where(one_class, 1.0, variances)))


METRICS: dict[Metric, Callable[[Array], Array]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro-f1": macro_f1,
    "matthews": matthews,
}


def _shares(confusion: Array) -> Array:
    return confusion / jnp.maximum(confusion.sum(), 1).astype(jnp.float32)


def _f1_of_classes(confusion: Array) -> Array:
    shares = _shares(confusion)
    total = shares.sum(0) + shares.sum(1)
    return jnp.where(total > 0, 2 * jnp.diagonal(shares) / jnp.where(total > 0, total, 1.0), 0.0)
