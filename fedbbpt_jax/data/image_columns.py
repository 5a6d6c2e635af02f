"""Images in tables: which columns hold images and labels, and how a folder of parquet files is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedbbpt_jax.data.image_rows import (
    SPLIT_NAMES,
    Encoded,
    ImageRows,
    LabelledImages,
    Splits,
    assemble,
    choose_splits,
    concatenate,
    split_name,
    used_splits,
)
from fedbbpt_jax.errors import TaskError

LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label", "target", "category")


class Columns(NamedTuple):
    """Which columns to read, where they are there.

    Attributes:
      image: the encoded image; found by its type otherwise.
      label: the class; found by type and name otherwise.
      clip: together these and the label name a video, of whose frames only the middle one is kept; usually none.
      client: says whose an image is; not read where left out.
    """

    image: str = ""
    label: str = ""
    clip: tuple[str, ...] = ()
    client: str = ""

    @property
    def without_image(self) -> list[str]:
        """All that are read at once: those beside the image."""
        return [name for name in (self.label, *self.clip, self.client) if name]


class ImageTable(NamedTuple):
    """Rows of one split: the columns beside the image, and how to read the images of some rows, ascending."""

    columns: pa.Table
    read: Callable[[np.ndarray], Iterator[Encoded]]


def find_columns(features: datasets.Features, columns: Columns, source: str) -> Columns:
    """Returns the columns as they are there, with image and label filled in.

    The image is the one column of images, of structs with the bytes of one, or of bytes. The label is, among class
    labels, then integers, then strings, the column with a name of `LABEL_COLUMNS`; else the only class label; else
    the only other column, if it holds integers or strings.

    Raises:
      TaskError: there is no such column.
    """
    kinds = {name: _kind(feature) for name, feature in features.items()}
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    images = [name for name, kind in kinds.items() if kind in ("image", "binary")]
    if columns.image not in features and len(images) != 1:
        raise TaskError(f"{source} has the columns {listed}; expected one of images, or of structs with their bytes")
    image = columns.image if columns.image in features else images[0]
    if columns.client and columns.client not in features:
        raise TaskError(f"{source} has the columns {listed}; expected {columns.client!r}, the client of an image")
    others = {name: kind for name, kind in kinds.items() if name not in (image, columns.client)}
    label = columns.label if columns.label in features else _find_label(others)
    if not label:
        raise TaskError(
            f"{source} has the columns {listed}; expected one of class labels, integers or strings called "
            f"{', '.join(LABEL_COLUMNS[:-1])} or {LABEL_COLUMNS[-1]}"
        )
    return columns._replace(image=image, label=label, clip=columns.clip if set(columns.clip) <= set(features) else ())


def _find_label(kinds: dict[str, str]) -> str:
    by_kind = {kind: [name for name in kinds if kinds[name] == kind] for kind in ("class label", "integer", "string")}
    for names in by_kind.values():
        usual = [name for name in LABEL_COLUMNS if name in names]
        if usual:
            return usual[0]
    if len(by_kind["class label"]) == 1:
        return by_kind["class label"][0]
    return next(iter(kinds)) if len(kinds) == 1 and set(kinds.values()) <= set(by_kind) else ""


def _kind(feature: Any) -> str:
    """Returns what a column holds, in a word or two."""
    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "class label"
    dtype = str(getattr(feature, "dtype", "nested")).removeprefix("large_").removesuffix("_view")
    return "integer" if dtype.startswith(("int", "uint")) else dtype


def label_tables(
    tables: dict[str, list[ImageTable]],
    feature: Any,
    columns: Columns,
    listed: tuple[str, ...],
    splits: Splits,
    source: str,
) -> LabelledImages:
    """Returns the data set whose labels are places among the class names.

    The names are those of the class label; else `listed`, for integers; else the values themselves, sorted.

    Args:
      tables: the parts of each split, by its name.
      feature: of the label's column.
      columns: where image and label are known.
      listed: names that lie beside the table, or none.
      splits: which splits play which part.
      source: where the tables lie, for errors.

    Raises:
      TaskError: a label is missing, is no integer and no string, or has no name among those given.
    """
    values = {name: [_values(part, columns.label, source) for part in parts] for name, parts in tables.items()}
    found = sorted({value for parts in values.values() for part in parts for value in part})
    names = tuple(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else listed
    numbered = not names and isinstance(found[0], int)
    if names and isinstance(found[0], int):
        if not 0 <= found[0] <= found[-1] < len(names):
            wrong = found[0] if found[0] < 0 else found[-1]
            raise TaskError(f"{source} has the label {wrong}; expected 0 to {len(names) - 1}, for {len(names)} names")
        place = {value: value for value in found}
    else:
        names, place = tuple(str(value) for value in found), {value: row for row, value in enumerate(found)}

    def rows(table: ImageTable, values: list[Any]) -> ImageRows:
        clients = np.array(table.columns[columns.client].to_pylist()) if columns.client else None
        labelled = ImageRows(np.array([place[value] for value in values], np.int32), table.read, clients)
        if not columns.clip:
            return labelled
        keys = zip(*(table.columns[name].to_pylist() for name in (columns.label, *columns.clip)), strict=True)
        return labelled.take(middle_rows(keys))

    labelled = {
        name: concatenate([rows(table, own) for table, own in zip(tables[name], values[name], strict=True)])
        for name in tables
    }
    return assemble(names, labelled, splits)._replace(numbered=numbered)


def _values(table: ImageTable, label: str, source: str) -> list[Any]:
    column = table.columns[label]
    if not len(column) or column.null_count:
        raise TaskError(
            f"{source} has {column.null_count} missing labels in {len(column)} rows; expected some and none"
        )
    values = column.to_pylist()
    if not isinstance(values[0], str) and type(values[0]) is not int:
        raise TaskError(f"{source} has labels such as {values[0]!r} in {label}; expected integers or strings")
    return values


def middle_rows(keys: Iterable[Any]) -> np.ndarray:
    """Returns the middle one of the rows of each key, ascending.

    Example:
      >>> middle_rows("aaabbbbb").tolist()
      [1, 5]
    """
    rows: dict[Any, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return np.sort([own[len(own) // 2] for own in rows.values()])


def read_parquet(folder: Path, wanted: Splits | None = None, columns: Columns | None = None) -> LabelledImages:
    """Returns the images in the parquet files below `folder`; labels are read now, images when they are asked for.

    A file belongs to the split that its name begins with (`test.parquet`, `train-00000-of-00004.parquet`), or its
    folder's; where no file names a split, all are for training. Class names are those of the table's class label,
    the lines of `classes.txt`, or the values where they are strings.

    Args:
      folder: where the files lie, at any depth.
      wanted: which splits play which part; by name if left out.
      columns: which columns to read; found if left out.

    Raises:
      TaskError: a file cannot be read, a column cannot be found, or a label has no name.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*.parquet")):
        files[_split_of(path.relative_to(folder))].append(path)
    available = {name: paths for name, paths in files.items() if name} or {"train": files[""]}
    splits = choose_splits(available, wanted, str(folder))
    used = {name: available[name] for name in used_splits(splits)}
    try:
        # With pyarrow: `datasets` would first copy all images into a table under the user's cache.
        features = datasets.Features.from_arrow_schema(pq.read_schema(used[used_splits(splits)[0]][0]))
        columns = find_columns(features, columns or Columns(), str(folder))
        tables = {name: [_parquet_table(path, columns) for path in paths] for name, paths in used.items()}
    except (OSError, pa.ArrowException) as error:
        raise TaskError(f"cannot read the parquet files in {folder}: {' '.join(str(error).split())}") from error
    listing = folder / "classes.txt"
    lines = listing.read_text("utf-8").splitlines() if listing.is_file() else []
    listed = tuple(line.strip() for line in lines if line.strip())
    return label_tables(tables, features[columns.label], columns, listed, splits, str(folder))


