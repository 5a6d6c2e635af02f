"""Real handwritten digits from scikit-learn, split once by image and painted onto colour canvases.

The 1,797 scans of `sklearn.datasets.load_digits` (UCI Optical Recognition of Handwritten Digits, CC BY 4.0) are 8x8
grey values. They are split once, stratified by class: PRETRAIN for the shipped models, POOL for shots and validation,
TEST for the reported accuracy. No scan is in two parts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

CANVAS = 32
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PALETTE = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.95, 0.90, 0.15),
    "orange": (0.95, 0.50, 0.05),
    "purple": (0.45, 0.10, 0.60),
    "cyan": (0.10, 0.80, 0.85),
    "pink": (0.95, 0.50, 0.75),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}
COLOURS = np.asarray(list(PALETTE.values()), np.float32)  # [10, 3]


class Scans(NamedTuple):
    """Grey scans `[n, 8, 8]` in [0, 1] and their classes int32 `[n]`."""

    glyphs: np.ndarray
    classes: np.ndarray

    def take(self, indices: np.ndarray) -> Scans:
        """Returns the scans at `indices`."""
        return Scans(self.glyphs[indices], self.classes[indices])


class Split(NamedTuple):
    """The three disjoint parts of the scans: 897, 400 and 500."""

    pretrain: Scans
    pool: Scans
    test: Scans


@functools.cache
def split_scans() -> Split:
    """Returns the fixed, stratified split of the scans by image."""
    from sklearn.datasets import load_digits  # here, because it takes a second that few commands need
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    scans = Scans((np.asarray(pixels).reshape(-1, 8, 8) / 16.0).astype(np.float32), np.asarray(classes, np.int32))
    rest, test = train_test_split(np.arange(len(scans.classes)), test_size=500, stratify=scans.classes, random_state=0)
    pretrain, pool = train_test_split(rest, test_size=400, stratify=scans.classes[rest], random_state=0)
    return Split(*(scans.take(np.sort(part)) for part in (pretrain, pool, test)))


def paint(
    canvas: np.ndarray, glyphs: np.ndarray, size: np.ndarray, top: np.ndarray, left: np.ndarray, colour: np.ndarray
) -> np.ndarray:
    """Returns `canvas` with each glyph blended over it in one colour.

    Args:
      canvas: float32 `[n, H, W, 3]` in [0, 1].
      glyphs: opacity `[n, 8, 8]` in [0, 1], enlarged bilinearly.
      size, top, left: `[n]`, in pixels of the canvas.
      colour: `[n, 3]` in [0, 1].
    """
    rows = _interpolation(canvas.shape[1], size, top)  # [n, H, 8]
    columns = _interpolation(canvas.shape[2], size, left)  # [n, W, 8]
    opacity = np.matmul(np.matmul(rows, glyphs), columns.transpose(0, 2, 1))[..., None]  # [n, H, W, 1]
    return canvas * (1 - opacity) + opacity * colour[:, None, None, :].astype(np.float32)


def _interpolation(length: int, size: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Returns bilinear weights `[n, length, 8]` of 8 source pixels spread over `size` target pixels from `start`."""
    source = (np.arange(length)[None] + 0.5 - start[:, None]) / size[:, None] * 8 - 0.5  # [n, length]
    return np.maximum(0, 1 - np.abs(source[..., None] - np.arange(8))).astype(np.float32)
