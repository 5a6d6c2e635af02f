"""Labelled texts: the common form of tables in files and on the hub, and what their labels mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from fedbbpt_jax.data.image_rows import Splits
from fedbbpt_jax.errors import TaskError

Texts = tuple[str, ...]
"""One example: a text, or two."""


class TextRows(NamedTuple):
    """One split, or a part of it.

    Attributes:
      texts: of each example, as many as it has.
      labels: int32 `[n]`, places in the class names.
    """

    texts: tuple[Texts, ...]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> TextRows:
        """Returns the split that has only `rows`."""
        return TextRows(tuple(self.texts[row] for row in rows), self.labels[rows])


class LabelledTexts(NamedTuple):
    """A data set.

    Attributes:
      class_names: N names.
      train: to draw shots from.
      validation: to draw validation examples from, or None where `train` must give them.
      test: None where the source has one split only.
      numbered: the source has numbers and no names, which are those numbers then.
    """

    class_names: tuple[str, ...]
    train: TextRows
    validation: TextRows | None
    test: TextRows | None
    numbered: bool = False


class TextColumns(NamedTuple):
    """Which columns hold the one or two texts, and the label; empty ones are found by their usual names."""

    texts: tuple[str, ...] = ()
    label: str = ""


class Classes(NamedTuple):
    """What the labels of a known data set are.

    Attributes:
      names: N names, in the order of the labels; empty for a data set that is not known.
      codes: N other spellings of the same, such as "1" for the first class.
      unlabelled: values of examples that have no label, which are left out.
    """

    names: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()


class TextTable(NamedTuple):
    """A table as a file or the hub has it, and the types of its columns."""

    columns: pa.Table
    features: datasets.Features


LABEL_COLUMNS = ("label", "labels", "gold_label", "coarse_label", "class", "target", "category")
PAIR_COLUMNS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)
TEXT_COLUMNS = ("text", "sentence", "content", "question", "review", "description")


def find_columns(features: datasets.Features, named: TextColumns, usual: TextColumns, source: str) -> TextColumns:
    """Returns the columns of texts and label as they are there.

    Args:
      features: of the table.
      named: by the user; what is named must be there.
      usual: of a known data set, taken where they are there. As many texts as it has are expected.
      source: where the table lies, for errors.

    Raises:
      TaskError: a column is not there, or none can be found.
    """
    listed = f"{source} has the columns {', '.join(features)}"
    missing = [name for name in (*named.texts, named.label) if name and name not in features]
    if missing:
        raise TaskError(f"{listed}; it has no column {missing[0]!r}")
    labels = [named.label] if named.label else [usual.label, *LABEL_COLUMNS]
    label = next((name for name in labels if name in features), "")
    if not label:
        raise TaskError(
            f"{listed} (the first line of a csv or tsv file names them); expected labels in one called "
            f"{', '.join(LABEL_COLUMNS[:-1])} or {LABEL_COLUMNS[-1]}, or that you name it"
        )
    others = [name for name in features if name != label and _is_text(features[name])]
    choices = (
        usual.texts,
        *PAIR_COLUMNS,
        *((name,) for name in TEXT_COLUMNS),
        tuple(others) if len(others) == 1 else (),
    )
    expected = (len(usual.texts),) if usual.texts else (1, 2)
    found = (named.texts,) if named.texts else choices
    texts = next((names for names in found if len(names) in expected and set(names) <= set(others)), None)
    if texts is None:
        known = " or ".join(TEXT_COLUMNS[:2]) if expected == (1,) else " and ".join(PAIR_COLUMNS[1])
        count = " or ".join(str(number) for number in expected)
        raise TaskError(f"{listed}; expected {count} of texts beside {label!r}, called {known}, or that you name them")
    return TextColumns(texts, label)


def _is_text(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in ("string", "large_string", "string_view")


def label_tables(
    tables: dict[str, list[TextTable]],
    columns: TextColumns,
    classes: Classes,
    splits: Splits,
    source: str,
    clean: Callable[[str], str] = str.strip,
) -> LabelledTexts:
    """Returns the data set whose labels are places among the class names.

    Examples without a label by `classes.unlabelled`, and those with an empty text, are left out.

    Args:
      tables: the files of each split, by its name.
      columns: where texts and label are, in every table.
      classes: what the labels are; without names, the classes are those that the table declares, or else the values
        that are found, sorted.
      splits: which splits play which part.
      source: where the tables lie, for errors.
      clean: applied to every text.

    Raises:
      TaskError: a label is missing or unknown, or nothing is left of a split.
    """
    raw: dict[str, list[tuple[Texts, str]]] = {name: [] for name in tables}
    for name, table in ((name, table) for name, parts in tables.items() for table in parts):
        texts = zip(*(table.columns[column].to_pylist() for column in columns.texts), strict=True)
        values = _spelled(table, columns.label, classes.unlabelled, f"{source} ({name})")
        cleaned = (tuple(clean(text or "") for text in example) for example in texts)
        raw[name] += [row for row in zip(cleaned, values, strict=True) if row[1] not in classes.unlabelled]
    found = {name: {value for _, value in rows} for name, rows in raw.items()}
    declared = getattr(next(iter(tables.values()))[0].features[columns.label], "names", None)
    if classes.names:
        # Each split by itself: of AG News, one file has names and another numbers.
        names, numbered = classes.names, False
        places = {name: _places(values, classes, source) for name, values in found.items()}
    else:
        names, numbered = _own_names(set().union(*found.values()), tuple(declared or ()), source)
        own = {name: place for place, name in enumerate(names)}
        places = dict.fromkeys(found, own)

    def part(wanted: str) -> TextRows:
        rows = [(row[0], places[name][row[1]]) for name in wanted.split("+") for row in raw[name] if all(row[0])]
        if not rows:
            raise TaskError(f"{source} ({wanted}) has no labelled texts in {', '.join(columns.texts)}")
        texts, labels = zip(*rows, strict=True)
        return TextRows(texts, np.array(labels, np.int32))

    validation, test = (None if wanted is None else part(wanted) for wanted in (splits.validation, splits.test))
    return LabelledTexts(names, part(splits.train), validation, test, numbered)


def _spelled(table: TextTable, label: str, unlabelled: Sequence[str], source: str) -> list[str]:
    """Returns the label of each row as text: the name that the table declares for it, if it does."""
    values, names = table.columns[label].to_pylist(), getattr(table.features[label], "names", None)
    spelled = []
    for row, value in enumerate(values):
        if value is None or value != value or not str(value).strip():
            raise TaskError(f"{source} has no label in row {row + 1}; expected one for every text")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if names and isinstance(value, int) and str(value) not in unlabelled:
            if not 0 <= value < len(names):
                raise TaskError(f"{source} has the label {value} in row {row + 1}; expected 0 to {len(names) - 1}")
            value = names[value]
        spelled.append(str(value).strip())
    return spelled


def _own_names(found: set[str], declared: tuple[str, ...], source: str) -> tuple[tuple[str, ...], bool]:
    """Returns the class names of a data set that is not known, and whether they are but numbers."""
    if declared and found <= set(declared):
        return declared, False
    if declared:
        raise TaskError(f"{source} has labels such as {min(found - set(declared))!r}; expected {', '.join(declared)}")
    numbered = all(re.fullmatch(r"-?\d+", value) for value in found)
    return tuple(sorted(found, key=int if numbered else str)), numbered


def _places(found: set[str], classes: Classes, source: str) -> dict[str, int]:
    """Returns the place of each found value among the class names.

    All values are in one spelling: "1" is the second class among 0 and 1, and the first among 1 and 2.
    """
    numbers = tuple(str(place) for place in range(len(classes.names)))
    for spellings in (classes.names, classes.codes, numbers):
        places = {_letters(spelling): place for place, spelling in enumerate(spellings)}
        if all(_letters(value) in places for value in found):
            return {value: places[_letters(value)] for value in found}
    known = {_letters(spelling) for spelling in (*classes.names, *classes.codes, *numbers)}
    wrong = sorted(value for value in found if _letters(value) not in known) or sorted(found)
    raise TaskError(
        f"{source} has the labels {', '.join(map(repr, wrong[:5]))}{', ...' * (len(wrong) > 5)}; expected "
        f"{', '.join(classes.names)}, or 0 to {len(classes.names) - 1} in this order"
    )


def _letters(value: str) -> str:
    """Returns what two spellings of a name have in common; of a number, all of it."""
    return value if re.fullmatch(r"[-+]?\d+", value) else re.sub(r"[\W_]", "", value.lower())
