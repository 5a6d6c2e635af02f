"""A prompt in two parts, one shared by all clients and one of each client's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.types import Params, PromptGenerator, PyTree


def personal(generator: PromptGenerator) -> PromptGenerator:
    """Returns the generator of parameters `{"shared": ..., "local": ...}` whose prompt is that of their sum.

    For generators that are linear in their parameters, such as overlays, this is the sum of a shared and a local
    prompt; for the others it still begins as the shared one, because local parameters start at zero. A federation with
    `partly_shared(num_clients, is_personal)` averages the one and leaves the other with its client.

    Source: Pillutla et al., 2022, "Federated Learning with Partial Model Personalization".

    Args:
      generator: of each part.

    Example:
      >>> from fedbbpt_jax.prompts.pixels import low_resolution_overlay
      >>> generator = personal(low_resolution_overlay(32))
      >>> params = generator.init(jax.random.key(0))
      >>> params["local"]["picture"].shape
      (8, 8, 3)
    """

    def init(key: Array) -> Params:
        shared = generator.init(key)
        return {"shared": shared, "local": jax.tree.map(jnp.zeros_like, shared)}

    def generate(params: Params, features: Array) -> PyTree:
        return generator.generate(jax.tree.map(jnp.add, params["shared"], params["local"]), features)

    return PromptGenerator(init, generate)
