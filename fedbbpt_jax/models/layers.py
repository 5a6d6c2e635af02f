"""Transformer layers shared by the frozen networks.

Attributes carry the names that Hugging Face checkpoints give their tensors, so that one rule (see
`models/loading.py`) maps every parameter path to its tensor and back.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


def quick_gelu(x: Array) -> Array:
    """Returns x·sigmoid(1.702 x), the GELU approximation of the original CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """Returns the exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class SelfAttention(nnx.Module):
    """Multi-head self-attention with biased projections."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q_proj = nnx.Linear(width, width, rngs=rngs)
        self.k_proj = nnx.Linear(width, width, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns attended tokens `[B, T, E]`; `mask` is bool `[B, 1, T, T]`, True where a token may look."""
        heads = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
        query, key, value = (p(x).reshape(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask)  # [B, T, heads, E/heads]
        return self.out_proj(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """Two linear maps with an activation between."""

    def __init__(self, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nnx.Linear(width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Returns `[..., E]` of `[..., E]`."""
        return self.fc2(self.activation(self.fc1(x)))


class PreNormBlock(nnx.Module):
    """A transformer block that normalises before attention and before the MLP."""

    def __init__(self, width: int, num_heads: int, hidden: int, activation: str, eps: float, *, rngs: nnx.Rngs):
        self.layer_norm1 = nnx.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.self_attn = SelfAttention(width, num_heads, rngs=rngs)
        self.layer_norm2 = nnx.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.mlp = MLP(width, hidden, activation, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns tokens `[B, T, E]`; `mask` as for attention."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """A stack of pre-norm blocks."""

    def __init__(
        self, num_layers: int, width: int, num_heads: int, hidden: int, activation: str, eps: float, *, rngs: nnx.Rngs
    ):
        self.layers = nnx.List(
            [PreNormBlock(width, num_heads, hidden, activation, eps, rngs=rngs) for _ in range(num_layers)]
        )

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns tokens `[B, T, E]`; `mask` as for attention."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class PatchEmbedding(nnx.Module):
    """Non-overlapping patches mapped to tokens: a strided convolution written as one matmul."""

    def __init__(self, patch: int, width: int, *, rngs: nnx.Rngs):
        self.patch = patch
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (patch, patch, 3, width)))

    def __call__(self, images: Array) -> Array:
        """Returns tokens `[B, T, E]` of images `[B, H, W, 3]`, rows first."""
        batch, height, width, channels = images.shape
        p = self.patch
        patches = images.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        flat = patches.reshape(batch, -1, p * p * channels)  # [B, T, p*p*3]
        return flat @ self.kernel[...].reshape(p * p * channels, -1)


def causal_mask(length: int) -> Array:
    """Returns bool `[1, 1, T, T]`: token t looks at tokens up to t."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]
