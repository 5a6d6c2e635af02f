r"""Random directions $\Delta$ on any pytree, rebuilt from a key.

A zeroth-order estimate along $\Delta$ is slope times a *dual* vector $\bar\Delta$ with
$E[\bar\Delta \Delta^\top] = I$: the elementwise inverse in simultaneous perturbation (Spall, 1992).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fedbbpt_jax.types import Params


class Directions(NamedTuple):
    """A distribution of directions.

    Attributes:
      sample: `(key, like) -> direction`, a float32 pytree shaped as `like`.
      dual: `direction -> dual`, with E[dual directionᵀ] = I.
    """

    sample: Callable[[Array, Params], Params]
    dual: Callable[[Params], Params]


def rademacher() -> Directions:
    """Returns independent signs, the distribution of least variance for simultaneous perturbation.

    32 signs are unpacked from each random word, lowest bit first (another stream than `jax.random.rademacher`).
    Second moment of the estimate with q directions: (1 + (d - 1)/q)·‖g‖².

    Source: Spall, 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient
    approximation".

    Example:
      >>> bool((abs(rademacher().sample(jax.random.key(0), jnp.zeros((3, 5)))) == 1).all())
      True
    """

    def sample(key: Array, like: Params) -> Params:
        flat, unravel = ravel_pytree(like)
        words = jax.random.bits(key, (-(-flat.size // 32),), jnp.uint32)
        bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [words, 32]
        return unravel(2.0 * bits.reshape(-1)[: flat.size].astype(jnp.float32) - 1.0)

    return Directions(sample, dual=lambda direction: direction)


def segmented_uniform() -> Directions:
    """Returns BlackVIP's directions: magnitude uniform in [0.5, 1], random sign, each number independent.

    The dual is the elementwise inverse. Second moment of the estimate: (1 + (7/6)(d - 1)/q)·‖g‖², a sixth more
    variance than signs.

    Source: Oh et al., 2023, "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", section 4.2.
    """

    def sample(key: Array, like: Params) -> Params:
        flat, unravel = ravel_pytree(like)
        # One uniform draw in [-0.5, 0.5) gives sign and magnitude: its absolute value is uniform in [0, 0.5].
        draw = jax.random.uniform(key, flat.shape, jnp.float32, -0.5, 0.5)
        return unravel(jnp.where(draw < 0, draw - 0.5, draw + 0.5))

    return Directions(sample, dual=lambda direction: jax.tree.map(lambda x: 1.0 / x, direction))
