"""Images in memory: decoded, cropped as CLIP does, and what a prompt generator sees of them without a model."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from fedbbpt_jax.errors import TaskError

Transform = Callable[[Image.Image], np.ndarray]
"""An upright RGB image of any size to uint8 `[S, S, 3]`, the same S for all."""


def decode_image(encoded: bytes, name: str) -> Image.Image:
    """Returns the image that a file holds, upright and in RGB.

    A camera's note of how it was held (EXIF orientation) is applied, as `datasets` does and a person expects; CLIP's
    processor alone ignores it. 16-bit grey values lose their lower byte.

    Args:
      encoded: a file's content: JPEG, PNG, WebP, or whatever else Pillow reads.
      name: the file's, for the error.

    Raises:
      TaskError: Pillow cannot read it, or it is cut short.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of faulty metadata beside pixels that can be read
            image = Image.open(io.BytesIO(encoded))
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would clip these at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise what they meet: OSError, SyntaxError, RuntimeError, ...
        raise TaskError(f"cannot read the image {name}: {' '.join(str(error).split())}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image in RGB, what is transparent on white, as CLIP's processor has it."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(size: int = 224) -> Transform:
    """Returns the transform of CLIP's processor: RGB, shortest side resized to `size` (bicubic), the middle square.

    Bit by bit what `CLIPImageProcessorPil` gives without rescaling and normalising.

    Args:
      size: S, pixels.

    Raises:
      ValueError: the size is not positive.

    Example:
      >>> center_crop(4)(Image.new("L", (20, 10), 255)).shape
      (4, 4, 3)
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")

    def transform(image: Image.Image) -> np.ndarray:
        short = min(image.size)
        width, height = (size if side == short else int(size * side / short) for side in image.size)
        resized = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return np.asarray(resized.crop((left, top, left + size, top + size)))

    return transform


def grid_means(images: np.ndarray, grid: int = 4) -> np.ndarray:
    """Returns the mean colours of `grid`² cells, centred: float32 `[n, 3·grid²]` of images `[n, H, W, 3]`.

    What a coordinator sees of an image where no local encoder is at hand: it stays with the client and costs nothing.

    Args:
      images: floats in [0, 1], or uint8, which count as 1/255.
      grid: cells along each side; they differ by at most one pixel where a side is not divisible.

    Raises:
      ValueError: a side is shorter than the grid.
    """
    n, height, width, _ = images.shape
    if min(height, width) < grid:
        raise ValueError(f"images must have at least {grid} pixels a side, got {height}x{width}")
    rows, columns = (np.arange(grid + 1) * side // grid for side in (height, width))
    cells = [
        images[:, top:bottom, left:right].mean((1, 2))
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]
    white = 255 if images.dtype == np.uint8 else 1
    return (np.stack(cells, 1).reshape(n, -1) / white - 0.5).astype(np.float32)
