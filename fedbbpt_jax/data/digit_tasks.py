"""The tasks made of digits that ship with the package. A plain table; adding a task is adding a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedbbpt_jax.data import shifts
from fedbbpt_jax.data.digits import CANVAS, DIGIT_WORDS, Scans, paint, split_scans
from fedbbpt_jax.data.images import grid_means
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.types import Examples, Task

MIN_VALIDATION = 8  # scans per class that are kept from training, however many shots are asked for

Shift = Callable[[np.ndarray, Scans, Scans, np.random.Generator, bool], np.ndarray]
"""`(clean images, their scans, all scans of the part, rng, whether this is the test part) -> images`."""


class DigitTask(NamedTuple):
    """A row of the table: one line of description, and the shift."""

    description: str
    shift: Shift


# Strengths were chosen on validation images (experiments/choose_strengths.py), for headroom between zero-shot and a
# white-box prompt.
DIGIT_TASKS: dict[str, DigitTask] = {
    "clean": DigitTask("digits as they are", lambda x, own, part, rng, test: x),
    "sensor": DigitTask(
        "a faulty sensor: fixed column and row offsets per channel, vignetting (the default)",
        lambda x, own, part, rng, test: shifts.mix(x, shifts.sensor_pattern(), 0.72),
    ),
    "blocks": DigitTask(
        "a fixed pattern of coloured blocks, rotated",
        lambda x, own, part, rng, test: shifts.mix(x, shifts.block_pattern(), 0.55),
    ),
    "fixed-pattern": DigitTask(
        "fixed gain and offset per pixel, with read noise",
        lambda x, own, part, rng, test: shifts.fixed_pattern_noise(x, rng, 0.50),
    ),
    "dark": DigitTask("underexposed, 8-bit", lambda x, own, part, rng, test: shifts.dark(x, 0.06)),
    "cast": DigitTask("a strong warm light", lambda x, own, part, rng, test: shifts.colour_cast(x, 0.7)),
    "loc": DigitTask(
        "a small digit in the corner is the label, a larger one distracts",
        lambda x, own, part, rng, test: shifts.distractor(x, part, rng),
    ),
    "biased": DigitTask(
        "the background's colour names the label in training, another at test",
        lambda x, own, part, rng, test: shifts.tied_background(x, own.classes, rng, test),
    ),
}


def load_digit_task(name: str, *, shots: int = 16, seed: int = 0) -> Task:
    """Returns the task `name` of `DIGIT_TASKS` with `shots` training examples per class drawn by `seed`.

    Test scans, and how they are painted, are the same for every seed. Validation takes the rest of the pool, up to 24
    scans per class. Where more shots are asked for than there are scans, every shot is a painting of its own.

    Raises:
      TaskError: the shots are not positive.
      KeyError: the name is not in the table; `load_task` says it in words.
    """
    shift = DIGIT_TASKS[name].shift
    scans = split_scans()
    train, validation = _draw_shots(scans.pool, shots, seed)
    test = Scans(*(np.concatenate([part] * 2) for part in scans.test))
    rng, test_rng = np.random.default_rng((seed, 1)), np.random.default_rng(0)

    def examples(part: Scans, whole: Scans, rng: np.random.Generator, is_test: bool) -> tuple[Examples, np.ndarray]:
        clean = _paint_clean(part, rng)
        images = shift(clean, part, whole, rng, is_test)
        return Examples(images, grid_means(images), part.classes), clean

    test_examples, clean = examples(test, scans.test, test_rng, True)
    return Task(
        name,
        DIGIT_WORDS,
        ("the digit {}",),
        examples(train, scans.pool, rng, False)[0],
        examples(validation, scans.pool, rng, False)[0],
        test_examples,
        clean,
    )


def _draw_shots(pool: Scans, shots: int, seed: int, max_validation: int = 24) -> tuple[Scans, Scans]:
    """Returns scans to train on and to validate on. Of more shots than there are scans, a class's are used again."""
    if shots < 1:
        raise TaskError(f"shots must be at least 1, got {shots}")
    fewest = int(np.bincount(pool.classes).min())
    distinct = shots if shots < fewest else fewest - MIN_VALIDATION
    rng = np.random.default_rng((seed, 0))
    rows = [rng.permutation(np.flatnonzero(pool.classes == label)) for label in np.unique(pool.classes)]
    train = np.concatenate([np.resize(r[:distinct], shots) for r in rows])
    validation = np.concatenate([r[distinct : distinct + max_validation] for r in rows])
    return pool.take(train), pool.take(validation)


def _paint_clean(scans: Scans, rng: np.random.Generator) -> np.ndarray:
    """Returns light digits on a dark ground, of slightly varied size, place and brightness, `[n, H, W, 3]`."""
    n = len(scans.classes)
    size = rng.uniform(24, 30, n)
    top, left = ((CANVAS - size) / 2 + rng.uniform(-2, 2, n) for _ in range(2))
    ground = np.broadcast_to(rng.uniform(0, 0.1, (n, 1, 1, 1)), (n, CANVAS, CANVAS, 3)).astype(np.float32)
    colour = np.repeat(rng.uniform(0.85, 1.0, (n, 1)), 3, axis=1)
    return paint(ground, scans.glyphs, size, top, left, colour)
