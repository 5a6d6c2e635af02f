"""Gradient descent on an estimate: an estimator followed by an optax transformation."""

from __future__ import annotations

from typing import NamedTuple

import optax
from jax import Array

from fedbbpt_jax.estimators.spsa import if_answered
from fedbbpt_jax.types import EstimateInfo, Estimator, Optimizer, Params, PyTree


class DescentState(NamedTuple):
    """Parameters and the states of the estimator and of the transformation."""

    params: Params
    estimator: PyTree
    transformation: optax.OptState


def descent(estimator: Estimator, tx: optax.GradientTransformation) -> Optimizer:
    """Returns the optimizer that applies `tx` to each estimate.

    A step without a single usable answer leaves the numbers of parameters and transformation as they were. It counts as
    a step all the same, so that counters are equal on all clients and need not be sent.

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> from fedbbpt_jax.estimators.spsa import spsa
      >>> optimizer = descent(spsa(rademacher(), 5, 0.05), optax.adam(0.03))
      >>> optimizer.solution(optimizer.init(jnp.zeros(2)))
      Array([0., 0.], dtype=float32)
    """

    def init(params: Params) -> DescentState:
        return DescentState(params, estimator.init(params), tx.init(params))

    def ask(key: Array, state: DescentState, k: Array) -> Params:
        return estimator.perturb(key, state.estimator, state.params, k)

    def tell(key: Array, state: DescentState, losses: Array, valid: Array) -> tuple[DescentState, EstimateInfo]:
        gradient, inner, info = estimator.estimate(key, state.estimator, state.params, losses, valid)
        updates, outer = tx.update(gradient, state.transformation, state.params)
        moved = DescentState(optax.apply_updates(state.params, updates), inner, outer)
        # Estimators look after failed answers themselves: some learn from a step that gives no estimate.
        return if_answered(info.num_directions > 0, moved, state)._replace(estimator=inner), info

    return Optimizer(init, ask, tell, lambda state: state.params, estimator.num_candidates)


def spsa_gc_transformation(
    learning_rate: float = 0.01, *, offset: float = 1.0, decay: float = 0.4, momentum: float = 0.9
) -> optax.GradientTransformation:
    r"""Returns the update rule of SPSA with gradient correction, with BlackVIP's published defaults.

    $$m_t = \beta m_{t-1} + g_t, \quad \theta_{t+1} = \theta_t - a_t (g_t + \beta m_t), \quad
    a_t = a / (t + o)^\alpha, \quad t = 1, 2, \dots$$

    Args:
      learning_rate: a.
      offset: o.
      decay: $\alpha$.
      momentum: $\beta$.

    Source: Oh et al., 2023, "BlackVIP", equations 5-7 and the published code, where t starts at 1 and o = 1.
    """

    def step_size(count):
        return learning_rate / (count + 1.0 + offset) ** decay

    return optax.chain(optax.trace(decay=momentum, nesterov=True), optax.scale_by_learning_rate(step_size))


def spsa_gc_perturbation_size(size: float = 0.01, *, decay: float = 0.1):
    r"""Returns SPSA-GC's schedule $c_t = c / t^\gamma$, t = 1, 2, …

    Source: as `spsa_gc_transformation`.
    """
    return lambda step: size / (step + 1.0) ** decay
