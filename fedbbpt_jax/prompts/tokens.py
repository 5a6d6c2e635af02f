r"""Discrete prompts: P words out of a vocabulary of N, one categorical distribution for each position.

A candidate is a sample, indices int32 `[P]`; the policy's parameters are float32 `[P, N]`, and the prompt that is used
in the end has the likeliest word at each position. The generator takes both and tells them apart by their type.

Parameters of the policy (`estimators/policy_gradient.py`) are probabilities, which an optimizer has to keep on the
simplex (`on_simplex`), or logits or α, which it has not.

Source: Diao et al., 2023, "Black-Box Prompt Learning for Pre-trained Language Models" (BDPL).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedbbpt_jax.estimators.spsa import check_positive
from fedbbpt_jax.types import Params, PromptGenerator


def tokens(vocabulary: Sequence[int] | np.ndarray, num_positions: int, start: float | None = None) -> PromptGenerator:
    """Returns the generator of prompts of token ids, int32 `[P]`, all words equally likely at first.

    Args:
      vocabulary: N token ids (`candidate_tokens`).
      num_positions: P.
      start: value of every parameter at first: 1/N for probabilities, which is the default, 0 for logits, 1 for the α
        of Gumbel-softmax.

    Raises:
      ValueError: the vocabulary is empty, or there is no position.

    Example:
      >>> generator = tokens([318, 257, 922], num_positions=2)
      >>> generator.generate(jnp.array([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]), None)
      Array([922, 318], dtype=int32)
      >>> generator.generate(jnp.array([1, 1], jnp.int32), None)
      Array([257, 257], dtype=int32)
    """
    check_positive(num_positions=num_positions)
    ids = np.asarray(vocabulary, np.int32)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"expected a vocabulary of token ids [N], got one of shape {ids.shape}")

    def init(key: Array) -> Array:
        del key
        return jnp.full((num_positions, len(ids)), 1 / len(ids) if start is None else start, jnp.float32)

    def generate(params: Params, features: Array) -> Array:
        del features
        sampled = jnp.issubdtype(params.dtype, jnp.integer)
        return jnp.asarray(ids)[params if sampled else jnp.argmax(params, axis=-1)]

    return PromptGenerator(init, generate)


def prompt_text(generator: PromptGenerator, params: Array, tokenizer: Any) -> str:
    """Returns the learnt prompt as text.

    Args:
      generator: made by `tokens`.
      params: of the policy, `[P, N]`.
      tokenizer: of transformers, the one whose ids the vocabulary holds.
    """
    return tokenizer.decode(np.asarray(generator.generate(params, jnp.zeros((1, 0)))).tolist())


def project_to_simplex(vectors: Array) -> Array:
    r"""Returns the nearest points, in Euclidean distance, with numbers of at least 0 and of sum 1, float32 `[..., N]`.

    $$p_j = \max(v_j - \tau, 0), \qquad \tau = \Big(\sum_{i \le \rho} v_{(i)} - 1\Big) / \rho$$

    with the sorted $v_{(1)} \ge v_{(2)} \ge \dots$ and ρ the last i for which $v_{(i)} > \tau_i$. Exact, unlike the
    bisection of BDPL's code, which stops at a tolerance of 1e-3.

    Source: Duchi et al., 2008, "Efficient Projections onto the l1-Ball for Learning in High Dimensions", Figure 1.

    Args:
      vectors: `[..., N]`.

    Example:
      >>> project_to_simplex(jnp.array([1.0, 0.5, -1.0]))
      Array([0.75, 0.25, 0.  ], dtype=float32)
    """
    # One constant for all numbers of a row changes nothing; without it large ones would lose their digits.
    vectors = vectors - vectors.max(axis=-1, keepdims=True)
    descending = -jnp.sort(-vectors, axis=-1)
    counts = jnp.arange(1, vectors.shape[-1] + 1)
    thresholds = (jnp.cumsum(descending, axis=-1) - 1) / counts
    last = (descending > thresholds).sum(axis=-1, keepdims=True) - 1
    return jnp.maximum(vectors - jnp.take_along_axis(thresholds, last, axis=-1), 0.0)


def at_least(floor: float) -> optax.GradientTransformation:
    """Returns the last link of a chain of optax that keeps every parameter at `floor` or above: α has a logarithm.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), at_least(0.5))
      >>> params = jnp.array([1.0, 1.0])
      >>> updates, _ = tx.update(jnp.array([2.0, 0.25]), tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      Array([0.5 , 0.75], dtype=float32)
    """

    def move(update: Array, params: Array) -> Array:
        return jnp.maximum(update, floor - params)

    return optax.stateless(lambda updates, params: jax.tree.map(move, updates, params))


def on_simplex() -> optax.GradientTransformation:
    """Returns the last link of a chain of optax: whatever came before, each row of the parameters is projected.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), on_simplex())
      >>> params = jnp.array([[0.5, 0.5]])
      >>> updates, _ = tx.update(jnp.array([[2.0, 0.0]]), tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      Array([[0., 1.]], dtype=float32)
    """

    def move(update: Array, params: Array) -> Array:
        return project_to_simplex(params + update) - params  # of q >= 0; p + fl(q - p) >= 0, since fl(0 - p) is exact

    return optax.stateless(lambda updates, params: jax.tree.map(move, updates, params))
