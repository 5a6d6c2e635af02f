"""What stands between a digit and the black box: fixed sensor faults, light, distractors, spurious colours.

Each shift maps clean images `[n, H, W, 3]` in [0, 1] to shifted ones. Patterns are drawn once from a fixed seed, so a
prompt can learn them; noise and distractors are drawn per image from the generator that is passed in.
"""

from __future__ import annotations

import colorsys

import numpy as np

from fedbbpt_jax.data.digits import CANVAS, Scans, paint

PATTERN_SEED = 7


def mix(images: np.ndarray, pattern: np.ndarray, strength: float) -> np.ndarray:
    """Returns (1 - strength)·image + strength·pattern, in [0, 1]."""
    return np.clip((1 - strength) * images + strength * pattern, 0, 1).astype(np.float32)


def sensor_pattern() -> np.ndarray:
    """Returns a faulty CMOS sensor's fixed pattern `[H, W, 3]`: column and row offsets per channel, and vignetting."""
    rng = np.random.default_rng(PATTERN_SEED)
    columns = rng.normal(0, 0.25, (1, CANVAS, 3))
    rows = rng.normal(0, 0.15, (CANVAS, 1, 3))
    offset = np.linspace(-1, 1, CANVAS)
    distance = offset[:, None] ** 2 + offset[None] ** 2  # 0 in the middle, 2 in the corners
    return np.clip((0.6 + columns + rows) * (1 - 0.3 * distance[..., None]), 0, 1).astype(np.float32)


def block_pattern() -> np.ndarray:
    """Returns random colours in blocks of 5 pixels, rotated by 0.35 rad so that no grid of a prompt fits them."""
    colours = np.random.default_rng(PATTERN_SEED + 1).random((16, 16, 3))
    y, x = np.mgrid[:CANVAS, :CANVAS] - CANVAS / 2
    u = np.cos(0.35) * x - np.sin(0.35) * y
    v = np.sin(0.35) * x + np.cos(0.35) * y
    return colours[(v // 5).astype(int) + 8, (u // 5).astype(int) + 8].astype(np.float32)


def fixed_pattern_noise(images: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Returns images with a fixed offset and gain per pixel and channel, and read noise of each exposure."""
    fixed = np.random.default_rng(PATTERN_SEED + 2)
    gain = 1 + 0.5 * fixed.normal(0, 1, images.shape[1:])
    exposed = mix(np.clip(images * gain, 0, 1), block_pattern(), strength)
    return np.clip(exposed + rng.normal(0, 0.08, images.shape), 0, 1).astype(np.float32)


def dark(images: np.ndarray, gain: float) -> np.ndarray:
    """Returns underexposed images: a gain below 1 and 8-bit rounding."""
    return (np.round(images * gain * 255) / 255).astype(np.float32)


def colour_cast(images: np.ndarray, strength: float) -> np.ndarray:
    """Returns images under a warm light: red lifted, blue removed."""
    return mix(images, np.array([1.0, 0.55, 0.0]), strength)


def distractor(images: np.ndarray, scans: Scans, rng: np.random.Generator) -> np.ndarray:
    """Returns images shrunk to a small digit at a corner, with a larger digit of another scan beside it.

    The label is the small digit's. After Loc-MNIST of Oh et al., 2023, "BlackVIP", where a small true digit lies at
    the edge and a larger random one in the middle.
    """
    n = len(images)
    small = images.reshape(n, CANVAS // 2, 2, CANVAS // 2, 2, 3).mean((2, 4))  # [n, 16, 16, 3]
    canvas = np.zeros_like(images)
    other = scans.glyphs[rng.integers(0, len(scans.classes), n)]
    white = np.ones((n, 3))
    canvas = paint(canvas, other, np.full(n, 22.0), rng.uniform(8, 11, n), rng.uniform(8, 11, n), white)
    canvas[:, : CANVAS // 2, : CANVAS // 2] = np.maximum(canvas[:, : CANVAS // 2, : CANVAS // 2] * 0.3, small)
    return canvas.astype(np.float32)


def tied_background(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator, shifted: bool) -> np.ndarray:
    """Returns images on backgrounds whose colour names the label, correctly or, where `shifted`, wrongly.

    9 of 10 backgrounds follow the rule, the others are random. After Biased-MNIST (Bahng et al., 2020).
    """
    hues = np.array([colorsys.hsv_to_rgb(i / 10, 0.9, 0.6) for i in range(10)])
    named = (labels + 5) % 10 if shifted else labels
    index = np.where(rng.random(len(labels)) < 0.9, named, rng.integers(0, 10, len(labels)))
    background = hues[index][:, None, None, :]
    return (background * (1 - images) + images).astype(np.float32)
