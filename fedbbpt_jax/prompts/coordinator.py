"""BlackVIP's coordinator: a prompt for each image, decoded from its frozen features and a learnt trigger vector.

Source: Oh et al., 2023, "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fedbbpt_jax.prompts.module import from_module
from fedbbpt_jax.types import PromptGenerator

BLACKVIP_CHANNELS = (32, 64, 32, 32, 16)
"""Of the published decoder, from 7x7 to 224x224: 9,920 parameters with features of 768 numbers."""

SMALL_CHANNELS = (8, 16, 16)
"""From 4x4 to 32x32."""


class Doubling(nnx.Module):
    """A 2x2 transposed convolution of stride 2 within each channel. Kernel = stride, so it is a product.

    Each input channel gives `multiplier` output channels, next to each other.
    """

    def __init__(self, channels: int, multiplier: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(0.5)(rngs.params(), (channels, multiplier, 2, 2)))
        self.bias = nnx.Param(jnp.zeros(channels * multiplier))

    def __call__(self, x: Array) -> Array:
        """Returns `[B, 2h, 2w, C·multiplier]` of `[B, h, w, C]`."""
        batch, height, width, _ = x.shape
        doubled = jnp.einsum("bhwc,cmij->bhiwjcm", x, self.kernel[...])
        return doubled.reshape(batch, 2 * height, 2 * width, -1) + self.bias[...]


class Stage(nnx.Module):
    """Doubling, 1x1 mixing of channels, normalisation, GELU.

    Differs from BlackVIP: its batch normalisation couples the examples of a batch and needs running statistics, which
    a federation would have to merge. Here each example is normalised by its own mean and variance; the scale and shift
    per channel are the same, and so is the number of parameters.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        hidden = max(inputs, outputs)
        self.doubling = Doubling(inputs, hidden // inputs, rngs=rngs)
        self.pointwise = nnx.Linear(hidden, outputs, use_bias=False, rngs=rngs)
        self.norm = nnx.GroupNorm(outputs, num_groups=1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Returns `[B, 2h, 2w, outputs]` of `[B, h, w, inputs]`."""
        return jax.nn.gelu(self.norm(self.pointwise(self.doubling(x))), approximate=False)


class Coordinator(nnx.Module):
    """Features and trigger, laid out on a small grid, doubled stage by stage to the image's size."""

    def __init__(self, grid: int, feature_size: int, channels: Sequence[int], *, rngs: nnx.Rngs):
        self.grid = grid
        trigger_size = grid * grid * channels[0] - feature_size
        self.trigger = nnx.Param(0.1 * jax.random.uniform(rngs.params(), (trigger_size,)))
        self.stages = nnx.List([Stage(a, b, rngs=rngs) for a, b in pairwise(channels)])
        # Starts at zero, so that tuning starts from the unprompted model and not below it.
        self.last = nnx.Param(jnp.zeros((channels[-1], 2, 2, 3)))

    def __call__(self, features: Array) -> Array:
        """Returns prompts `[B, H, W, 3]` of features `[B, F]`."""
        batch = len(features)
        trigger = jnp.broadcast_to(self.trigger[...], (batch, *self.trigger.shape))
        seed = jnp.concatenate([features, trigger], axis=-1)
        x = seed.reshape(batch, -1, self.grid, self.grid).transpose(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        prompt = jnp.einsum("bhwc,cijd->bhiwjd", x, self.last[...])
        return prompt.reshape(batch, 2 * x.shape[1], 2 * x.shape[2], 3)


def coordinator(image_size: int, feature_size: int, channels: Sequence[int] = BLACKVIP_CHANNELS) -> PromptGenerator:
    """Returns the input-dependent generator, which doubles a grid of image_size / 2^len(channels) rows to the image.

    Prompts are in pixel units; BlackVIP's are in those of CLIP's normalised pixels, some four times as large.

    Args:
      image_size: H = W, in pixels.
      feature_size: F, the width of the frozen features of an image (768 for ViT-MAE).
      channels: of the grid and after each stage, each a multiple of the one before or smaller; what the grid holds
        beyond the features is the trigger (800 numbers at the published shape).

    Raises:
      ValueError: the sizes do not fit together.

    Example:
      >>> generator = coordinator(224, feature_size=768)
      >>> params = generator.init(jax.random.key(0))
      >>> sum(x.size for x in jax.tree.leaves(params))
      9920
      >>> generator.generate(params, jnp.zeros((2, 768))).shape
      (2, 224, 224, 3)
    """
    grid, rest = divmod(image_size, 2 ** len(channels))
    if rest or not grid:
        raise ValueError(f"the image size must be a multiple of {2 ** len(channels)}, got {image_size}")
    for inputs, outputs in pairwise(channels):
        if outputs > inputs and outputs % inputs:
            raise ValueError(f"channels must grow by whole multiples, got {inputs} before {outputs}")
    if feature_size >= grid * grid * channels[0]:
        raise ValueError(f"{feature_size} features leave no room for a trigger in {grid * grid * channels[0]} numbers")
    return from_module(lambda rngs: Coordinator(grid, feature_size, channels, rngs=rngs))
