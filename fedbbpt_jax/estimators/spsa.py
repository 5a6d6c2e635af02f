r"""Simultaneous perturbation stochastic approximation, two-sided and one-sided, averaged over directions.

Both sides of a difference see the same examples, losses are differenced per example in float32, and a failed answer
drops its example from that direction: nothing is imputed.

Source: Spall, 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedbbpt_jax.estimators.directions import Directions
from fedbbpt_jax.types import EstimateInfo, Estimator, Params, ScalarOrSchedule


class SpsaState(NamedTuple):
    """Steps taken, int32, for the schedule of the perturbation size."""

    step: Array


def spsa(directions: Directions, num_directions: int, perturbation_size: ScalarOrSchedule) -> Estimator:
    r"""Returns the two-sided estimator, of bias $O(c^2)$, at K = 2q evaluations.

    $$\hat g = \frac1q \sum_j \frac{L(\theta + c\Delta_j) - L(\theta - c\Delta_j)}{2c}\, \bar\Delta_j$$

    Candidates 2j and 2j + 1 are the two sides of direction j.

    Args:
      directions: the distribution of $\Delta$ and its dual.
      num_directions: q.
      perturbation_size: c, in units of the parameters; a number or a schedule of the step.

    Raises:
      ValueError: a size is not positive.

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> spsa(rademacher(), num_directions=5, perturbation_size=0.05).num_candidates
      10
    """
    _check_positive(num_directions=num_directions, perturbation_size=perturbation_size)

    def perturb(key: Array, state: SpsaState, params: Params, k: Array) -> Params:
        c = _at(perturbation_size, state.step) * (1 - 2 * (k % 2))
        direction = directions.sample(jax.random.fold_in(key, k // 2), params)
        return jax.tree.map(lambda p, x: p + c * x, params, direction)

    def estimate(key: Array, state: SpsaState, params: Params, losses: Array, valid: Array):
        answered = valid[0::2] & valid[1::2]  # [q, B]
        difference = (losses[0::2] - losses[1::2]) / (2 * _at(perturbation_size, state.step))
        return _combine(directions, key, state, params, difference, answered, losses, valid)

    return Estimator(_init, perturb, estimate, 2 * num_directions)


def one_sided_spsa(directions: Directions, num_directions: int, perturbation_size: ScalarOrSchedule) -> Estimator:
    r"""Returns the one-sided estimator with a shared base point, of bias $O(c)$, at K = q + 1 evaluations.

    $$\hat g = \frac1q \sum_j \frac{L(\theta + c\Delta_j) - L(\theta)}{c}\, \bar\Delta_j$$

    Candidate 0 is the base point. With exact losses and a small c it has the variance of the two-sided estimator for
    nearly half of its evaluations; with rounded answers, which want a large c, the two-sided one is better.

    Args:
      directions: the distribution of $\Delta$ and its dual.
      num_directions: q.
      perturbation_size: c, in units of the parameters; a number or a schedule of the step.

    Raises:
      ValueError: a size is not positive.

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> one_sided_spsa(rademacher(), num_directions=9, perturbation_size=0.05).num_candidates
      10
    """
    _check_positive(num_directions=num_directions, perturbation_size=perturbation_size)

    def perturb(key: Array, state: SpsaState, params: Params, k: Array) -> Params:
        c = _at(perturbation_size, state.step) * (k > 0)
        direction = directions.sample(jax.random.fold_in(key, jnp.maximum(k - 1, 0)), params)
        return jax.tree.map(lambda p, x: p + c * x, params, direction)

    def estimate(key: Array, state: SpsaState, params: Params, losses: Array, valid: Array):
        answered = valid[1:] & valid[:1]  # [q, B]
        difference = (losses[1:] - losses[:1]) / _at(perturbation_size, state.step)
        return _combine(directions, key, state, params, difference, answered, losses, valid)

    return Estimator(_init, perturb, estimate, num_directions + 1)


def _init(params: Params) -> SpsaState:
    del params
    return SpsaState(step=jnp.zeros((), jnp.int32))


def _combine(
    directions: Directions,
    key: Array,
    state: SpsaState,
    params: Params,
    difference: Array,
    answered: Array,
    losses: Array,
    valid: Array,
) -> tuple[Params, SpsaState, EstimateInfo]:
    """Returns the mean over directions of slope times dual, from differences per example `[q, B]`."""
    slopes = _masked_mean(difference, answered, axis=1)  # [q]
    usable = answered.any(axis=1)
    weights = slopes / jnp.maximum(usable.sum(), 1)  # unusable directions have slope 0

    def add(total: Params, row: tuple[Array, Array]) -> tuple[Params, None]:
        j, weight = row
        dual = directions.dual(directions.sample(jax.random.fold_in(key, j), params))
        return jax.tree.map(lambda t, x: t + weight * x, total, dual), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    gradient, _ = jax.lax.scan(add, zeros, (jnp.arange(len(slopes)), weights))
    info = EstimateInfo(_masked_mean(losses, valid), optax.tree.norm(gradient), usable.sum())
    return gradient, SpsaState(state.step + 1), info


def _masked_mean(values: Array, mask: Array, axis: int | None = None) -> Array:
    """Returns the mean of `values` where `mask`, 0 where nothing is."""
    return jnp.where(mask, values, 0.0).sum(axis) / jnp.maximum(mask.sum(axis), 1)


def _at(value: ScalarOrSchedule, step: Array) -> Array:
    return jnp.asarray(value(step) if callable(value) else value, jnp.float32)


def _check_positive(**sizes: ScalarOrSchedule) -> None:
    for name, value in sizes.items():
        if not callable(value) and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
