"""Transformer layers shared by the frozen networks.

Attributes carry the names that Hugging Face gives the tensors of CLIP; the other networks spell them differently, by
a table in each file (see `models/checkpoint.py`).

A linear map multiplies in the type of its kernel and accumulates in float32: kernels cast to bfloat16 make a bfloat16
trunk, whose norms, residual sums, biases and activations stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Config = Any
"""A configuration of transformers, or the part of one tower; its class fills every field."""


def quick_gelu(x: Array) -> Array:
    """Returns x·sigmoid(1.702 x), the GELU approximation of the original CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """Returns the exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


def linear(inputs: int, outputs: int, *, use_bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a linear map that multiplies in its kernel's type and accumulates in float32."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        promote_dtype=_inputs_as_kernel,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def layer_norm(width: int, eps: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a layer normalisation whose variance is taken in two passes: the quick formula cancels digits."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)


class SelfAttention(nnx.Module):
    """Multi-head self-attention; `use_bias` is of the query, key and value."""

    def __init__(self, width: int, num_heads: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q_proj = linear(width, width, use_bias=use_bias, rngs=rngs)
        self.k_proj = linear(width, width, use_bias=use_bias, rngs=rngs)
        self.v_proj = linear(width, width, use_bias=use_bias, rngs=rngs)
        self.out_proj = linear(width, width, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns attended tokens `[B, T, E]`; `mask` is bool `[B, 1, T, T]`, True where a token may look."""
        heads = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
        dtype = self.q_proj.kernel[...].dtype
        query, key, value = (p(x).astype(dtype).reshape(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask)  # [B, T, heads, E/heads]
        return self.out_proj(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """Two linear maps with an activation between."""

    def __init__(self, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[activation]
        self.fc1 = linear(width, hidden, rngs=rngs)
        self.fc2 = linear(hidden, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Returns `[..., E]` of `[..., E]`."""
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """The parts of a transformer block; its two kinds differ in where they normalise."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        qkv_bias = getattr(config, "qkv_bias", True)  # only ViT has the choice
        self.layer_norm1 = layer_norm(width, eps, rngs=rngs)
        self.self_attn = SelfAttention(width, config.num_attention_heads, use_bias=qkv_bias, rngs=rngs)
        self.layer_norm2 = layer_norm(width, eps, rngs=rngs)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act, rngs=rngs)


class PreNormBlock(Block):
    """Normalises before attention and before the MLP (CLIP, ViT)."""

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns tokens `[B, T, E]`; `mask` as for attention."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class PostNormBlock(Block):
    """Normalises after the residual sums (BERT, RoBERTa)."""

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns tokens `[B, T, E]`; `mask` as for attention."""
        x = self.layer_norm1(x + self.self_attn(x, mask))
        return self.layer_norm2(x + self.mlp(x))


class Encoder(nnx.Module):
    """A stack of blocks of one kind."""

    def __init__(self, block: type[Block], config: Config, *, rngs: nnx.Rngs):
        self.layers = nnx.List([block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns tokens `[B, T, E]`; `mask` as for attention."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class PatchEmbedding(nnx.Module):
    """Non-overlapping patches mapped to tokens: a strided convolution written as one matmul."""

    def __init__(self, patch: int, width: int, *, use_bias: bool = False, rngs: nnx.Rngs):
        self.patch = patch
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (patch, patch, 3, width)))
        self.bias = nnx.Param(jnp.zeros(width)) if use_bias else nnx.data(None)

    def __call__(self, images: Array) -> Array:
        """Returns tokens `[B, T, E]` of images `[B, H, W, 3]`, rows first."""
        batch, height, width, channels = images.shape
        p = self.patch
        patches = images.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        flat = patches.reshape(batch, -1, p * p * channels)  # [B, T, p*p*3]
        kernel = self.kernel[...].reshape(p * p * channels, -1)
        tokens = jnp.matmul(flat.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
        return tokens if self.bias is None else tokens + self.bias[...]


def patch_grid(config: Config) -> int:
    """Returns the patches along one side of an image.

    Raises:
      ValueError: patches do not fill the image.
    """
    if config.image_size % config.patch_size:
        raise ValueError(f"patch_size {config.patch_size} does not divide image_size {config.image_size}")
    return config.image_size // config.patch_size


def causal_mask(length: int) -> Array:
    """Returns bool `[1, 1, T, T]`: token t looks at tokens up to t."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def behind_first(text: Array, inserted: Array) -> Array:
    """Returns `[B, P + T, ...]`: `inserted` `[B, P, ...]` right behind the first token of `text` `[B, T, ...]`."""
    return jnp.concatenate([text[:, :1], inserted.astype(text.dtype), text[:, 1:]], axis=1)


def unit(x: Array) -> Array:
    """Returns vectors `[..., E]` of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _inputs_as_kernel(arrays: Any, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Returns inputs in the type of the kernel; the bias stays as it is. The signature is Flax's."""
    del dtype, inexact
    inputs, kernel, bias = arrays
    return inputs.astype(kernel.dtype), kernel, bias
