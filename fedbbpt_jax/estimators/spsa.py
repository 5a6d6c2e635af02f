r"""Simultaneous perturbation: slopes along random directions, averaged into a gradient.

Both points of a difference see the same examples, losses are differenced per example in float32, and a failed answer
drops its example from that direction: nothing is imputed.

Source: Spall, 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedbbpt_jax.estimators.directions import Directions
from fedbbpt_jax.types import EstimateInfo, Estimator, Params, PyTree, ScalarOrSchedule

ShapeSlopes = Callable[[Array, Array], Array]
"""`(slopes [q], usable [q]) -> slopes [q]`, such as `clipped` of `estimators/reduction.py`."""


class SpsaState(NamedTuple):
    """Steps taken, int32, for the schedule of the perturbation size."""

    step: Array


def spsa(
    directions: Directions,
    num_directions: int,
    perturbation_size: ScalarOrSchedule,
    shape_slopes: ShapeSlopes = lambda slopes, usable: slopes,
) -> Estimator:
    r"""Returns the two-sided estimator, of bias $O(c^2)$, at K = 2q evaluations.

    $$\hat g = \frac1q \sum_j \frac{L(\theta + c\Delta_j) - L(\theta - c\Delta_j)}{2c}\, \bar\Delta_j$$

    Candidates 2j and 2j + 1 are the two sides of direction j, an antithetic pair.

    Args:
      directions: the family of $\Delta$ and its dual.
      num_directions: q.
      perturbation_size: c, in units of the parameters; a number or a schedule of the step.
      shape_slopes: what is done to the slopes before they meet the duals; nothing if left out.

    Raises:
      ValueError: a size is not positive.

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> spsa(rademacher(), num_directions=5, perturbation_size=0.05).num_candidates
      10
    """
    check_positive(num_directions=num_directions, perturbation_size=perturbation_size)

    def perturb(key: Array, state: SpsaState, params: Params, k: Array) -> Params:
        c = at_step(perturbation_size, state.step) * (1 - 2 * (k % 2))
        return moved(params, c, directions.sample(key, k // 2, params))

    def estimate(key: Array, state: SpsaState, params: Params, losses: Array, valid: Array):
        answered = valid[0::2] & valid[1::2]  # [q, B]
        difference = (losses[0::2] - losses[1::2]) / (2 * at_step(perturbation_size, state.step))
        slopes, usable = shaped_slopes(difference, answered, shape_slopes)
        gradient = combine(directions, key, params, slopes, usable)
        return gradient, SpsaState(state.step + 1), estimate_info(gradient, usable, losses, valid)

    return Estimator(_init, perturb, estimate, 2 * num_directions)


def one_sided_spsa(
    directions: Directions,
    num_directions: int,
    perturbation_size: ScalarOrSchedule,
    shape_slopes: ShapeSlopes = lambda slopes, usable: slopes,
) -> Estimator:
    r"""Returns the one-sided estimator with a shared base point, of bias $O(c)$, at K = q + 1 evaluations.

    $$\hat g = \frac1q \sum_j \frac{L(\theta + c\Delta_j) - L(\theta)}{c}\, \bar\Delta_j$$

    Candidate 0 is the base point. With exact losses and a small c it has the variance of the two-sided estimator for
    nearly half of its evaluations; with rounded answers, which want a large c, the two-sided one is better.

    Args:
      directions: the family of $\Delta$ and its dual.
      num_directions: q.
      perturbation_size: c, in units of the parameters; a number or a schedule of the step.
      shape_slopes: what is done to the slopes before they meet the duals; nothing if left out.

    Raises:
      ValueError: a size is not positive.

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> one_sided_spsa(rademacher(), num_directions=9, perturbation_size=0.05).num_candidates
      10
    """
    check_positive(num_directions=num_directions, perturbation_size=perturbation_size)

    def perturb(key: Array, state: SpsaState, params: Params, k: Array) -> Params:
        c = at_step(perturbation_size, state.step) * (k > 0)
        return moved(params, c, directions.sample(key, jnp.maximum(k - 1, 0), params))

    def estimate(key: Array, state: SpsaState, params: Params, losses: Array, valid: Array):
        answered = valid[1:] & valid[:1]  # [q, B]
        difference = (losses[1:] - losses[:1]) / at_step(perturbation_size, state.step)
        slopes, usable = shaped_slopes(difference, answered, shape_slopes)
        gradient = combine(directions, key, params, slopes, usable)
        return gradient, SpsaState(state.step + 1), estimate_info(gradient, usable, losses, valid)

    return Estimator(_init, perturb, estimate, num_directions + 1)


class ResidualState(NamedTuple):
    """Steps taken, int32, and the mean loss of each direction's last point `[q]`, with whether there was one, bool."""

    step: Array
    last: Array
    known: Array


