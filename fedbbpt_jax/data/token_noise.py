"""Texts with some words replaced at random: a prompt that makes a model read loses by it, one that only pushes it
towards a label does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedbbpt_jax.types import Examples


def corrupt_tokens(
    key: Array, ids: Array, rate: float | Array, vocabulary_size: int, protected: Sequence[int] | np.ndarray
) -> Array:
    """Returns texts of which each token is, with probability `rate`, one drawn from the whole vocabulary, int32.

    Protected tokens are neither replaced nor drawn: a text keeps its mask and its padding, and gets no second one.

    Source: Sun et al., 2024, "FedBPT: Efficient Federated Black-box Prompt Tuning for Large Language Models" (random
    replacement with probability r_p). Differs from NVFlare's version, which may replace the mask.

    Args:
      key: of the draw.
      ids: int32 `[..., T]`.
      rate: r_p, between 0 and 1.
      vocabulary_size: tokens are 0 to this, exclusive.
      protected: tokens such as the tokenizer's `all_special_ids`.

    Raises:
      ValueError: the rate is not a probability, or all tokens are protected.

    Example:
      >>> ids = jnp.array([0, 9, 9, 9, 4, 2, 1])
      >>> corrupt_tokens(jax.random.key(0), ids, 1.0, vocabulary_size=10, protected=[0, 1, 2, 3, 4])[jnp.array([0, 4])]
      Array([0, 4], dtype=int32)
    """
    if not isinstance(rate, Array) and not 0 <= rate <= 1:
        raise ValueError(f"rate must be between 0 and 1, got {rate}")
    kept = np.unique(np.asarray(protected, np.int32))
    kept = kept[(kept >= 0) & (kept < vocabulary_size)]
    if len(kept) >= vocabulary_size:
        raise ValueError(f"all {vocabulary_size} tokens are protected")
    where_key, word_key = jax.random.split(key)
    replaced = jax.random.bernoulli(where_key, rate, ids.shape) & ~jnp.isin(ids, kept)
    words = jax.random.randint(word_key, ids.shape, 0, vocabulary_size - len(kept))
    for token in kept:  # the n-th of the tokens that are not protected
        words += words >= token
    return jnp.where(replaced, words, ids).astype(jnp.int32)


def with_replaced_words(
    rate: float, vocabulary_size: int, protected: Sequence[int]
) -> Callable[[Array, Examples], Examples]:
    """Returns the view `(key, minibatch [B]) -> [2B]` of texts and, behind them, the same with words replaced.

    Args:
      rate: as for `corrupt_tokens`, and so are the others.
      vocabulary_size: of the model.
      protected: its special tokens.
    """

    def view(key: Array, examples: Examples) -> Examples:
        # The candidates of a step are drawn from the key itself.
        ids = corrupt_tokens(
            jax.random.fold_in(key, vocabulary_size), examples.inputs.ids, rate, vocabulary_size, protected
        )
        spoilt = examples._replace(inputs=examples.inputs._replace(ids=ids))
        return jax.tree.map(lambda *x: jnp.concatenate(x), examples, spoilt)

    return view
