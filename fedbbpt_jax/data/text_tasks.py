"""Few-shot tasks of labelled texts: the table's, or those of any file, folder or hub data set. Strings, no tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedbbpt_jax.data.few_shot import class_ranks, stratified_part, stratified_sample
from fedbbpt_jax.data.image_rows import Splits, choose_splits, used_splits
from fedbbpt_jax.data.image_tasks import HUB_ID, TEST_SEED, TEST_SHARE, name_of
from fedbbpt_jax.data.text_datasets import TEXT_TASKS
from fedbbpt_jax.data.text_files import find_split_files, read_table
from fedbbpt_jax.data.text_folders import default_folder, holds_files, read_files
from fedbbpt_jax.data.text_hub import read_hub_tables
from fedbbpt_jax.data.text_rows import (
    Classes,
    LabelledTexts,
    TextColumns,
    TextRows,
    Texts,
    TextTable,
    find_columns,
    label_tables,
)
from fedbbpt_jax.data.text_templates import check_template
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.types import Metric

Keep = Callable[[Sequence[Texts]], np.ndarray]
"""`texts -> bool [n]`, which examples may be drawn."""


class TaskTexts(NamedTuple):
    """Few-shot texts of one seed, and the words that name their classes.

    Attributes:
      name: as in the table of tasks, or of the data.
      source: the file, folder or hub id that the texts came from.
      class_names: N names, in the order of the labels.
      template: what a masked language model is asked, with one `[MASK]`; empty where none was given.
      label_words: N words for the mask, with the space before them.
      class_texts: N texts for an encoder of sentences.
      metric: what the papers report.
      train: the shots, to be split among clients.
      validation: for choices; disjoint from `train`.
      test: for one report at the end; the same for every seed.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    template: str
    label_words: tuple[str, ...]
    class_texts: tuple[str, ...]
    metric: Metric
    train: TextRows
    validation: TextRows
    test: TextRows


def load_text_task(
    name: str,
    *,
    data: str | None = None,
    revision: str | None = None,
    columns: TextColumns | None = None,
    template: str | None = None,
    label_words: Sequence[str] = (),
    class_texts: Sequence[str] = (),
    shots: int = 16,
    seed: int = 0,
    test_limit: int | None = None,
    keep: Keep | None = None,
) -> TaskTexts:
    """Returns a few-shot task of texts, with labels int32 that are places among the class names.

    `shots` examples per class are drawn for training and as many, or what is left, for validation: from the validation
    split, or from the rest of `train` where there is none or it serves as the test, as GLUE's does. The test is the
    whole test split, or a stratified part of it; of a source with a single split, 30 % of each class are the test.

    Differs from the papers: an example whose texts occur before it in `train`, or in the test, is not drawn, so that
    no text is in two parts; spaces around a text are removed. Papers use the seeds 13, 21, 42, 87 and 100 (LM-BFF);
    the same seed draws other examples there.

    Args:
      name: a row of `TEXT_TASKS`, or any other name (empty: that of the data) with `data`.
      data: a csv, tsv, jsonl or parquet file, a folder of them, or a hub id. If left out, the task's files below the
        folder that the environment variable FEDBBPT_DATA names, and if it has none, the hub's.
      revision: a branch, tag or commit of the hub's.
      columns: names of the columns of texts and label, where they cannot be found.
      template: such as "{0} It was [MASK]." or "{0}[SEP]{1}? [MASK],", instead of the table's.
      label_words: N words, instead of the table's; the class names for data of no table.
      class_texts: N texts, likewise.
      shots: training examples per class.
      seed: draws training and validation examples.
      test_limit: at most so many test examples, the same for every seed.
      keep: which examples to draw from and to test on, such as `texts_that_fit`; all if left out.

    Raises:
      TaskError: the data cannot be read, the template does not suit them, or a class has too few examples.
    """
    if data is None and name not in TEXT_TASKS:
        raise TaskError(f"unknown text task {name!r}; expected one of {', '.join(TEXT_TASKS)}, or data")
    if shots < 1 or (test_limit is not None and test_limit < 1):
        raise TaskError(f"shots and test_limit must be at least 1, got {shots} and {test_limit}")
    row = TEXT_TASKS.get(name)
    source = str(data or default_folder(name) or TEXT_TASKS[name].hub_id)
    texts = read_texts(source, name, columns, revision)
    if not (row or label_words) and texts.numbered:
        first, *_, last = texts.class_names
        raise TaskError(f"{source} has the labels {first} to {last} and no names for them; expected label words")
    names, num_texts = texts.class_names, len(texts.train.texts[0])
    words = tuple(label_words) or (row.label_words if row else tuple(f" {name}" for name in names))
    described = tuple(class_texts) or (row.class_texts if row else tuple(word.strip() for word in words))
    for what, given in (("label words", words), ("class texts", described)):
        if len(given) != len(names):
            raise TaskError(
                f"{source} has {len(names)} classes ({', '.join(names)}); expected as many {what}, got {len(given)}"
            )
    asked = template or (row.template if row else "")
    asked = check_template(asked, num_texts) if asked else ""
    parts = draw(_kept(texts, keep, source), shots, seed, test_limit, source)
    metric = row.metric if row else "accuracy"
    return TaskTexts(name or name_of(source), source, names, asked, words, described, metric, *parts)