def residual_feedback(directions: Directions, num_directions: int, perturbation_size: ScalarOrSchedule) -> Estimator:
    r"""Returns the one-point estimator with residual feedback, of bias $O(c^2)$, at K = q evaluations.

    $$\hat g_t = \frac1q \sum_j \frac{L_t(\theta_t + c\Delta_{t,j}) - L_{t-1}(\theta_{t-1} + c\Delta_{t-1,j})}{c}\,
    \bar\Delta_{t,j}$$

    Each point is asked once and serves twice. The price: the two losses of a difference come from other examples and
    other parameters, so their noise does not cancel. The first step has nothing to compare with and estimates zero; a
    point without an answer is compared with the last that had one.

    Source: Zhang et al., 2022, "A new one-point residual-feedback oracle for black-box learning and control",
    equation 3.

    Args:
      directions: the family of $\Delta$ and its dual.
      num_directions: q.
      perturbation_size: c, in units of the parameters; a number or a schedule of the step.

    Raises:
      ValueError: a size is not positive.

    Example:
      >>> from fedbbpt_jax.estimators.directions import gaussian
      >>> residual_feedback(gaussian(), num_directions=10, perturbation_size=0.05).num_candidates
      10
    """
    check_positive(num_directions=num_directions, perturbation_size=perturbation_size)

    def init(params: Params) -> ResidualState:
        del params
        return ResidualState(jnp.zeros((), jnp.int32), jnp.zeros(num_directions), jnp.zeros(num_directions, bool))

    def perturb(key: Array, state: ResidualState, params: Params, k: Array) -> Params:
        return moved(params, at_step(perturbation_size, state.step), directions.sample(key, k, params))

    def estimate(key: Array, state: ResidualState, params: Params, losses: Array, valid: Array):
        means, answered = masked_mean(losses, valid, axis=1), valid.any(axis=1)  # [q]
        usable = answered & state.known
        slopes = jnp.where(usable, (means - state.last) / at_step(perturbation_size, state.step), 0.0)
        gradient = combine(directions, key, params, slopes, usable)
        after = ResidualState(state.step + 1, jnp.where(answered, means, state.last), state.known | answered)
        return gradient, after, estimate_info(gradient, usable, losses, valid)

    return Estimator(init, perturb, estimate, num_directions)


def moved(params: Params, c: Array, direction: Params) -> Params:
    """Returns params + c·direction."""
    return jax.tree.map(lambda p, x: p + c * x, params, direction)


def shaped_slopes(difference: Array, answered: Array, shape_slopes: ShapeSlopes) -> tuple[Array, Array]:
    """Returns slopes `[q]` and which are usable `[q]`, from differences per example `[q, B]` and their validity."""
    usable = answered.any(axis=1)
    return shape_slopes(masked_mean(difference, answered, axis=1), usable), usable


def combine(directions: Directions, key: Array, params: Params, slopes: Array, usable: Array) -> Params:
    """Returns the mean of slope times dual over the usable directions; zero if there is none."""
    weights = jnp.where(usable, slopes, 0.0) / jnp.maximum(usable.sum(), 1)

    def add(total: Params, row: tuple[Array, Array]) -> tuple[Params, None]:
        j, weight = row
        dual = directions.dual(directions.sample(key, j, params))
        return jax.tree.map(lambda t, x: t + weight * x, total, dual), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)  # varies over devices as they do
    return jax.lax.scan(add, zeros, (jnp.arange(len(slopes)), weights))[0]


def estimate_info(gradient: PyTree, usable: Array, losses: Array, valid: Array) -> EstimateInfo:
    """Returns what a researcher wants to see of an estimate."""
    return EstimateInfo(masked_mean(losses, valid), optax.tree.norm(gradient), usable.sum())


def if_answered(answered: Array, new: PyTree, old: PyTree) -> PyTree:
    """Returns the new numbers if there was an answer, else the old ones. Integers count on: they are counters."""

    def choose(new: Array, old: Array) -> Array:
        return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(answered, new, old)

    return jax.tree.map(choose, new, old)


def masked_mean(values: Array, mask: Array, axis: int | None = None) -> Array:
    """Returns the mean of `values` where `mask`, 0 where nothing is."""
    return jnp.where(mask, values, 0.0).sum(axis) / jnp.maximum(mask.sum(axis), 1)


def at_step(value: ScalarOrSchedule, step: Array) -> Array:
    """Returns a number, or a schedule's value at `step`, in float32."""
    return jnp.asarray(value(step) if callable(value) else value, jnp.float32)


def check_positive(**sizes: ScalarOrSchedule) -> None:
    """Raises `ValueError` for a size that is not positive; schedules and traced sizes are not looked into."""
    for name, value in sizes.items():
        if not callable(value) and not isinstance(value, Array) and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _init(params: Params) -> SpsaState:
    del params
    return SpsaState(step=jnp.zeros((), jnp.int32))
