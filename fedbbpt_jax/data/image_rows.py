"""Labelled images that are not decoded yet: the common form of a folder, of parquet files and of a hub data set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fedbbpt_jax.errors import TaskError

Encoded = tuple[str, bytes]
"""What to call an image in an error, and the content of its file."""


class ImageRows(NamedTuple):
    """One split.

    Attributes:
      labels: int32 `[n]`, places in the class names.
      read: rows, ascending, to their encoded images in that order; nothing else is read.
      clients: whose each image is, names or numbers `[n]`, where that was asked for.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], Iterator[Encoded]]
    clients: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> ImageRows:
        """Returns the split that has only `rows`, ascending."""
        clients = None if self.clients is None else self.clients[rows]
        return ImageRows(self.labels[rows], lambda chosen: self.read(rows[chosen]), clients)


class Splits(NamedTuple):
    """Which splits play which part; `"train+validation"` is both together, None is none."""

    train: str
    validation: str | None
    test: str | None


class LabelledImages(NamedTuple):
    """A data set.

    Attributes:
      class_names: N names as the source has them.
      train: to draw shots from.
      validation: to draw validation images from, or None where `train` must give them.
      test: None where the source has one split only.
      numbered: the source has numbers and no names, which are those numbers then.
    """

    class_names: tuple[str, ...]
    train: ImageRows
    validation: ImageRows | None
    test: ImageRows | None
    numbered: bool = False


_ALIASES = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
}
SPLIT_NAMES = ("train", "validation", "test")


def split_name(name: str) -> str:
    """Returns `train`, `validation` or `test` for the usual spellings, any other name as it is.

    Example:
      >>> split_name("Val"), split_name("extra")
      ('validation', 'extra')
    """
    return _ALIASES.get(name.lower(), name.lower())


def choose_splits(available: Collection[str], wanted: Splits | None, source: str) -> Splits:
    """Returns the parts that the splits at hand play.

    The wanted ones if they are all there. Else `train`, `validation` and `test` by name; without a test split the
    validation split is the test, and validation comes from `train`; a single split is `train`.

    Args:
      available: names as `split_name` gives them.
      wanted: how the table of tasks has it, if it does.
      source: where they lie, for the error.

    Raises:
      TaskError: there are several splits and none is for training.
    """
    if wanted and all(name in available for part in wanted if part for name in part.split("+")):
        return wanted
    if len(available) == 1:
        return Splits(next(iter(available)), None, None)
    if "train" not in available:
        raise TaskError(f"{source} has the splits {', '.join(sorted(available)) or 'none'}; expected one called train")
    if "test" in available:
        return Splits("train", "validation" if "validation" in available else None, "test")
    return Splits("train", None, "validation" if "validation" in available else None)


def used_splits(splits: Splits) -> list[str]:
    """Returns the names of the splits that play a part, each once."""
    return list(dict.fromkeys(name for part in splits if part for name in part.split("+")))


def assemble(class_names: Sequence[str], rows: dict[str, ImageRows], splits: Splits) -> LabelledImages:
    """Returns the data set whose parts are made of the splits `rows`, by name."""

    def part(names: str) -> ImageRows:
        return concatenate([rows[name] for name in names.split("+")])

    validation, test = (None if names is None else part(names) for names in (splits.validation, splits.test))
    return LabelledImages(tuple(class_names), part(splits.train), validation, test)


def concatenate(parts: Sequence[ImageRows]) -> ImageRows:
    """Returns the splits `parts` one after the other."""
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for part, start, end in zip(parts, starts[:-1], starts[1:], strict=True):
            yield from part.read(rows[(rows >= start) & (rows < end)] - start)

    owners = [part.clients for part in parts if part.clients is not None]
    return ImageRows(np.concatenate([part.labels for part in parts]), read, np.concatenate(owners) if owners else None)