def read_texts(
    source: str, name: str = "", columns: TextColumns | None = None, revision: str | None = None
) -> LabelledTexts:
    """Returns the labelled texts of a file or folder, or of the hub where there is no such file or folder.

    Args:
      source: a file, a folder or a hub id.
      name: of a row of `TEXT_TASKS`, which knows the splits, columns and classes, or any other.
      columns: which columns to read, where they have to be named.
      revision: of the hub's data set.

    Raises:
      TaskError: they cannot be read.
    """
    row = TEXT_TASKS.get(name)
    wanted, path = row.splits if row else None, Path(source).expanduser()
    if path.exists() and revision is not None:
        raise TaskError(f"{path} is here, and a revision is of the hub's data sets; got revision {revision!r}")
    if not path.exists() and not HUB_ID.fullmatch(source):
        raise TaskError(
            f"cannot load {source!r}: it is not here; expected a file, a folder, or the id of a hub data set"
        )
    if path.is_dir():
        tables, splits = _read_folder(path, name, wanted)
    elif path.exists():
        tables, splits = {"train": [read_table(path)]}, Splits("train", None, None)
    else:
        tables, splits = read_hub_tables(source, row.config if row else None, revision, wanted)
    usual, classes, clean = (row.columns, row.classes, row.clean) if row else (TextColumns(), Classes(), str.strip)
    named = columns or TextColumns()
    found = {find_columns(part.features, named, usual, source) for parts in tables.values() for part in parts}
    if len(found) > 1:
        raise TaskError(f"{source} has its texts and labels in other columns here than there: {sorted(found)}")
    texts = label_tables(tables, found.pop(), classes, splits, source, clean)
    if len(texts.class_names) < 2:
        raise TaskError(f"{source} has one class ({', '.join(texts.class_names)}); expected at least 2")
    return texts


def _read_folder(folder: Path, name: str, wanted: Splits | None) -> tuple[dict[str, list[TextTable]], Splits]:
    if holds_files(name, folder):
        tables = read_files(name, folder)
        return tables, Splits("train", None, "test" if "test" in tables else None)
    files = find_split_files(folder)
    splits = choose_splits(files, wanted, str(folder))
    return {split: [read_table(path) for path in files[split]] for split in used_splits(splits)}, splits


def draw(
    texts: LabelledTexts, shots: int, seed: int, test_limit: int | None, source: str
) -> tuple[TextRows, TextRows, TextRows]:
    """Returns the examples of a task, for training, validation and test; no text is in two of them.

    Args:
      texts: the data set.
      shots: training examples per class, and at most so many for validation.
      seed: draws training and validation examples.
      test_limit: at most so many test examples, which no seed changes.
      source: where the texts lie, for errors.

    Raises:
      TaskError: a class has no validation or test examples, or not enough to train on.
    """
    names, train, validation, test = texts.class_names, texts.train, texts.validation, texts.test
    if test is None:
        train = _distinct(train)
        held_out = stratified_part(train.labels, TEST_SHARE, TEST_SEED)
        train, test = (train.take(np.flatnonzero(mask)) for mask in (~held_out, held_out))
    validation = validation and _distinct(validation, test.texts)
    train = _distinct(train, (*test.texts, *(validation.texts if validation else ())))
    ranks = class_ranks(train.labels, (seed, 0))
    if validation is None:
        _check_counts(train, shots + 1, f"{shots} shots and 1 to validate were asked for", names, source)
        validation = train.take(np.flatnonzero((ranks >= shots) & (ranks < 2 * shots)))
    else:
        _check_counts(train, shots, f"{shots} shots were asked for", names, source)
        _check_counts(validation, 1, "1 to validate is needed", names, source)
        validation = validation.take(np.flatnonzero(class_ranks(validation.labels, (seed, 1)) < shots))
    _check_counts(test, 1, "1 to test is needed", names, source)
    if test_limit is not None:
        test = test.take(stratified_sample(test.labels, test_limit, TEST_SEED))
    return train.take(np.flatnonzero(ranks < shots)), validation, test


def _distinct(rows: TextRows, elsewhere: Collection[Texts] = ()) -> TextRows:
    """Returns the first example of each text, without those that are `elsewhere`."""
    seen = set(elsewhere)
    fresh = [not (texts in seen or seen.add(texts)) for texts in rows.texts]
    return rows.take(np.flatnonzero(fresh))


def _check_counts(rows: TextRows, least: int, reason: str, class_names: Sequence[str], source: str) -> None:
    counts = np.bincount(rows.labels, minlength=len(class_names))
    if counts.min() < least:
        name = class_names[int(counts.argmin())]
        raise TaskError(f"{source}: class {name!r} has {counts.min()} different examples, and {reason}")


def _kept(texts: LabelledTexts, keep: Keep | None, source: str) -> LabelledTexts:
    if keep is None:
        return texts

    def part(rows: TextRows) -> TextRows:
        return rows.take(np.flatnonzero(keep(rows.texts)))

    validation, test = (rows and part(rows) for rows in (texts.validation, texts.test))
    return texts._replace(train=part(texts.train), validation=validation, test=test)
