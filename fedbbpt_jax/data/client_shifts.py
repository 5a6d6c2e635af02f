"""Feature shift: the pictures of each client have a corruption of their own, as if by its camera and its light."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence

import numpy as np

from fedbbpt_jax.data.shifts import mix

Corruption = Callable[[np.ndarray, np.random.Generator, float], np.ndarray]
"""`(images [n, H, W, 3] in [0, 1], rng, severity in [0, 1]) -> images`, which may leave [0, 1]. Draws are the client's:
one of each kind for all its pictures, except noise, which is drawn per pixel."""


def brightness(images: np.ndarray, rng: np.random.Generator, severity: float) -> np.ndarray:
    """Returns images lighter or darker by up to 0.5.

    Differs from the source in that it adds to each channel, not to the value of HSV, and darkens as often as it
    lightens.
    """
    return images + np.float32(0.5 * severity * rng.choice([-1, 1]))


def contrast(images: np.ndarray, rng: np.random.Generator, severity: float) -> np.ndarray:
    """Returns images whose distance from their mean colour is reduced to as little as 0.05 of what it was."""
    mean = images.mean((1, 2), keepdims=True)
    return mean + np.float32(1 - 0.95 * severity) * (images - mean)


def colour_cast(images: np.ndarray, rng: np.random.Generator, severity: float) -> np.ndarray:
    """Returns images mixed with up to 0.7 of a light of one saturated hue. Not in the source."""
    return mix(images, np.array(colorsys.hsv_to_rgb(rng.random(), 1.0, 1.0)), 0.7 * severity)


def gaussian_noise(images: np.ndarray, rng: np.random.Generator, severity: float) -> np.ndarray:
    """Returns images with independent noise on every value, of a standard deviation of up to 0.38."""
    return images + np.float32(0.38 * severity) * rng.standard_normal(images.shape, np.float32)


def blur(images: np.ndarray, rng: np.random.Generator, severity: float) -> np.ndarray:
    """Returns images blurred by a Gaussian of up to 6/224 of their width, and mirrored at their edges.

    Differs from the source in that it is up to 2 pixels where that is more: a blur of a fraction of a pixel is none.
    """
    sigma = max(6 / 224 * images.shape[2], 2) * severity
    down, across = (_gaussian(side, sigma) for side in images.shape[1:3])
    return np.einsum("hi,niwc->nhwc", down, np.einsum("wj,nijc->niwc", across, images, optimize=True), optimize=True)


CORRUPTIONS: dict[str, Corruption] = {
    "brightness": brightness,
    "contrast": contrast,
    "colour cast": colour_cast,
    "Gaussian noise": gaussian_noise,
    "blur": blur,
}


def shift_clients(images: np.ndarray, parts: Sequence[np.ndarray], seed: int, strength: float = 0.6) -> np.ndarray:
    """Returns the images as their clients see them, each through one of `CORRUPTIONS`: a new array, of the same dtype.

    A client's corruption, its parameters and its noise are drawn from a stream of its own, so that they do not depend
    on the other clients; its severity is uniform between half of `strength` and all of it. What a prompt generator sees
    of the images (`grid_means`) has to be computed anew from the result.

    Args:
      images: uint8, or floats in [0, 1], `[n, H, W, 3]`.
      parts: the rows of each client; rows of no client stay as they are.
      seed: the same seed gives client i the same corruption on every machine.
      strength: 0 changes nothing; 1 is the highest of the source's five severities.

    Raises:
      ValueError: the strength is not between 0 and 1, or these are not images.

    Source: Hendrycks and Dietterich, 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
    Perturbations", section 4.1, for the kinds and their range on ImageNet-C; Li et al., 2022, "Federated Learning on
    Non-IID Data Silos: An Experimental Study", noise-based feature imbalance, for one corruption per client.

    Example:
      >>> grey = np.full((4, 8, 8, 3), 128, np.uint8)
      >>> shifted = shift_clients(grey, [np.array([0, 1]), np.array([2, 3])], seed=0)
      >>> shifted.dtype, shifted.shape, corruption_of(0, seed=0)
      (dtype('uint8'), (4, 8, 8, 3), 'blur')
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    is_bytes = images.dtype == np.uint8
    if images.ndim != 4 or images.shape[-1] != 3 or not (is_bytes or np.issubdtype(images.dtype, np.floating)):
        raise ValueError(f"images must be uint8 or floats [n, H, W, 3], got {images.dtype} {list(images.shape)}")
    shifted = images.copy()
    white = np.float32(255 if is_bytes else 1)
    for client, part in enumerate(parts):
        name, rng = _drawn(client, seed)
        severity = strength * rng.uniform(0.5, 1)
        corrupted = CORRUPTIONS[name](images[part].astype(np.float32) / white, rng, severity)
        corrupted = np.clip(corrupted, 0, 1) * white
        shifted[part] = np.rint(corrupted) if is_bytes else corrupted
    return shifted


def corruption_of(client: int, seed: int) -> str:
    """Returns which of `CORRUPTIONS` the pictures of a client have."""
    return _drawn(client, seed)[0]


def _drawn(client: int, seed: int) -> tuple[str, np.random.Generator]:
    """Returns a client's corruption, and its own stream of what is drawn after it."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(client,)))
    return list(CORRUPTIONS)[rng.integers(len(CORRUPTIONS))], rng


def _gaussian(side: int, sigma: float) -> np.ndarray:
    """Returns the blur of a line of pixels as a matrix, float32 `[side, side]`; outside is the mirror image."""
    if sigma == 0:
        return np.eye(side, dtype=np.float32)
    reach = int(np.ceil(4 * sigma))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    places = np.mod(np.arange(side)[:, None] + offsets, 2 * side)  # of a picture followed by its mirror image
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], np.minimum(places, 2 * side - 1 - places)), kernel / kernel.sum())
    return matrix.astype(np.float32)
