r"""Losses relative to those of the same texts with words replaced, so that a prompt cannot win by ignoring the text.

Source: Sun et al., 2024, "FedBPT: Efficient Federated Black-box Prompt Tuning for Large Language Models".
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.estimators.spsa import masked_mean
from fedbbpt_jax.types import EstimateInfo, Optimizer, PyTree


def with_perturbed_loss(optimizer: Optimizer) -> Optimizer:
    r"""Returns the optimizer of $L(p; x) / L(p; \tilde x)$, where $\tilde x$ are the same texts with words replaced.

    A prompt that makes the model answer one class whatever it reads has a ratio of 1: it overfits a client whose labels
    are mostly of that class, and is not preferred. The minibatch is twice as long, its second half the replaced
    (`data/token_noise.py`); an example counts where both answers came. Diagnostics are those of the first half.

    Args:
      optimizer: told one loss for each candidate.

    Example:
      >>> from fedbbpt_jax.optimizers.cma_es import cma_es
      >>> with_perturbed_loss(cma_es(5, initial_step_size=1.0)).num_candidates
      5
    """

    def tell(key: Array, state: PyTree, losses: Array, valid: Array) -> tuple[PyTree, EstimateInfo]:
        state, info = optimizer.tell(key, state, *loss_ratio(losses, valid))
        half = losses.shape[1] // 2
        return state, info._replace(loss=masked_mean(losses[:, :half], valid[:, :half]))

    return optimizer._replace(tell=tell)


def loss_ratio(losses: Array, valid: Array) -> tuple[Array, Array]:
    """Returns mean loss over mean loss with replaced words, `[..., 1]`, and whether there is one, bool.

    Args:
      losses: `[..., 2B]`, those of the texts as they are and then those of the same with words replaced.
      valid: bool `[..., 2B]`.

    Raises:
      ValueError: their number is odd.
    """
    if losses.shape[-1] % 2:
        raise ValueError(f"expected losses of texts and of as many with words replaced, got {losses.shape[-1]}")
    (plain, replaced), (plain_valid, replaced_valid) = (jnp.split(x, 2, axis=-1) for x in (losses, valid))
    both = plain_valid & replaced_valid
    above, below = (masked_mean(x, both, axis=-1) for x in (plain, replaced))
    usable = both.any(-1) & (below > 0)
    return jnp.where(usable, above / jnp.where(usable, below, 1.0), 0.0)[..., None], usable[..., None]
