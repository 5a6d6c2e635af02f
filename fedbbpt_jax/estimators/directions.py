r"""Random directions $\Delta$ on any pytree, rebuilt from a key in any order.

A zeroth-order estimate along $\Delta$ is slope times a *dual* vector $\bar\Delta$ with
$E[\bar\Delta \Delta^\top] = I$: the elementwise inverse in simultaneous perturbation (Spall, 1992), the direction
itself where its numbers have variance 1.

On a linear function, where slopes are exact, q independent directions give $E\|\hat g - g\|^2 = (m - 1)/q\,\|g\|^2$
with the second moment of one, $m = E\|\bar\Delta \Delta^\top g\|^2 / \|g\|^2$. For independent symmetric numbers
$m = E[\bar\delta^2\delta^2] + E[\bar\delta^2]E[\delta^2](d - 1)$. Directions that know of each other, in
`estimators/structured.py`, do better.
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
    """A family of directions.

    Attributes:
      sample: `(key, j, like) -> direction j`, a float32 pytree shaped as `like`.
      dual: `direction -> dual`, with E[dual directionᵀ] = I.
      variance: `(d, q) -> E‖ĝ - g‖²/‖g‖²` of the mean over directions 0..q-1 on a linear function of d numbers.
    """

    sample: Callable[[Array, Array | int, Params], Params]
    dual: Callable[[Params], Params]
    variance: Callable[[int, int], float]


def rademacher() -> Directions:
    """Returns independent signs, the distribution of least variance for simultaneous perturbation: (d - 1)/q.

    32 signs are unpacked from each random word, lowest bit first (another stream than `jax.random.rademacher`).

    Source: Spall, 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient
    approximation".

    Example:
      >>> bool((abs(rademacher().sample(jax.random.key(0), 0, jnp.zeros((3, 5)))) == 1).all())
      True
    """
    return independent(random_signs, second_moment=lambda d: d)


def gaussian() -> Directions:
    """Returns independent standard normal numbers; variance (d + 1)/q.

    Source: Nesterov and Spokoiny, 2017, "Random Gradient-Free Minimization of Convex Functions".

    Example:
      >>> gaussian().variance(192, 1)
      193.0
    """
    return independent(lambda key, d: jax.random.normal(key, (d,), jnp.float32), second_moment=lambda d: d + 2)


def sphere() -> Directions:
    """Returns directions uniform on the sphere of radius √d; variance (d - 1)/q.

    Source: Flaxman et al., 2005, "Online convex optimization in the bandit setting".

    Example:
      >>> sphere().variance(192, 1)
      191.0
    """

    def draw(key: Array, d: int) -> Array:
        normal = jax.random.normal(key, (d,), jnp.float32)
        return normal * (jnp.sqrt(d) / jnp.linalg.norm(normal))

    return independent(draw, second_moment=lambda d: d)


def segmented_uniform() -> Directions:
    """Returns BlackVIP's directions: magnitude uniform in [0.5, 1], random sign, each number independent.

    The dual is the elementwise inverse; variance (7/6)(d - 1)/q, a sixth more than signs: E[δ²]E[1/δ²] = 7/12 · 2.

    Source: Oh et al., 2023, "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", section 4.2.

    Example:
      >>> round(segmented_uniform().variance(7, 1), 6)
      7.0
    """
    inverse = lambda direction: jax.tree.map(lambda x: 1.0 / x, direction)  # noqa: E731
    return independent(_segmented, second_moment=lambda d: 1 + 7 / 6 * (d - 1), dual=inverse)


def segmented_uniform_projection() -> Directions:
    """Returns BlackVIP's directions with the plain projection for a dual, δ/E[δ²], instead of the inverse.

    Variance (d - 1 + 93/245)/q: without the inverse the excess of a sixth is gone; E[δ⁴]/E[δ²]² = 31/80 · 144/49.

    Example:
      >>> segmented_uniform_projection().variance(1000, 1) < segmented_uniform().variance(1000, 1)
      True
    """
    fourth, second = 31 / 80, 7 / 12
    projected = lambda direction: jax.tree.map(lambda x: x / second, direction)  # noqa: E731
    return independent(_segmented, second_moment=lambda d: fourth / second**2 + d - 1, dual=projected)


def coordinate() -> Directions:
    """Returns ±√d times a random axis; variance (d - 1)/q. Of use where few numbers carry the gradient's meaning.

    Example:
      >>> int((coordinate().sample(jax.random.key(0), 0, jnp.zeros(9)) != 0).sum())
      1
    """

    def draw(key: Array, d: int) -> Array:
        place = jax.random.randint(key, (), 0, 2 * d)  # axis and sign at once
        size = jnp.where(place < d, 1.0, -1.0) * jnp.sqrt(d)
        return jnp.where(jnp.arange(d) == place % d, size, 0.0).astype(jnp.float32)

    return independent(draw, second_moment=lambda d: d)


def sparse(density: float) -> Directions:
    """Returns random signs on a random part of the numbers, scaled to variance 1; variance (d - 2 + 1/density)/q.

    Args:
      density: the expected part of the numbers that move, in (0, 1].

    Raises:
      ValueError: the density is out of range.

    Example:
      >>> sparse(0.25).variance(10, 1)
      12.0
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")

    def draw(key: Array, d: int) -> Array:
        sign_key, mask_key = jax.random.split(key)
        moves = jax.random.bernoulli(mask_key, density, (d,))
        return jnp.where(moves, random_signs(sign_key, d) / jnp.sqrt(density), 0.0)

    return independent(draw, second_moment=lambda d: 1 / density + d - 1)


def itself(direction: Params) -> Params:
    """Returns the direction: the dual where its numbers are uncorrelated and of variance 1."""
    return direction


def independent(
    draw: Callable[[Array, int], Array],
    second_moment: Callable[[int], float],
    dual: Callable[[Params], Params] = itself,
) -> Directions:
    """Returns the family whose direction j is drawn by key `fold_in(key, j)`, without regard to the others.

    Args:
      draw: `(key, d) -> [d]`, float32.
      second_moment: `d -> E‖dual directionᵀ g‖²/‖g‖²`, the m above.
      dual: of a direction.
    """

    def sample(key: Array, j: Array | int, like: Params) -> Params:
        flat, unravel = ravel_pytree(like)
        return unravel(draw(jax.random.fold_in(key, j), flat.size))

    return Directions(sample, dual, variance=lambda d, q: float(second_moment(d) - 1) / q)


def random_signs(key: Array, size: int) -> Array:
    """Returns random signs, float32 `[size]`, 32 from each random word, lowest bit first."""
    words = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [words, 32]
    return 2.0 * bits.reshape(-1)[:size].astype(jnp.float32) - 1.0


def _segmented(key: Array, d: int) -> Array:
    # One uniform draw in [-0.5, 0.5) gives sign and magnitude: its absolute value is uniform in [0, 0.5].
    drawn = jax.random.uniform(key, (d,), jnp.float32, -0.5, 0.5)
    return jnp.where(drawn < 0, drawn - 0.5, drawn + 0.5)
