"""Tables of texts in files: csv, tsv, JSON lines and parquet, alone or in a folder by split names."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fedbbpt_jax.data.image_rows import split_name
from fedbbpt_jax.data.text_rows import TextTable
from fedbbpt_jax.errors import TaskError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SPLIT = re.compile(
    r"(training|train|validation|valid|val|dev|testing|test)(?:[-_.]?(matched|mismatched)|[-_.].*|\d+)?(?:-\d.*)?",
    re.IGNORECASE,
)


def find_split_files(folder: Path) -> dict[str, list[Path]]:
    """Returns the files of each split below `folder`, by its name.

    A file belongs to the split that its name begins with (`train.tsv`, `dev_matched.tsv`, which is
    `validation_matched`, `test-00000-of-00004.parquet`), or else its folder's. Files without a split are left out;
    where no file has one, all are for training.

    Raises:
      TaskError: there are no such files, or one split has files of several kinds.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        if not path.name.startswith("."):
            files[_split_of(path.relative_to(folder))].append(path)
    if not files:
        raise TaskError(f"{folder} has no files of texts; expected train.csv, .tsv, .jsonl or .parquet, and the like")
    named = {name: paths for name, paths in files.items() if name} or {"train": files[""]}
    for name, paths in named.items():
        kinds = {path.suffix.lower() for path in paths}
        if len(kinds) > 1:
            raise TaskError(f"{folder} has {name} in {' and '.join(sorted(kinds))} files; expected one kind")
    return named


def _split_of(path: Path) -> str:
    for part in (path.stem, *reversed(path.parent.parts)):
        match = _SPLIT.fullmatch(part)
        if match:
            return "_".join([split_name(match[1]), *([match[2].lower()] if match[2] else [])])
    return ""


def read_table(path: Path, header: Sequence[str] = (), encoding: str = "utf-8-sig") -> TextTable:
    """Returns the table in a file of one of `SUFFIXES`.

    In a tsv file nothing is quoted, as in GLUE's; in a csv file double quotes are.

    Args:
      path: its suffix says what it is.
      header: names of the columns of a csv or tsv file that has no first line with them.
      encoding: of a file of characters.

    Raises:
      TaskError: there is no such file, or it is not what its name says.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise TaskError(f"cannot read {path}: expected a file of {', '.join(SUFFIXES)}")
    try:
        if kind == ".parquet":
            table = pq.read_table(path)
        elif kind == ".jsonl":
            table = _read_json_lines(path, encoding)
        else:
            table = _read_delimited(path, header, encoding)
        return TextTable(table, datasets.Features.from_arrow_schema(table.schema))
    except UnicodeDecodeError as error:
        raise TaskError(f"cannot read {path}: it is not UTF-8 (byte {error.start}); convert it first") from error
    except (OSError, ValueError, TypeError, NotImplementedError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise TaskError(f"cannot read {path}: {reason}") from error


def _read_delimited(path: Path, header: Sequence[str], encoding: str) -> pa.Table:
    with path.open(encoding=encoding, newline="") as file:
        quoted = path.suffix.lower() == ".csv"
        delimiter, quoting = (",", csv.QUOTE_MINIMAL) if quoted else ("\t", csv.QUOTE_NONE)
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        names = list(header) or next(rows, [])
        if len(set(names)) < len(names):
            raise TaskError(f"{path} has two columns called {max(names, key=names.count)!r}")
        cells: list[list[str]] = []
        for row in rows:
            if row and len(row) != len(names):
                raise TaskError(
                    f"{path} line {rows.line_num} has {len(row)} cells; expected {len(names)} ({', '.join(names)})"
                )
            if row:
                cells.append(row)
    columns = zip(*cells, strict=True) if cells else [()] * len(names)
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})


def _read_json_lines(path: Path, encoding: str) -> pa.Table:
    rows: list[dict[str, Any]] = []
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise TaskError(f"{path} line {number} is no JSON: {error.msg}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path} line {number} is {type(row).__name__}; expected an object such as {{...}}")
            if row:
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def read_questions(path: Path) -> TextTable:
    """Returns the table in a file of TREC's form, `COARSE:fine question` in latin-1, with columns label and text.

    Raises:
      TaskError: it cannot be read, or a line has another form.
    """
    try:
        lines = path.read_text("latin-1").splitlines()
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from error
    found = [re.fullmatch(r"(\w+):\S+ (.*)", line) for line in lines]
    if None in found:
        raise TaskError(f"{path} line {found.index(None) + 1} is not of the form COARSE:fine question")
    labels, texts = ([match[group] for match in found if match] for group in (1, 2))
    table = pa.table({"label": pa.array(labels, pa.string()), "text": pa.array(texts, pa.string())})
    return TextTable(table, datasets.Features.from_arrow_schema(table.schema))
