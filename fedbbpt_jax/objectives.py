"""Scores and labels to per-example losses. They belong to the client, so labels never leave it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(scores: Array, labels: Array) -> Array:
    r"""Returns $-\log \mathrm{softmax}(s)_y$ in nats, float32 `[...]`.

    Args:
      scores: `[..., N]`, unnormalised or log-probabilities.
      labels: int32 `[...]`.

    Example:
      >>> cross_entropy(jnp.zeros(4), jnp.array(1)).round(3)
      Array(1.386, dtype=float32)
    """
    log_probabilities = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
