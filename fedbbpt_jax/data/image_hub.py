"""Images of the Hugging Face hub, through its `datasets` library."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from datasets.config import HF_CACHE_HOME
from datasets.exceptions import DatasetsError

from fedbbpt_jax.data.image_columns import Columns, ImageTable, encoded_cell, find_columns, label_tables
from fedbbpt_jax.data.image_rows import Encoded, LabelledImages, Splits, choose_splits, split_name, used_splits
from fedbbpt_jax.errors import TaskError


def read_hub(
    hub_id: str,
    config: str | None = None,
    revision: str | None = None,
    wanted: Splits | None = None,
    columns: Columns | None = None,
) -> LabelledImages:
    """Returns the images of a data set of the hub, downloaded into the cache of `datasets` if they are not there yet.

    `HF_HUB_OFFLINE=1` uses the cache alone, `HF_HOME` moves it. `datasets` downloads all splits of a configuration.

    Args:
      hub_id: such as "timm/eurosat-rgb".
      config: the name of its configuration, where it has several.
      revision: a branch, tag or commit.
      wanted: which splits play which part; by name if left out.
      columns: which columns to read; found if left out.

    Raises:
      TaskError: it cannot be loaded, a column cannot be found, or a label has no name.
    """
    available = load_hub(hub_id, config, revision)
    splits = choose_splits(available, wanted, hub_id)
    used = {name: available[name] for name in used_splits(splits)}
    features = used[used_splits(splits)[0]].features
    columns = find_columns(features, columns or Columns(), hub_id)
    tables = {name: [_table(split, columns, hub_id)] for name, split in used.items()}
    return label_tables(tables, features[columns.label], columns, (), splits, hub_id)


def load_hub(hub_id: str, config: str | None = None, revision: str | None = None) -> dict[str, datasets.Dataset]:
    """Returns the splits of a data set of the hub by name, `train`, `validation` and `test` for the usual spellings.

    Args:
      hub_id: such as "timm/eurosat-rgb".
      config: the name of its configuration, where it has several.
      revision: a branch, tag or commit.

    Raises:
      TaskError: it cannot be loaded.
    """
    try:
        with _quiet():
            loaded: Any = datasets.load_dataset(hub_id, config, revision=revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(
            f"cannot load {hub_id!r}: not a folder here, and the hub could not be reached or does not have it "
            f"({reason}); pass a local folder, or fill the cache {HF_CACHE_HOME}"
        ) from error
    return {split_name(str(name)): split for name, split in loaded.items()}


def _table(split: datasets.Dataset, columns: Columns, hub_id: str) -> ImageTable:
    images = split.select_columns([columns.image]).cast_column(columns.image, datasets.Image(decode=False))

    def read(rows: np.ndarray) -> Iterator[Encoded]:
        for row in rows:
            yield encoded_cell(images[int(row)][columns.image], f"{hub_id} row {row}")

    others: Any = split.select_columns(columns.without_image).with_format("arrow")
    return ImageTable(others[:], read)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Runs the body without the progress bars and log lines of the hub's libraries, and leaves both as they were."""
    bars_were_off = datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars_were_off:
            datasets.enable_progress_bars()
