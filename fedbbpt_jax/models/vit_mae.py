"""The encoder of a masked autoencoder, and the plain vision transformers of the same layout.

BlackVIP's frozen feature extractor: the image is not masked, and its feature is the last state of the class token.

Source: He et al., 2022, "Masked Autoencoders Are Scalable Vision Learners"; Dosovitskiy et al., 2021, "An Image is
Worth 16x16 Words".
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from fedbbpt_jax.models.checkpoint import Dialect
from fedbbpt_jax.models.layers import Config, Encoder, PatchEmbedding, PreNormBlock, layer_norm, patch_grid

VIT_DIALECT = Dialect(
    prefix="vit.",
    spellings=(
        ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
        ("encoder.layers.", "encoder.layer."),
        ("layer_norm1.", "layernorm_before."),
        ("layer_norm2.", "layernorm_after."),
        ("self_attn.q_proj.", "attention.attention.query."),
        ("self_attn.k_proj.", "attention.attention.key."),
        ("self_attn.v_proj.", "attention.attention.value."),
        ("self_attn.out_proj.", "attention.output.dense."),
        ("mlp.fc1.", "intermediate.dense."),
        ("mlp.fc2.", "output.dense."),
    ),
    ignored=("decoder.", "pooler.", "classifier.", "embeddings.mask_token"),
)


class ViTEmbeddings(nnx.Module):
    """A class token before the patches, and positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        num_patches = patch_grid(config) ** 2
        self.patch_embedding = PatchEmbedding(config.patch_size, width, use_bias=True, rngs=rngs)
        self.cls_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))
        self.position_embeddings = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, num_patches + 1, width)))

    def __call__(self, images: Array) -> Array:
        """Returns `[B, T, E]` of normalised images `[B, H, W, 3]`."""
        patches = self.patch_embedding(images)
        first = jnp.broadcast_to(self.cls_token[...], (len(images), 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], axis=1) + self.position_embeddings[...]


class ViTEncoder(nnx.Module):
    """Every patch is seen: nothing is masked or shuffled."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embeddings = ViTEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(PreNormBlock, config, rngs=rngs)
        self.layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns last hidden states `[B, T, E]`, the class token first, of normalised images `[B, H, W, 3]`."""
        return self.layernorm(self.encoder(self.embeddings(images)))

    def features(self, images: Array) -> Array:
        """Returns the last state of the class token, float32 `[B, E]`."""
        return self(images)[:, 0].astype(jnp.float32)
