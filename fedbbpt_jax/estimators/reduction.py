r"""Wrappers around estimators that reduce their variance, or make them robust; they compose.

Each takes an estimator and gives an estimator. None looks inside: what they need of the directions they rebuild by
asking for the candidates again. Whatever can be said of a gradient alone (Adam, schedules, clipping by norm) is an
optax transformation and comes after the estimator, in `optimizers/descent.py`, or inside it, by `with_transformation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedbbpt_jax.estimators.spsa import ShapeSlopes, check_positive, if_answered, masked_mean
from fedbbpt_jax.types import EstimateInfo, Estimator, Params, PyTree


class WrappedState(NamedTuple):
    """The state of the estimator inside and what the wrapper remembers."""

    inner: PyTree
    memory: PyTree


def with_transformation(estimator: Estimator, tx: optax.GradientTransformation) -> Estimator:
    """Returns the estimator whose estimates are transformed, such as by `optax.trace` for momentum.

    SPSA-GC is `with_transformation(spsa(segmented_uniform(), …), optax.trace(0.9, nesterov=True))`.

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> from fedbbpt_jax.estimators.spsa import spsa
      >>> with_transformation(spsa(rademacher(), 5, 0.1), optax.trace(0.9)).num_candidates
      10
    """

    def estimate(key: Array, state: WrappedState, params: Params, losses: Array, valid: Array):
        gradient, inner, info = estimator.estimate(key, state.inner, params, losses, valid)
        updates, memory = tx.update(gradient, state.memory, params)
        answered = info.num_directions > 0
        updates = jax.tree.map(lambda x: jnp.where(answered, x, 0.0), updates)
        memory = if_answered(answered, memory, state.memory)
        return updates, WrappedState(inner, memory), _renormed(info, updates)

    return _wrapped(estimator, lambda params: tx.init(params), estimate)


def with_control_variate(estimator: Estimator, decay: float = 0.9) -> Estimator:
    r"""Returns the estimator with the linear prediction of past estimates taken out of the losses and put back exactly.

    $$\hat g = h + \mathrm{estimate}(L_k - h^\top(\theta_k - \theta)), \qquad h \leftarrow \beta h + (1-\beta)\hat g$$

    Unbiased whenever the estimator is linear in the losses and exact in the mean on linear functions, because h does
    not depend on the current directions. The variance is that of estimating g - h instead of g.

    Args:
      estimator: linear in the losses, such as `spsa`.
      decay: $\beta$ of the moving average h.

    Raises:
      ValueError: the decay is not in [0, 1).

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> from fedbbpt_jax.estimators.spsa import spsa
      >>> with_control_variate(spsa(rademacher(), 5, 0.1)).num_candidates
      10
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")

    def estimate(key: Array, state: WrappedState, params: Params, losses: Array, valid: Array):
        def predicted(k: Array) -> Array:
            candidate = estimator.perturb(key, state.inner, params, k)
            terms = jax.tree.map(lambda h, c, p: jnp.sum(h * (c - p)), state.memory, candidate, params)
            return sum(jax.tree.leaves(terms), jnp.zeros(()))

        foretold = jax.lax.map(predicted, jnp.arange(estimator.num_candidates))  # [K]
        rest, inner, info = estimator.estimate(key, state.inner, params, losses - foretold[:, None], valid)
        answered = info.num_directions > 0
        gradient = jax.tree.map(lambda h, r: jnp.where(answered, h + r, 0.0), state.memory, rest)
        averaged = jax.tree.map(lambda h, g: decay * h + (1 - decay) * g, state.memory, gradient)
        memory = if_answered(answered, averaged, state.memory)
        info = _renormed(info._replace(loss=masked_mean(losses, valid)), gradient)
        return gradient, WrappedState(inner, memory), info

    return _wrapped(estimator, _zeros, estimate)


class Anchor(NamedTuple):
    """Where the anchor is, the mean of the estimates made there, and of how many (answered) steps; float32."""

    params: Params
    mean: Params
    age: Array