def _split_of(path: Path) -> str:
    """Returns the split that a file's name begins with, or that of the nearest folder; empty if there is none."""
    for part in (path.stem, *reversed(path.parent.parts)):
        name = split_name(part.replace("_", "-").replace(".", "-").split("-")[0])
        if name in SPLIT_NAMES:
            return name
    return ""


def _parquet_table(path: Path, columns: Columns) -> ImageTable:
    with pq.ParquetFile(path) as file:
        missing = [name for name in (columns.image, *columns.without_image) if name not in file.schema_arrow.names]
        if missing:
            raise TaskError(f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
        return ImageTable(file.read(columns=columns.without_image), partial(_read_rows, path, columns.image))


def _read_rows(path: Path, column: str, rows: np.ndarray) -> Iterator[Encoded]:
    """Yields the images of `rows`, ascending, a row group at a time; groups without any are not read."""
    with pq.ParquetFile(path) as file:
        start = 0
        for group in range(file.num_row_groups if len(rows) else 0):
            end = start + file.metadata.row_group(group).num_rows
            inside = rows[(rows >= start) & (rows < end)]
            if len(inside):
                images = file.read_row_group(group, columns=[column]).column(column)
                for row in inside:
                    yield encoded_cell(images[int(row) - start].as_py(), f"{path} row {row}")
            start = end


def encoded_cell(cell: Any, name: str) -> Encoded:
    """Returns the encoded image of a table's cell: bytes, or a struct of bytes and path of which either may be empty.

    Raises:
      TaskError: there are no bytes, and no file of that path.
    """
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if content is None and path and Path(path).is_file():
        content = Path(path).read_bytes()
    if content is None:
        raise TaskError(f"{name} holds no image: neither bytes nor a file that is here")
    return f"{name} ({path})" if path else name, content
