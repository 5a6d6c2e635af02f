"""Visual prompts that do not depend on the input: an image added to every image. All start at zero.

Prompts are in pixel units ([0, 1] is black to white); the black box adds them and clips the sum to [0, 1].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fedbbpt_jax.prompts.module import from_module
from fedbbpt_jax.types import PromptGenerator


class Overlay(nnx.Module):
    """A picture of `resolution`² colours, enlarged bilinearly to the image's size."""

    def __init__(self, image_size: int, resolution: int):
        self.image_size = image_size
        self.picture = nnx.Param(jnp.zeros((resolution, resolution, 3)))

    def __call__(self, features: Array) -> Array:
        """Returns the prompt `[H, W, 3]`, whatever the features."""
        del features
        return jax.image.resize(self.picture[...], (self.image_size, self.image_size, 3), "linear")


class Frame(nnx.Module):
    """A border of free pixels around an untouched centre."""

    def __init__(self, image_size: int, width: int):
        border = np.ones((image_size, image_size), bool)
        border[width : image_size - width, width : image_size - width] = False
        self.image_size = image_size
        self.width = width
        self.border = nnx.Param(jnp.zeros((int(border.sum()), 3)))

    def __call__(self, features: Array) -> Array:
        """Returns the prompt `[H, W, 3]`, whatever the features."""
        del features
        size, width = self.image_size, self.width
        inside = (np.arange(size) >= width) & (np.arange(size) < size - width)
        rows, columns = np.nonzero(~np.outer(inside, inside))
        return jnp.zeros((size, size, 3)).at[rows, columns].set(self.border[...])


def full_overlay(image_size: int) -> PromptGenerator:
    """Returns one free colour per pixel, 3·H² parameters.

    Example:
      >>> generator = full_overlay(32)
      >>> generator.generate(generator.init(jax.random.key(0)), jnp.zeros((1, 0))).shape
      (32, 32, 3)
    """
    return from_module(lambda rngs: Overlay(image_size, image_size))


def low_resolution_overlay(image_size: int, resolution: int = 8) -> PromptGenerator:
    """Returns a picture of `resolution`² colours enlarged bilinearly, 3·resolution² parameters.

    Few parameters mean little variance: the second moment of SPSA grows with their number.

    Raises:
      ValueError: the resolution is not between 1 and the image's size.

    Example:
      >>> generator = low_resolution_overlay(32, resolution=8)
      >>> generator.init(jax.random.key(0))["picture"].shape
      (8, 8, 3)
    """
    if not 1 <= resolution <= image_size:
        raise ValueError(f"resolution must be between 1 and the image size {image_size}, got {resolution}")
    return from_module(lambda rngs: Overlay(image_size, resolution))


def frame(image_size: int, width: int) -> PromptGenerator:
    """Returns a free border of `width` pixels.

    Source: Bahng et al., 2022, "Exploring Visual Prompts for Adapting Large-Scale Models" (30 of 224 pixels).

    Raises:
      ValueError: the border is empty or leaves no centre.

    Example:
      >>> generator = frame(32, width=4)
      >>> generator.init(jax.random.key(0))["border"].shape
      (448, 3)
    """
    if not 0 < 2 * width < image_size:
        raise ValueError(f"width must be between 1 and {(image_size - 1) // 2}, got {width}")
    return from_module(lambda rngs: Frame(image_size, width))
