"""Directions that know of each other, or of the shape of the parameters; each is rebuilt alone, from key and index.

The interface is that of `estimators/directions.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from fedbbpt_jax.estimators.directions import Directions, itself, random_signs
from fedbbpt_jax.types import Params


def orthogonal(block_size: int) -> Directions:
    r"""Returns directions that are orthogonal within blocks; each is uniform on the sphere of radius √d.

    Variance $\sum_b (n_b/q)^2 (d/n_b - 1)$ over blocks of $n_b \le$ block_size directions: q = d = block_size gives
    the gradient itself. Costs d·block_size² operations for each direction; `hadamard` does nearly the same for d.

    Source: Choromanski et al., 2018, "Structured Evolution with Compact Architectures for Scalable Policy
    Optimization".

    Args:
      block_size: directions in a block, at most d.

    Raises:
      ValueError: the block is empty; on use, it is larger than d.

    Example:
      >>> orthogonal(4).variance(8, 4), orthogonal(8).variance(8, 8)
      (1.0, 0.0)
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")

    def sample(key: Array, j: Array | int, like: Params) -> Params:
        flat, unravel = ravel_pytree(like)
        if block_size > flat.size:
            raise ValueError(f"{block_size} directions cannot be orthogonal in {flat.size} dimensions")
        normal = jax.random.normal(jax.random.fold_in(key, j // block_size), (block_size, flat.size), jnp.float32)
        return unravel(jnp.sqrt(flat.size) * orthonormal(normal)[j % block_size])

    def variance(d: int, q: int) -> float:
        blocks = [min(block_size, q - first) for first in range(0, q, block_size)]
        return sum((n / q) ** 2 * (d / n - 1) for n in blocks)

    return Directions(sample, itself, variance)


def hadamard() -> Directions:
    r"""Returns rows of a Walsh-Hadamard matrix with randomly signed and shuffled columns: orthogonal signs.

    The matrix has n rows, the power of two not below d; row r has $(-1)^{|r \wedge i|}$ at i, so a row costs d
    operations and no matrix is ever made. Blocks of n directions are independent. Variance
    $\sum_b (n_b/q)^2 (n/n_b - 1)(d - 1)/(n - 1)$ over blocks: that of orthogonal directions where d is a power of
    two, and the gradient itself at q = n.

    Source: as `orthogonal` (there HD-products).

    Example:
      >>> hadamard().variance(8, 4), hadamard().variance(8, 8)
      (1.0, 0.0)
    """

    def sample(key: Array, j: Array | int, like: Params) -> Params:
        flat, unravel = ravel_pytree(like)
        n = _power_of_two(flat.size)
        sign_key, column_key = jax.random.split(jax.random.fold_in(key, j // n))
        columns = jax.random.permutation(column_key, n)[: flat.size]
        parity = jax.lax.population_count(columns & (j % n)) & 1
        return unravel(random_signs(sign_key, flat.size) * (1.0 - 2.0 * parity.astype(jnp.float32)))

    def variance(d: int, q: int) -> float:
        n = _power_of_two(d)
        blocks = [min(n, q - first) for first in range(0, q, n)]
        return sum((b / q) ** 2 * (n / b - 1) for b in blocks) * (d - 1) / max(n - 1, 1)

    return Directions(sample, itself, variance)


def low_rank(rank: int) -> Directions:
    r"""Returns $U V^\top / \sqrt r$ with random signs in U and V for each matrix, random signs for everything else.

    A matrix of m rows and n columns is moved by r(m + n) numbers; leaves of more axes count as matrices of their first
    axis. Variance (d - 1 + 2(1 - 1/r))/q if all of the gradient is in matrices, and (d - 1)/q if none is or r = 1.

    Source: Chen et al., 2025, "Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures"; the
    second moment by enumeration of fourth moments of signs.

    Args:
      rank: r.

    Raises:
      ValueError: the rank is not positive.

    Example:
      >>> direction = low_rank(1).sample(jax.random.key(0), 0, jnp.zeros((6, 5)))
      >>> int(jnp.linalg.matrix_rank(direction))
      1
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")

    def one_leaf(key: Array, leaf: Array) -> Array:
        if leaf.ndim < 2:
            return random_signs(key, leaf.size).reshape(leaf.shape)
        rows, columns = leaf.shape[0], leaf.size // leaf.shape[0]
        signs = random_signs(key, rank * (rows + columns)).reshape(-1, rank)
        return (signs[:rows] @ signs[rows:].T / jnp.sqrt(rank)).reshape(leaf.shape)

    def sample(key: Array, j: Array | int, like: Params) -> Params:
        leaves, structure = jax.tree.flatten(like)
        keys = jax.random.split(jax.random.fold_in(key, j), len(leaves))
        return jax.tree.unflatten(structure, [one_leaf(k, x) for k, x in zip(keys, leaves, strict=True)])

    return Directions(sample, itself, variance=lambda d, q: (d - 1 + 2 * (1 - 1 / rank)) / q)


def subspace(dimension: int, seed: int = 0) -> Directions:
    r"""Returns random signs within a fixed random subspace: the estimate is of the gradient's projection P g onto it.

    The subspace is that of a count sketch: each number belongs to one of r groups and moves with it, by a fixed
    random sign; its r axes are orthonormal after scaling. Variance (r - 1)/q times ‖P g‖² instead of ‖g‖², at the
    price of the bias P g - g.

    Source: Clarkson and Woodruff, 2013, "Low rank approximation and regression in input sparsity time" (the sketch).

    Args:
      dimension: r.
      seed: of the subspace, the same for all who share it.

    Raises:
      ValueError: the dimension is not positive.

    Example:
      >>> subspace(3).variance(1000, 1)
      2.0
    """
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1, got {dimension}")

    def sample(key: Array, j: Array | int, like: Params) -> Params:
        flat, unravel = ravel_pytree(like)
        group_key, sign_key = jax.random.split(jax.random.key(seed))
        group = jax.random.permutation(group_key, jnp.arange(flat.size) % dimension)
        moves = random_signs(jax.random.fold_in(key, j), dimension) / jnp.sqrt(jnp.bincount(group, length=dimension))
        return unravel(random_signs(sign_key, flat.size) * moves[group])

    return Directions(sample, itself, variance=lambda d, q: (min(dimension, d) - 1) / q)


def lattice(num_points: int = 4096, seed: int = 0) -> Directions:
    r"""Returns quasi-random normal directions: a rank-1 lattice in the unit cube, randomly shifted.

    Point j is $\Phi^{-1}(\{j z / n + u\})$ with a fixed vector z of odd numbers and a uniform shift u for each key, so
    that each direction alone is standard normal and together they are spread more evenly than chance would. No closed
    form for its variance is known; that of as many independent normal directions, (d + 1)/q, is the one to beat.

    Source: Cranley and Patterson, 1976, "Randomization of number theoretic methods for multiple integration".

    Args:
      num_points: n, a power of two up to 2^15; directions repeat after n.
      seed: of z.

    Raises:
      ValueError: n is not such a power.

    Example:
      >>> lattice().sample(jax.random.key(0), 3, jnp.zeros((2, 4))).shape
      (2, 4)
    """
    if num_points not in [2**i for i in range(1, 16)]:
        raise ValueError(f"num_points must be a power of two between 2 and 32768, got {num_points}")

    def sample(key: Array, j: Array | int, like: Params) -> Params:
        flat, unravel = ravel_pytree(like)
        z = np.random.default_rng(seed).integers(0, num_points // 2, flat.size, np.int32) * 2 + 1
        shift = jax.random.uniform(key, (flat.size,), jnp.float32)
        place = (j % num_points * z % num_points + 0.5) / num_points + shift
        inside = jnp.clip(place % 1.0, 1e-7, 1 - 1e-7)  # float32 has no number just below 1
        return unravel(jax.scipy.special.ndtri(inside).astype(jnp.float32))

    return Directions(sample, itself, variance=lambda d, q: (d + 1) / q)


def orthonormal(vectors: Array) -> Array:
    """Returns an orthonormal basis `[r, d]` of the span of vectors `[r, d]`, by Gram-Schmidt, each twice.

    Of normal vectors it is uniformly distributed, without a choice of signs; a zero vector adds nothing. A library's QR
    of thousands of matrices at once has been seen to hang on CPU (jaxlib 0.10), so none is used.
    """

    def add(basis: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        i, vector = row
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
            vector = vector / jnp.maximum(jnp.linalg.norm(vector), 1e-30)
        return basis.at[i].set(vector), None

    with jax.default_matmul_precision("highest"):
        return jax.lax.scan(add, jnp.zeros_like(vectors), (jnp.arange(len(vectors)), vectors))[0]


def _power_of_two(size: int) -> int:
    """Returns the least power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()