def with_anchor(estimator: Estimator, period: int) -> Estimator:
    r"""Returns the estimator corrected at an anchor point, as SVRG does: $\hat g(\theta) - \hat g(\tilde\theta) + \mu$.

    Both estimates share examples and directions, so that what they have in common cancels; $\mu$ is the mean of the
    anchor's earlier estimates and gets better with every step. The anchor moves to the parameters every `period`
    steps. Twice the evaluations: candidates 0..K-1 are at the parameters, K..2K-1 at the anchor. The loss it tells is
    that at the parameters, over answers whose twin came too.

    Source: Liu et al., 2018, "Zeroth-Order Stochastic Variance Reduction for Nonconvex Optimization"; there μ is
    estimated once, on many examples.

    Args:
      estimator: at each of the two points.
      period: steps between moves of the anchor.

    Raises:
      ValueError: the period is shorter than two steps.

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> from fedbbpt_jax.estimators.spsa import spsa
      >>> with_anchor(spsa(rademacher(), 5, 0.1), period=20).num_candidates
      20
    """
    if period < 2:
        raise ValueError(f"period must be at least 2, got {period}")
    half = estimator.num_candidates

    def init(params: Params) -> Anchor:
        return Anchor(params, _zeros(params), jnp.zeros(()))

    def perturb(key: Array, state: WrappedState, params: Params, k: Array) -> Params:
        centre = jax.tree.map(lambda p, a: jnp.where(k < half, p, a), params, state.memory.params)
        return estimator.perturb(key, state.inner, centre, k % half)

    def estimate(key: Array, state: WrappedState, params: Params, losses: Array, valid: Array):
        anchor: Anchor = state.memory
        both = valid[:half] & valid[half:]  # an answer without its twin would not cancel
        here, inner, info = estimator.estimate(key, state.inner, params, losses[:half], both)
        there, _, _ = estimator.estimate(key, state.inner, anchor.params, losses[half:], both)
        first = anchor.age == 0
        gradient = jax.tree.map(lambda g, a, m: jnp.where(first, g, g - a + m), here, there, anchor.mean)
        answered = info.num_directions > 0
        gradient = jax.tree.map(lambda g: jnp.where(answered, g, 0.0), gradient)
        mean = jax.tree.map(lambda m, a: m + (a - m) / (anchor.age + 1), anchor.mean, there)
        stood = Anchor(anchor.params, mean, anchor.age + 1)
        expired = stood.age >= period
        fresh = init(params)
        after = jax.tree.map(lambda f, s: jnp.where(expired, f, s), fresh, stood)
        return gradient, WrappedState(inner, if_answered(answered, after, anchor)), _renormed(info, gradient)

    return Estimator(lambda params: WrappedState(estimator.init(params), init(params)), perturb, estimate, 2 * half)


