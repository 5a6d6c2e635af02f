"""The folders of real text data that `FEDBBPT_DATA` names: which files hold which part of a task, and in what form.

They are the whole data set, with GLUE's development set as the test, except these: AG News has 10,001 training rows,
QNLI has only its development set, and MNLI and SNLI are samples of 1,000 rows. Numbers from the latter are no
benchmark's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from fedbbpt_jax.data.text_files import read_questions, read_table
from fedbbpt_jax.data.text_rows import TextTable

VARIABLE = "FEDBBPT_DATA"


class TextFile(NamedTuple):
    """A file, and the names of its columns where it has no first line with them."""

    name: str
    header: tuple[str, ...] = ()


class TextFolder(NamedTuple):
    """The files of a task.

    Attributes:
      folder: below `FEDBBPT_DATA/text`.
      train: to draw shots from.
      test: empty where part of `train` must be the test.
    """

    folder: str
    train: tuple[TextFile, ...]
    test: tuple[TextFile, ...] = ()


_ACCEPTABILITY = ("source", "label", "mark", "sentence")
_INFERENCE = ("label", "premise", "hypothesis")

TEXT_FOLDERS: dict[str, TextFolder] = {
    # The matched sample gives the shots of both, as MNLI's training genres are the matched ones.
    "mnli": TextFolder("mnli", (TextFile("mnli_matched.tsv", _INFERENCE),)),
    "mnli-mm": TextFolder(
        "mnli", (TextFile("mnli_matched.tsv", _INFERENCE),), (TextFile("mnli_mismatched.tsv", _INFERENCE),)
    ),
    # `heldout` is a part of GLUE's training set, `dev` its development set.
    "sst2": TextFolder("sst2", (TextFile("train.tsv"), TextFile("heldout.tsv")), (TextFile("dev.tsv"),)),
    "cola": TextFolder(
        "cola",
        (TextFile("in_domain_train.tsv", _ACCEPTABILITY),),
        (TextFile("in_domain_dev.tsv", _ACCEPTABILITY), TextFile("out_of_domain_dev.tsv", _ACCEPTABILITY)),
    ),
    "qnli": TextFolder("qnli", (TextFile("dev.tsv"),)),
    "rte": TextFolder("rte", (TextFile("train.jsonl"),), (TextFile("val.jsonl"),)),
    # The training file has no titles, so those of the test are not read: both parts are descriptions.
    "agnews": TextFolder(
        "agnews",
        (TextFile("train10k.tsv", ("text", "label")),),
        (TextFile("test.csv", ("label", "title", "text")),),
    ),
    "trec": TextFolder("trec", (TextFile("train.txt"),), (TextFile("test.txt"),)),
    "snli": TextFolder("mnli", (TextFile("snli.tsv", _INFERENCE),)),
}


def default_folder(name: str) -> Path | None:
    """Returns where `FEDBBPT_DATA` has the files of the task `name`; None if it has not all, or is not set."""
    if name not in TEXT_FOLDERS or not os.environ.get(VARIABLE):
        return None
    folder = Path(os.environ[VARIABLE]).expanduser() / "text" / TEXT_FOLDERS[name].folder
    return folder if holds_files(name, folder) else None


def holds_files(name: str, folder: Path) -> bool:
    """Returns whether `folder` has all files of the task `name`."""
    known = TEXT_FOLDERS.get(name)
    return known is not None and all((folder / file.name).is_file() for file in (*known.train, *known.test))


def read_files(name: str, folder: Path) -> dict[str, list[TextTable]]:
    """Returns the tables of train, and of test if there is one.

    Raises:
      TaskError: a file cannot be read.
    """
    known = TEXT_FOLDERS[name]
    parts = {"train": known.train, "test": known.test}
    return {part: [_read(folder / file.name, file.header) for file in files] for part, files in parts.items() if files}


def _read(path: Path, header: tuple[str, ...]) -> TextTable:
    return read_questions(path) if path.suffix == ".txt" else read_table(path, header)
