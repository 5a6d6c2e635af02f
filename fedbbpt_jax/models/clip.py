"""CLIP: an image tower and a text tower with a common space.

Source: Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision".
Module and attribute names are those of Hugging Face CLIP checkpoints, its `pre_layrnorm` included.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from fedbbpt_jax.models.checkpoint import Dialect
from fedbbpt_jax.models.layers import (
    Config,
    Encoder,
    PatchEmbedding,
    PreNormBlock,
    behind_first,
    causal_mask,
    layer_norm,
    linear,
    patch_grid,
    unit,
)

# Older checkpoints store positions as buffers.
CLIP_DIALECT = Dialect(ignored=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"))


class TextEmbeddings(nnx.Module):
    """Token and position embeddings."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, ids: Array, context: Array | None = None) -> Array:
        """Returns `[B, P + T, E]` of ids `[B, T]`, with context `[P, E]` or `[B, P, E]` behind the first token."""
        tokens = self.token_embedding(ids)
        if context is not None:
            context = jnp.broadcast_to(context, (len(ids), *context.shape[-2:]))
            tokens = behind_first(tokens, context)
        longest = self.position_embedding.num_embeddings
        if tokens.shape[1] > longest:
            raise ValueError(f"{tokens.shape[1]} tokens, context included, exceed the model's {longest} positions")
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class TextTower(nnx.Module):
    """Causal transformer over token ids, pooled at the end-of-text token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(PreNormBlock, config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, ids: Array, attended: Array, context: Array | None = None) -> Array:
        """Returns pooled text states `[B, E]`.

        Args:
          ids: int32 `[B, T]`.
          attended: bool `[B, T]`, False hides padding.
          context: embeddings `[P, E]` or `[B, P, E]` that stand behind the first token, as in Zhou et al., 2022,
            "Learning to Prompt for Vision-Language Models" (CoOp); none if left out (P = 0).

        Raises:
          ValueError: context and text are longer than the model's positions.
        """
        states = self.embeddings(ids, context)
        num_context = states.shape[1] - ids.shape[1]
        attended = behind_first(attended, jnp.ones((len(ids), num_context), bool))
        # Configurations that say eos_token_id = 2 carry a historical error: there the end of text is the largest id.
        ends = ids if self.eos_token_id == 2 else ids == self.eos_token_id
        mask = causal_mask(states.shape[1]) & attended[:, None, None, :]
        tokens = self.final_layer_norm(self.encoder(states, mask))
        return tokens[jnp.arange(len(ids)), jnp.argmax(ends, axis=-1) + num_context]


class VisionEmbeddings(nnx.Module):
    """A class token before the patches, and positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.class_embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,)))
        self.patch_embedding = PatchEmbedding(config.patch_size, width, rngs=rngs)
        num_patches = patch_grid(config) ** 2
        self.position_embedding = nnx.Embed(num_patches + 1, width, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns `[B, T, E]` of normalised images `[B, H, W, 3]`."""
        patches = self.patch_embedding(images)
        first = jnp.broadcast_to(self.class_embedding[...], (len(images), 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding.embedding[...]


class VisionTower(nnx.Module):
    """Vision transformer, pooled at its class token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = layer_norm(width, eps, rngs=rngs)
        self.encoder = Encoder(PreNormBlock, config, rngs=rngs)
        self.post_layernorm = layer_norm(width, eps, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns pooled image states `[B, E]` of normalised images `[B, H, W, 3]`."""
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(tokens[:, 0])


class CLIP(nnx.Module):
    """Both towers, their projections to the common space and the temperature."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        text, vision = config.text_config, config.vision_config
        self.text_model = TextTower(text, rngs=rngs)
        self.vision_model = VisionTower(vision, rngs=rngs)
        self.text_projection = linear(text.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
        self.visual_projection = linear(vision.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def encode_text(self, ids: Array, attended: Array, context: Array | None = None) -> Array:
        """Returns unit text features `[B, E]`, float32; arguments as for `TextTower`."""
        return unit(self.text_projection(self.text_model(ids, attended, context)))

    def encode_image(self, images: Array) -> Array:
        """Returns unit image features `[B, E]`, float32, of normalised images `[B, H, W, 3]`."""
        return unit(self.visual_projection(self.vision_model(images)))

    def scores(self, image_features: Array, text_features: Array) -> Array:
        """Returns exp(logit_scale)·cosine, float32 `[B, N]`."""
        return jnp.exp(self.logit_scale[...]) * image_features @ text_features.T
