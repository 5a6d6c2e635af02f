"""CLIP: an image tower and a text tower with a common space.

Source: Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision".
Module and attribute names are those of Hugging Face CLIP checkpoints, its `pre_layrnorm` included.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fedbbpt_jax.models.layers import Encoder, PatchEmbedding, causal_mask

Config = Any
"""A CLIP configuration of transformers, or the part of one tower; its class fills every field."""


class TextEmbeddings(nnx.Module):
    """Token and position embeddings."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        """Returns `[B, T, E]` of ids `[B, T]`."""
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[-1]))


class TextTower(nnx.Module):
    """Causal transformer over token ids, pooled at the end-of-text token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = _encoder(config, rngs)
        self.final_layer_norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, ids: Array, attended: Array) -> Array:
        """Returns pooled text states `[B, E]` of `ids` int32 `[B, T]`; `attended` bool `[B, T]` hides padding."""
        mask = causal_mask(ids.shape[-1]) & attended[:, None, None, :]
        tokens = self.final_layer_norm(self.encoder(self.embeddings(ids), mask))
        # Configurations that say eos_token_id = 2 carry a historical error: there the end of text is the largest id.
        ends = ids if self.eos_token_id == 2 else ids == self.eos_token_id
        return tokens[jnp.arange(len(ids)), jnp.argmax(ends, axis=-1)]


class VisionEmbeddings(nnx.Module):
    """A class token before the patches, and positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.class_embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,)))
        self.patch_embedding = PatchEmbedding(config.patch_size, width, rngs=rngs)
        num_patches = (config.image_size // config.patch_size) ** 2
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
        self.pre_layrnorm = nnx.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.encoder = _encoder(config, rngs)
        self.post_layernorm = nnx.LayerNorm(width, epsilon=eps, rngs=rngs)

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
        self.text_projection = nnx.Linear(text.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
        self.visual_projection = nnx.Linear(vision.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def encode_text(self, ids: Array, attended: Array) -> Array:
        """Returns unit text features `[B, E]`, float32."""
        return _unit(self.text_projection(self.text_model(ids, attended)))

    def encode_image(self, images: Array) -> Array:
        """Returns unit image features `[B, E]`, float32, of normalised images `[B, H, W, 3]`."""
        return _unit(self.visual_projection(self.vision_model(images)))

    def scores(self, image_features: Array, text_features: Array) -> Array:
        """Returns exp(logit_scale)·cosine, float32 `[B, N]`."""
        return jnp.exp(self.logit_scale[...]) * image_features @ text_features.T


class ImageClassifier(nnx.Module):
    """The image tower of a CLIP, scoring pixels against fixed class features; the text tower is left behind."""

    def __init__(self, clip: CLIP, class_features: Array, mean: np.ndarray, std: np.ndarray):
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.logit_scale = clip.logit_scale
        self.class_features = nnx.Variable(class_features)
        self.mean = nnx.Variable(jnp.asarray(mean))
        self.std = nnx.Variable(jnp.asarray(std))

    def __call__(self, pixels: Array) -> Array:
        """Returns class scores, float32 `[B, N]`, of pixels in [0, 1] `[B, H, W, 3]`."""
        images = (pixels - self.mean[...]) / self.std[...]
        features = _unit(self.visual_projection(self.vision_model(images)))
        return jnp.exp(self.logit_scale[...]) * features @ self.class_features[...].T


def tokenize(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 ids and a bool mask, both `[B, T]`, padded to the longest text."""
    encoded = tokenizer(texts, padding=True, return_tensors="np")
    return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(bool)


def _encoder(config: Config, rngs: nnx.Rngs) -> Encoder:
    return Encoder(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        config.hidden_act,
        config.layer_norm_eps,
        rngs=rngs,
    )


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