def with_averaging(estimator: Estimator, num_repeats: int) -> Estimator:
    """Returns the mean of independent repeats of an estimator, on the same examples, at num_repeats·K evaluations.

    Repeats without a usable answer do not count.

    Raises:
      ValueError: the number is not positive.

    Example:
      >>> from fedbbpt_jax.estimators.structured import hadamard
      >>> from fedbbpt_jax.estimators.spsa import spsa
      >>> with_averaging(spsa(hadamard(), 16, 0.1), 4).num_candidates
      128
    """
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats}")
    size = estimator.num_candidates

    def perturb(key: Array, state: PyTree, params: Params, k: Array) -> Params:
        return estimator.perturb(jax.random.fold_in(key, k // size), state, params, k % size)

    def estimate(key: Array, state: PyTree, params: Params, losses: Array, valid: Array):
        repeats = (jnp.arange(num_repeats), *(x.reshape(num_repeats, size, -1) for x in (losses, valid)))

        def one(row: tuple[Array, Array, Array]):
            i, losses, valid = row
            return estimator.estimate(jax.random.fold_in(key, i), state, params, losses, valid)

        gradients, states, infos = jax.lax.map(one, repeats)
        counted = (infos.num_directions > 0).astype(jnp.float32)
        share = counted / jnp.maximum(counted.sum(), 1)
        gradient = jax.tree.map(lambda g: jnp.tensordot(share, g, 1), gradients)
        info = EstimateInfo(masked_mean(losses, valid), jnp.zeros(()), infos.num_directions.sum())
        return gradient, jax.tree.map(lambda x: x[0], states), _renormed(info, gradient)

    return Estimator(estimator.init, perturb, estimate, num_repeats * size)


def with_shaped_losses(estimator: Estimator, shape: Callable[[Array, Array], Array]) -> Estimator:
    """Returns the estimator on shaped losses, such as `ranks` or `standardised`: scale-free, and biased by design.

    Args:
      estimator: inside.
      shape: `(mean losses [K], answered [K]) -> [K]`.

    Example:
      >>> from fedbbpt_jax.estimators.directions import gaussian
      >>> from fedbbpt_jax.estimators.spsa import spsa
      >>> with_shaped_losses(spsa(gaussian(), 5, 0.1), ranks).num_candidates
      10
    """

    def estimate(key: Array, state: PyTree, params: Params, losses: Array, valid: Array):
        answered = valid.any(axis=1)
        shaped = shape(masked_mean(losses, valid, axis=1), answered)
        gradient, after, info = estimator.estimate(key, state, params, shaped[:, None], answered[:, None])
        return gradient, after, info._replace(loss=masked_mean(losses, valid))

    return estimator._replace(estimate=estimate)


def ranks(losses: Array, answered: Array) -> Array:
    """Returns centred ranks in [-1/2, 1/2] of the answered losses `[K]`; equal losses have equal ranks.

    Source: Wierstra et al., 2014, "Natural Evolution Strategies" (fitness shaping); Salimans et al., 2017.
    """
    inside = jnp.where(answered, losses, jnp.inf)
    below, up_to = (jnp.searchsorted(jnp.sort(inside), inside, side) for side in ("left", "right"))
    others = answered.sum() - 1
    return jnp.where(answered, (below + up_to - 1 - others) / (2.0 * jnp.maximum(others, 1)), 0.0)


def standardised(losses: Array, answered: Array) -> Array:
    """Returns losses `[K]` less their mean, divided by their standard deviation; 0 where they are all equal."""
    centred = jnp.where(answered, losses - masked_mean(losses, answered), 0.0)
    deviation = jnp.sqrt(masked_mean(centred**2, answered))
    # Equal losses are told by comparing them: the rounding of their mean leaves a deviation.
    lowest = jnp.where(answered, losses, jnp.inf).min()
    differ = (deviation > 0) & (lowest < jnp.where(answered, losses, -jnp.inf).max())
    return jnp.where(differ, centred / jnp.where(differ, deviation, 1.0), 0.0)


def clipped(limit: float) -> ShapeSlopes:
    """Returns slopes clipped to [-limit, limit].

    Raises:
      ValueError: the limit is not positive.

    >>> clipped(2.0)(jnp.array([-3.0, 1.0]), jnp.array([True, True]))
    Array([-2.,  1.], dtype=float32)
    """
    check_positive(limit=limit)
    return lambda slopes, usable: jnp.clip(slopes, -limit, limit)


def trimmed(share: float) -> ShapeSlopes:
    """Returns slopes of which the `share` largest in size, among the usable, are set to zero.

    Raises:
      ValueError: the share is not in [0, 1).

    >>> trimmed(0.5)(jnp.array([-3.0, 1.0]), jnp.array([True, True]))
    Array([0., 1.], dtype=float32)
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")

    def shape(slopes: Array, usable: Array) -> Array:
        sizes = jnp.where(usable, jnp.abs(slopes), -jnp.inf)
        place = jnp.argsort(jnp.argsort(-sizes))  # 0 is the largest
        return jnp.where(place < jnp.floor(share * usable.sum()), 0.0, slopes)

    return shape


def _wrapped(estimator: Estimator, remember: Callable[[Params], PyTree], estimate: Callable) -> Estimator:
    """Returns the estimator with the same candidates, a memory, and another estimate."""
    return Estimator(
        lambda params: WrappedState(estimator.init(params), remember(params)),
        lambda key, state, params, k: estimator.perturb(key, state.inner, params, k),
        estimate,
        estimator.num_candidates,
    )


def _zeros(params: Params) -> Params:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def _renormed(info: EstimateInfo, gradient: Params) -> EstimateInfo:
    return info._replace(gradient_norm=optax.tree.norm(gradient))
