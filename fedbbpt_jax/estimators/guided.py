r"""Guided directions: partly within the span of past estimates, partly anywhere.

Source: Maheswaranathan et al., 2019, "Guided evolutionary strategies: augmenting random search with surrogate
gradients".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fedbbpt_jax.estimators.directions import Directions, itself
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.estimators.structured import orthonormal
from fedbbpt_jax.types import Estimator, Params, PyTree, ScalarOrSchedule


class GuidedState(NamedTuple):
    """The state of the two-sided estimator, the last estimates `[history, d]`, newest first, and their number.

    All may be averaged over clients, a basis of the estimates' span could not: it is made on use.
    """

    inner: PyTree
    past: Array
    known: Array


def guided_spsa(
    num_directions: int, perturbation_size: ScalarOrSchedule, *, history: int = 4, share: float = 0.5
) -> Estimator:
    r"""Returns the two-sided estimator along directions that lean towards the last estimates, at K = 2q.

    $$\Delta = \sqrt{1 - s}\, z + \sqrt{s\, d / r}\, U z', \qquad z \in R^d,\; z' \in R^r \text{ normal}$$

    U is an orthonormal basis of the last r estimates. $E[\Delta\Delta^\top] = (1-s) I + (s d/r) U U^\top$: the estimate
    is biased towards the past by design, a descent direction in the mean, of less variance where the gradient changes
    slowly. Until r estimates are known it is the estimator with normal directions.

    Args:
      num_directions: q.
      perturbation_size: c, in units of the parameters; a number or a schedule of the step.
      history: r, at most d.
      share: s, in [0, 1).

    Raises:
      ValueError: a size is out of range.

    Example:
      >>> estimator = guided_spsa(num_directions=5, perturbation_size=0.1)
      >>> estimator.init(jnp.zeros(20)).past.shape
      (4, 20)
    """
    if history < 1 or not 0 <= share < 1:
        raise ValueError(f"expected history of at least 1 and share in [0, 1), got {history} and {share}")

    def inner(past: Array, share: Array | float) -> Estimator:
        return spsa(_guided(orthonormal(past), share), num_directions, perturbation_size)

    def at(state: GuidedState) -> Estimator:
        return inner(state.past, jnp.where(state.known >= history, share, 0.0))

    def init(params: Params) -> GuidedState:
        size = ravel_pytree(params)[0].size
        if history > size:
            raise ValueError(f"history must be at most the number of parameters {size}, got {history}")
        past = jnp.zeros((history, size))
        return GuidedState(inner(past, 0.0).init(params), past, jnp.zeros(()))

    def perturb(key: Array, state: GuidedState, params: Params, k: Array) -> Params:
        return at(state).perturb(key, state.inner, params, k)

    def estimate(key: Array, state: GuidedState, params: Params, losses: Array, valid: Array):
        gradient, after, info = at(state).estimate(key, state.inner, params, losses, valid)
        answered = info.num_directions > 0
        past = jnp.concatenate([ravel_pytree(gradient)[0][None], state.past[:-1]])
        return gradient, GuidedState(after, jnp.where(answered, past, state.past), state.known + answered), info

    return Estimator(init, perturb, estimate, inner(jnp.zeros((1, 1)), 0.0).num_candidates)


def _guided(basis: Array, share: Array | float) -> Directions:
    """Returns normal directions of which `share` of the variance lies in the span of `basis` `[r, d]`."""

    def sample(key: Array, j: Array | int, like: Params) -> Params:
        flat, unravel = ravel_pytree(like)
        everywhere_key, within_key = jax.random.split(jax.random.fold_in(key, j))
        everywhere = jax.random.normal(everywhere_key, flat.shape)
        within = jax.random.normal(within_key, basis.shape[:1]) @ basis * jnp.sqrt(flat.size / basis.shape[0])
        return unravel((jnp.sqrt(1 - share) * everywhere + jnp.sqrt(share) * within).astype(jnp.float32))

    return Directions(sample, itself, variance=lambda d, q: float("nan"))
