r"""CMA-ES: a normal distribution of candidates that learns from the ranks of their losses how to move and stretch.

$$x_k = m + \sigma\, C^{1/2} z_k, \qquad m \leftarrow m + \sigma \sum_k w_k\, C^{1/2} z_k$$

Two step paths of the mean, added up over generations, tell the step size whether steps cancel (shrink) or align (grow),
and the covariance in which direction they go. Only ranks of losses matter: a loss and its logarithm give the same run.

Differs from the tutorial in four ways.

- The root is the symmetric one, $C^{1/2} = B D B^\top$, where it has $B D$: the same distribution, but a continuous
  function of C. $B D$ is none where eigenvalues are close (C begins as the identity): there one rounding error turns
  its columns, and two devices or two programs with the same key would ask for different candidates.
- Weights are those of the best half; the worse half has none (it has negative ones since 2016). At K = 5 to 20
  candidates in d = 500 parameters $c_\mu$ is about 1e-5, so that they are worth little, and without them C stays
  positive whatever the answers are.
- Equal losses share the mean of their weights, so that no candidate gains from its number.
- A candidate that failed is not ranked: n of K answers are recombined as a generation of n, by the weights of n. One
  answer alone has nothing to be compared with and counts as none. Nothing is imputed.

Equation numbers are those of Hansen, 2016, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, appendix A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from fedbbpt_jax.estimators.spsa import check_positive, estimate_info, if_answered, masked_mean
from fedbbpt_jax.types import EstimateInfo, Optimizer, Params

ZeroRank = Callable[[Array], Array]
"""`number of answers n -> the rank from which on weights are 0`; candidate 1 is the best."""


class CMAState(NamedTuple):
    r"""A normal distribution and its memory.

    Attributes:
      params: m, the mean, as a pytree of d numbers.
      step_size: σ, in units of the parameters.
      covariance: C, `[d, d]`.
      basis: B, eigenvectors of C in columns, `[d, d]`; of an earlier C where C is decomposed lazily.
      scales: D, roots of its eigenvalues, `[d]`.
      step_path: $p_\sigma$, `[d]`.
      covariance_path: $p_c$, `[d]`.
      generation: int32.
    """

    params: Params
    step_size: Array
    covariance: Array
    basis: Array
    scales: Array
    step_path: Array
    covariance_path: Array
    generation: Array


class Rates(NamedTuple):
    r"""What depends on d and the weights alone: $c_\sigma$, $d_\sigma$, $c_c$, $c_1$, $c_\mu$, $E\|N(0, I)\|$, and the
    generations from one decomposition of C to the next."""

    step_path: float
    damping: float
    covariance_path: float
    rank_one: float
    rank_mu: float
    expected_norm: float
    decomposition_gap: int


def cma_es(
    num_candidates: int, initial_step_size: float, *, min_step_size: float = 1e-6, max_condition: float = 1e7
) -> Optimizer:
    """Returns CMA-ES over any pytree of parameters, with all rates at their defaults for d and K.

    The state holds two matrices `[d, d]`; d = 500 is quick, d = 10,000 is too much. C is decomposed once in as many
    generations as it takes to change noticeably (16 for d = 500 and K = 5). In a step's diagnostics the norm is that of
    the mean's move, in units of the parameters.

    Args:
      num_candidates: K; 4 + 3 ln d is usual without noise.
      initial_step_size: σ, about a third of the distance within which a solution is expected.
      min_step_size: σ stays above, in units of the parameters.
      max_condition: candidates are drawn as if no eigenvalue of C was smaller than the largest divided by this; float32
        cannot tell much more.

    Raises:
      ValueError: there are not two candidates to compare, or a size is not positive.

    Example:
      >>> optimizer = cma_es(8, initial_step_size=0.5)
      >>> state = optimizer.init({"shift": jnp.zeros(3)})
      >>> key, ks = jax.random.key(0), jnp.arange(8)
      >>> losses = jax.vmap(lambda k: ((optimizer.ask(key, state, k)["shift"] - 1) ** 2).sum())(ks)[:, None]
      >>> state, info = optimizer.tell(key, state, losses, jnp.ones((8, 1), bool))
      >>> bool(info.loss > ((optimizer.solution(state)["shift"] - 1) ** 2).sum())
      True
    """
    if num_candidates < 2:
        raise ValueError(f"num_candidates must be at least 2, got {num_candidates}")
    check_positive(initial_step_size=initial_step_size, min_step_size=min_step_size, max_condition=max_condition - 1)
    decompose_where_due = _lazily(max_condition)

    def init(params: Params) -> CMAState:
        return initial_distribution(params, initial_step_size)

    def noise(key: Array, state: CMAState, k: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, k), state.scales.shape)  # Eq. (38)

    def ask(key: Array, state: CMAState, k: Array) -> Params:
        mean, unravel = ravel_pytree(state.params)
        return unravel(mean + state.step_size * stretched(state, noise(key, state, k)))  # Eq. (40)

    def tell(key: Array, state: CMAState, losses: Array, valid: Array) -> tuple[CMAState, EstimateInfo]:
        means = masked_mean(losses, valid, axis=1)
        answered = valid.any(axis=1) & jnp.isfinite(means)
        answered &= answered.sum() > 1
        rates = default_rates(state.scales.size, num_candidates)
        weights = recombination_weights(means, answered)
        drawn = jax.vmap(lambda k: noise(key, state, k))(jnp.arange(num_candidates))  # [K, d]
        # C^(-1/2) y = z for own candidates: no inverse is needed.
        told = recombined(state, rates, stretched(state, drawn), weights, weights @ drawn)
        due = told.generation % rates.decomposition_gap == 0
        basis, scales = decompose_where_due(due, told.covariance, told.basis, told.scales)
        told = told._replace(step_size=jnp.maximum(told.step_size, min_step_size), basis=basis, scales=scales)
        move = jax.tree.map(jnp.subtract, told.params, state.params)
        return if_answered(answered.any(), told, state), estimate_info(move, answered, losses, valid)

    return Optimizer(init, ask, tell, lambda state: state.params, num_candidates)


def initial_distribution(params: Params, step_size: float) -> CMAState:
    """Returns the distribution around `params` whose covariance is the identity."""
    dim = ravel_pytree(params)[0].size
    return CMAState(
        params,
        step_size=jnp.asarray(step_size, jnp.float32),
        covariance=jnp.eye(dim),
        basis=jnp.eye(dim),  # not the same array: both may be donated
        scales=jnp.ones(dim),
        step_path=jnp.zeros(dim),
        covariance_path=jnp.zeros(dim),
        generation=jnp.zeros((), jnp.int32),
    )


def best_half(num_answers: Array) -> Array:
    """Returns the rank from which on a candidate is not among the better half, the usual choice. Eq. (49)."""
    return jnp.maximum((num_answers + 1) / 2, 1.5)  # the best has a weight even if it is alone


def every_rank(num_answers: Array) -> Array:
    """Returns a rank past all candidates: the worst have a weight too, though a small one."""
    return num_answers + 0.5


def recombination_weights(losses: Array, answered: Array, zero_rank: ZeroRank = best_half) -> Array:
    r"""Returns weights `[K]` of sum 1, $w_i \propto \max(0, \ln r_0 - \ln i)$ for the candidate of rank i; or all 0.

    Equal losses share the mean of their weights. Who did not answer has none and is not counted.

    Args:
      losses: `[K]`, anything where not answered.
      answered: bool `[K]`.
      zero_rank: $r_0$, of the number of answers.

    Example:
      >>> recombination_weights(jnp.array([3.0, 1.0, 1.0, 9.0, 2.0]), jnp.array([1, 1, 1, 0, 1], bool)).round(3)
      Array([0. , 0.5, 0.5, 0. , 0. ], dtype=float32)
    """
    ranks, num_answers = jnp.arange(1, len(losses) + 1), answered.sum()
    table = jnp.where(ranks <= num_answers, jnp.maximum(jnp.log(zero_rank(num_answers)) - jnp.log(ranks), 0.0), 0.0)
    up_to = jnp.concatenate([jnp.zeros(1), jnp.cumsum(table / jnp.maximum(table.sum(), 1e-9))])  # of the best i
    better = (answered & (losses < losses[:, None])).sum(1)
    equal = (answered & (losses == losses[:, None])).sum(1)
    return jnp.where(answered, (up_to[better + equal] - up_to[better]) / jnp.maximum(equal, 1), 0.0)


def default_rates(dim: int, num_candidates: int, zero_rank: ZeroRank = best_half) -> Rates:
    """Returns the tutorial's default rates; $c_\\mu$ with pycma's 1/4, which matters where few candidates are chosen.

    Args:
      dim: d.
      num_candidates: K.
      zero_rank: as for `recombination_weights`.
    """
    with jax.ensure_compile_time_eval():
        zero = float(zero_rank(jnp.asarray(num_candidates)))
    raw = np.maximum(np.log(zero) - np.log(np.arange(1, num_candidates + 1)), 0)
    chosen = float(raw.sum() ** 2 / (raw**2).sum())  # mu_eff, Eq. (8)
    step_path = (chosen + 2) / (dim + chosen + 5)  # Eq. (55)
    damping = 1 + 2 * max(0.0, ((chosen - 1) / (dim + 1)) ** 0.5 - 1) + step_path  # Eq. (55)
    covariance_path = (4 + chosen / dim) / (dim + 4 + 2 * chosen / dim)  # Eq. (56)
    rank_one = 2 / ((dim + 1.3) ** 2 + chosen)  # Eq. (57)
    rank_mu = min(1 - rank_one, 2 * (0.25 + chosen + 1 / chosen - 2) / ((dim + 2) ** 2 + chosen))  # Eq. (58)
    expected_norm = dim**0.5 * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))
    gap = max(1, int(1 / (10 * dim * (rank_one + rank_mu))))  # appendix B.2
    return Rates(step_path, damping, covariance_path, rank_one, rank_mu, expected_norm, gap)


def stretched(state: CMAState, noise: Array) -> Array:
    r"""Returns $C^{1/2} z$, `[..., d]`, of noise `[..., d]`. Eq. (39), with the symmetric root."""
    with jax.default_matmul_precision("highest"):
        return (noise @ state.basis * state.scales) @ state.basis.T


def whitened(state: CMAState, steps: Array) -> Array:
    r"""Returns $C^{-1/2} y$, `[..., d]`, of steps `[..., d]`."""
    with jax.default_matmul_precision("highest"):
        return (steps @ state.basis / state.scales) @ state.basis.T


def recombined(state: CMAState, rates: Rates, steps: Array, weights: Array, whitened_step: Array) -> CMAState:
    r"""Returns the distribution after one generation, its basis as it was and its step size without a limit.

    Args:
      state: before.
      rates: of d and K.
      steps: $y_k = (x_k - m) / \sigma$, `[K, d]`.
      weights: `[K]`, not negative, of sum 1.
      whitened_step: $C^{-1/2} \sum_k w_k y_k$, `[d]`.
    """
    mean, unravel = ravel_pytree(state.params)
    chosen = 1 / jnp.maximum((weights**2).sum(), 1e-9)  # mu_eff of these weights, so that paths stay normal, Eq. (8)
    c_path, c_c, c_1, c_mu = rates.step_path, rates.covariance_path, rates.rank_one, rates.rank_mu
    with jax.default_matmul_precision("highest"):
        step, spread = weights @ steps, (weights[:, None] * steps).T @ steps  # Eq. (41)

    step_path = (1 - c_path) * state.step_path + jnp.sqrt(c_path * (2 - c_path) * chosen) * whitened_step  # Eq. (43)
    length, generation = jnp.linalg.norm(step_path), state.generation + 1
    growth = jnp.exp(c_path / rates.damping * (length / rates.expected_norm - 1))  # Eq. (44)

    # Very long paths come of a step size that is too small, not of the covariance: that is held back.
    usual = length / jnp.sqrt(1 - (1 - c_path) ** (2 * generation)) / rates.expected_norm
    going = (usual < 1.4 + 2 / (mean.size + 1)).astype(jnp.float32)
    covariance_path = (1 - c_c) * state.covariance_path + going * jnp.sqrt(c_c * (2 - c_c) * chosen) * step  # Eq. (45)
    kept = 1 - c_1 * (1 - (1 - going) * c_c * (2 - c_c)) - c_mu * weights.sum()
    covariance = kept * state.covariance + c_1 * jnp.outer(covariance_path, covariance_path) + c_mu * spread  # Eq. (47)
    return state._replace(
        params=unravel(mean + state.step_size * step),  # Eq. (42), c_m = 1
        step_size=state.step_size * growth,
        covariance=covariance,
        step_path=step_path,
        covariance_path=covariance_path,
        generation=generation,
    )


def decomposed(covariance: Array, max_condition: float) -> tuple[Array, Array]:
    """Returns eigenvectors in columns `[d, d]` and roots of eigenvalues `[d]`, these at least 1/√max_condition of the
    largest."""
    values, basis = jnp.linalg.eigh(covariance)  # of its symmetric part
    return basis, jnp.sqrt(jnp.maximum(values, values[-1] / max_condition))


def _lazily(max_condition: float) -> Callable[[Array, Array, Array, Array], tuple[Array, Array]]:
    """Returns `(due, covariance, basis, scales) -> basis, scales` that decomposes nothing where none is due.

    Mapped over clients a plain `lax.cond` would decompose for all of them in every generation. Here the rows of all
    maps come together in one batch, and that is decomposed where any row is due, each row taking its own if it is.
    """

    @jax.custom_batching.custom_vmap
    def rows(due: Array, covariance: Array, basis: Array, scales: Array) -> tuple[Array, Array]:
        def anew() -> tuple[Array, Array]:
            new_basis, new_scales = jax.vmap(lambda c: decomposed(c, max_condition))(covariance)
            return jnp.where(due[:, None, None], new_basis, basis), jnp.where(due[:, None], new_scales, scales)

        return jax.lax.cond(due.any(), anew, lambda: (basis, scales))

    @rows.def_vmap
    def _(size: int, batched: list[bool], *arrays: Array):
        spread = [x if is_batched else jnp.stack([x] * size) for x, is_batched in zip(arrays, batched, strict=True)]
        together = rows(*(x.reshape(-1, *x.shape[2:]) for x in spread))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in together), (True, True)

    def decompose_where_due(due: Array, covariance: Array, basis: Array, scales: Array) -> tuple[Array, Array]:
        new_basis, new_scales = rows(due[None], covariance[None], basis[None], scales[None])
        return new_basis[0], new_scales[0]

    return decompose_where_due
