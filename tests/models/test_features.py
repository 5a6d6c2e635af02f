"""Features of images, computed in batches."""

import numpy as np
import pytest
from random_checkpoints import RANDOM, compiled, random_network
from transformers import ViTConfig

from fedbbpt_jax.models.features import vit_features
from fedbbpt_jax.models.loading import PixelFormat, PretrainedViT
from fedbbpt_jax.models.vit_mae import ViTEncoder

SIZE, BATCH = 16, 4
PIXELS = PixelFormat(SIZE, np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.3, 0.4]))
ATOL = 1e-5  # float32, of features of size 3


@pytest.fixture(scope="module")
def vit() -> PretrainedViT:
    config = ViTConfig(**RANDOM, image_size=SIZE, patch_size=8)
    return PretrainedViT(*random_network(ViTEncoder, config), PIXELS)


@pytest.fixture(scope="module")
def images():
    """More than two batches, and not a whole number of them."""
    return np.random.default_rng(0).integers(0, 256, (2 * BATCH + 1, SIZE, SIZE, 3), np.uint8)


def test_features_are_those_of_the_normalised_images(vit, images):
    expected = compiled(ViTEncoder.features, vit, (images / np.float32(255) - PIXELS.mean) / PIXELS.std)
    features = vit_features(vit, images, batch_size=BATCH)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=ATOL)
    assert np.ptp(features, axis=0).max() > 0.1  # the images differ


def test_batches_change_nothing(vit, images):
    np.testing.assert_allclose(
        vit_features(vit, images, batch_size=BATCH), vit_features(vit, images, batch_size=len(images)), atol=ATOL
    )


def test_bytes_and_fractions_have_the_same_features(vit, images):
    fractions = images / np.float32(255)
    np.testing.assert_allclose(
        vit_features(vit, fractions, batch_size=BATCH), vit_features(vit, images, batch_size=BATCH), atol=ATOL
    )


@pytest.mark.parametrize("size", [12, 32])
def test_images_of_another_size_are_resized(vit, size):
    """An image of one colour looks the same at any size."""
    colours = np.random.default_rng(0).random((BATCH, 1, 1, 3), np.float32)
    other, own = (np.tile(colours, (1, side, side, 1)) for side in (size, SIZE))
    np.testing.assert_allclose(
        vit_features(vit, other, batch_size=BATCH), vit_features(vit, own, batch_size=BATCH), atol=1e-4
    )  # rounding of the resized pixels, over a deviation of 0.2
