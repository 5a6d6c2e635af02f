"""A gradient estimator of your own, whole: directions with heavy tails, two-sided.

    cd experiments && fedbbpt variance --task quadratic --estimators spsa,own_estimator:laplace_spsa

An estimator is three functions and the number of its candidates (`fedbbpt_jax.Estimator`): what it remembers, where it
asks, and what it makes of the losses. Candidate k is a function of key, state and k, so that nothing is stored.
`fedbbpt run --estimator own_estimator:laplace_spsa` tunes prompts with it. To become part of the package it needs a row
in `fedbbpt_jax/estimators/catalogue.py` and a line in the contract test.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fedbbpt_jax import EstimateInfo, Estimator


def laplace_spsa(num_directions: int, perturbation_size: float) -> Estimator:
    """Returns the two-sided estimator along independent Laplace numbers of variance 1, at K = 2q."""

    def direction(key: Array, j: Array, size: int) -> Array:
        return jax.random.laplace(jax.random.fold_in(key, j), (size,)) / jnp.sqrt(2.0)

    def init(params):
        return ()

    def perturb(key, state, params, k):
        flat, unravel = ravel_pytree(params)
        side = perturbation_size * (1 - 2 * (k % 2))
        return unravel(flat + side * direction(key, k // 2, flat.size))

    def estimate(key, state, params, losses, valid):
        flat, unravel = ravel_pytree(params)
        both = valid[0::2] & valid[1::2]  # [q, B]: a failed answer drops its pair
        slopes = jnp.where(both, losses[0::2] - losses[1::2], 0.0) / (2 * perturbation_size)
        means = slopes.sum(1) / jnp.maximum(both.sum(1), 1)
        usable = both.any(1)
        directions = jax.vmap(lambda j: direction(key, j, flat.size))(jnp.arange(num_directions))
        gradient = means @ directions / jnp.maximum(usable.sum(), 1)
        loss = jnp.where(valid, losses, 0.0).sum() / jnp.maximum(valid.sum(), 1)
        return unravel(gradient), state, EstimateInfo(loss, jnp.linalg.norm(gradient), usable.sum())

    return Estimator(init, perturb, estimate, 2 * num_directions)
