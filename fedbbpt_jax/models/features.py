"""Frozen features of images, computed once per image: what a coordinator sees."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from fedbbpt_jax.models.classifiers import as_float
from fedbbpt_jax.models.loading import PixelFormat, PretrainedViT


def vit_features(vit: PretrainedViT, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Returns the last state of the class token of each image, float32 `[n, F]`.

    Differs from BlackVIP: images are normalised as the encoder was trained, not as CLIP was.

    Args:
      vit: a loaded ViT-MAE, ViT or DINO.
      images: float in [0, 1] or uint8 `[n, H, W, 3]`; resized (bicubic) where the encoder wants another size.
      batch_size: most images in flight at once.
    """
    num_batches = -(-len(images) // batch_size)
    rows = np.arange(num_batches * -(-len(images) // num_batches)).reshape(num_batches, -1)
    batches = (images[np.minimum(r, len(images) - 1)] for r in rows)  # the last image fills the last batch
    features = [np.asarray(_encode(vit.graphdef, vit.pixels.size, vit.params, vit.pixels, batch)) for batch in batches]
    return np.concatenate(features)[: len(images)]


@partial(jax.jit, static_argnums=(0, 1))
def _encode(graphdef: nnx.GraphDef, size: int, params: Any, pixels: PixelFormat, images: Array) -> Array:
    encoder: Any = nnx.merge(graphdef, params)
    with jax.default_matmul_precision("highest"):
        resized = jax.image.resize(as_float(images), (len(images), size, size, 3), "cubic")
        return encoder.features((resized - pixels.mean) / pixels.std)
