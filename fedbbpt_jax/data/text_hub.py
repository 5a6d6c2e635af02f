"""Texts of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import datasets

from fedbbpt_jax.data.image_hub import load_hub
from fedbbpt_jax.data.image_rows import Splits, choose_splits, used_splits
from fedbbpt_jax.data.text_rows import TextTable


def read_hub_tables(
    hub_id: str, config: str | None = None, revision: str | None = None, wanted: Splits | None = None
) -> tuple[dict[str, list[TextTable]], Splits]:
    """Returns the splits of a data set of the hub that are used, by name, and which part they play.

    Args:
      hub_id: such as "nyu-mll/glue".
      config: the name of its configuration, where it has several.
      revision: a branch, tag or commit.
      wanted: which splits play which part; by name if left out.

    Raises:
      TaskError: it cannot be loaded, or has no split to train on.
    """
    available = load_hub(hub_id, config, revision)
    splits = choose_splits(available, wanted, hub_id)
    return {name: [_table(available[name])] for name in used_splits(splits)}, splits


def _table(split: datasets.Dataset) -> TextTable:
    rows: Any = split.with_format("arrow")
    return TextTable(rows[:], split.features)
