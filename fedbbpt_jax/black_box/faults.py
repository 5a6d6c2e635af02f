"""What an API does to its answers before anybody sees them: functions of scores and a key."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Answer = Callable[[Array, Array], Array]
"""`(scores [..., N], key) -> scores as answered [..., N]`, float32."""


def exact() -> Answer:
    """Returns answers as they are.

    >>> exact()(jnp.array([0.26]), jax.random.key(0))
    Array([0.26], dtype=float32)
    """
    return lambda scores, key: scores


def rounded(decimals: int) -> Answer:
    """Returns answers rounded to so many decimals.

    >>> rounded(1)(jnp.array([0.26]), jax.random.key(0))
    Array([0.3], dtype=float32)
    """
    return lambda scores, key: jnp.round(scores, decimals)


def bfloat16() -> Answer:
    """Returns answers that went through bfloat16, with its 8 bits of precision.

    >>> bfloat16()(jnp.array([100.3]), jax.random.key(0))
    Array([100.5], dtype=float32)
    """
    return lambda scores, key: scores.astype(jnp.bfloat16).astype(jnp.float32)


def float16() -> Answer:
    """Returns answers that went through float16, with its 11 bits of precision.

    >>> float16()(jnp.array([100.03]), jax.random.key(0))
    Array([100.], dtype=float32)
    """
    return lambda scores, key: scores.astype(jnp.float16).astype(jnp.float32)


def noisy(deviation: float) -> Answer:
    """Returns answers with independent normal noise on every score, as stochastic serving gives them.

    Raises:
      ValueError: the deviation is negative.

    >>> noisy(0.0)(jnp.array([0.5]), jax.random.key(0))
    Array([0.5], dtype=float32)
    """
    if deviation < 0:
        raise ValueError(f"deviation must not be negative, got {deviation}")
    return lambda scores, key: scores + deviation * jax.random.normal(key, scores.shape)
