r"""Closed forms that measurements are held against.

For a loss that is linear around the point, or in the limit of small perturbations with exact answers. The relative
variance of each family of directions is its own `variance(d, q)`.
"""

from __future__ import annotations

import math

from fedbbpt_jax.estimators.directions import Directions


def kappa(directions: Directions, d: int) -> float:
    r"""Returns $\kappa$ of $E\|\hat g\|^2 = (1 + \kappa (d - 1)/q)\,\|g\|^2$ for independent directions.

    >>> from fedbbpt_jax.estimators.directions import segmented_uniform
    >>> round(kappa(segmented_uniform(), d=192), 4)
    1.1667
    """
    return directions.variance(d, 1) / (d - 1)


def expected_cosine(variance: float) -> float:
    r"""Returns the cosine between estimate and gradient, $1/\sqrt{1 + v}$, for relative variance v; to order 1/d.

    >>> expected_cosine(3.0)
    0.5
    """
    return 1 / math.sqrt(1 + variance)


def best_two_sided_size(noise: float, third: float) -> float:
    r"""Returns $c^* = (N / 2S)^{1/6}$, which is least for $N c^{-2} + S c^4$: the cube-root law in the noise.

    N is proportional to the variance of the answers' noise, hence $c^* \propto \sigma^{1/3}$.

    Args:
      noise: N.
      third: S, proportional to the square of third derivatives.

    >>> round(best_two_sided_size(8 * 8.0, 1.0) / best_two_sided_size(1.0, 1.0), 6)
    2.0
    """
    return (noise / (2 * third)) ** (1 / 6)


def best_one_sided_size(noise: float, second: float) -> float:
    r"""Returns $c^* = (N / S)^{1/4}$, which is least for $N c^{-2} + S c^2$: the square-root law in the noise.

    >>> best_one_sided_size(16.0, 1.0)
    2.0
    """
    return (noise / second) ** (1 / 4)
