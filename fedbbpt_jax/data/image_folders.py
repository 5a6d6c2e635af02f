"""Image folders: `DIR/train/CLASS/*.jpg` beside validation and test, or `DIR/CLASS/*.jpg` alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedbbpt_jax.data.image_rows import (
    Encoded,
    ImageRows,
    LabelledImages,
    Splits,
    assemble,
    choose_splits,
    split_name,
    used_splits,
)
from fedbbpt_jax.errors import TaskError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"}
)


# Listed here rather than by `datasets`, which would copy every image into a table under the user's cache.
def read_image_folder(folder: Path, wanted: Splits | None = None) -> LabelledImages:
    """Returns the images below `folder`, whose sub-folders name the classes; only names are read.

    Classes are the folders of all splits that are used, sorted, as numbers where all are numbers. Images may lie
    deeper inside a class; files that are no images, and what a dot begins, do not count.

    Args:
      folder: has split folders of class folders, or class folders.
      wanted: which splits play which part; by name if left out.

    Raises:
      TaskError: there are no class folders or no images, or no split to train on.
    """
    splits = _split_folders(folder)
    chosen = choose_splits(splits, wanted, str(folder))
    listed = {name: {c.name: _images_below(c) for c in _folders(splits[name])} for name in used_splits(chosen)}
    names = {class_name for classes in listed.values() for class_name in classes}
    if not any(images for classes in listed.values() for images in classes.values()):
        lying = " (images lie in it without one)" if any(_direct_images(splits[name]) for name in listed) else ""
        raise TaskError(f"{folder} has no images in class folders{lying}; expected CLASS/*.jpg or train/CLASS/*.jpg")
    numbers = all(name.isdecimal() for name in names)
    ordered = sorted(names, key=lambda name: (int(name) if numbers else 0, name))
    return assemble(ordered, {name: _rows(classes, ordered) for name, classes in listed.items()}, chosen)


def _split_folders(folder: Path) -> dict[str, Path]:
    """Returns name to folder of each split; a folder called train that holds images itself is a class."""
    named = {split_name(child.name): child for child in _folders(folder)}
    if "train" in named and not _direct_images(named["train"]):
        return named
    if named and set(named) <= {"validation", "test"}:
        return named
    return {"train": folder}


def _rows(classes: dict[str, list[Path]], ordered: list[str]) -> ImageRows:
    paths = [path for name in ordered for path in classes.get(name, [])]
    counts = [len(classes.get(name, [])) for name in ordered]

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for row in rows:
            yield str(paths[row]), _content(paths[row])

    return ImageRows(np.repeat(np.arange(len(ordered), dtype=np.int32), counts), read)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot read the image {path}: {error.strerror}") from error


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _direct_images(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if _is_image(child)]


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
