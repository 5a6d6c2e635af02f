"""The folders of real data: how many examples each part has, and what labels mean on rows that one can read."""

import numpy as np
import pytest
from real_texts import real_folder

from fedbbpt_jax.data.text_datasets import TEXT_TASKS
from fedbbpt_jax.data.text_folders import TEXT_FOLDERS, default_folder, holds_files
from fedbbpt_jax.data.text_tasks import read_texts
from fedbbpt_jax.errors import TaskError

# Training and test rows by class, as SOURCE.md has them or `cut | sort | uniq -c` counts them.
COUNTS = {
    "sst2": ([26786 + 2994, 33828 + 3741], [428, 444]),
    "cola": ([2528, 6023], [162 + 162, 365 + 354]),
    "rte": ([1249, 1241], [146, 131]),
    "agnews": ([2509, 2458, 2496, 2538], [1900] * 4),
    "trec": ([86, 1250, 1162, 1223, 835, 896], [9, 94, 138, 65, 81, 113]),
    "qnli": ([2702, 2761], None),
    "mnli": ([373, 311, 316], None),
    "mnli-mm": ([373, 311, 316], [346, 319, 335]),
    "snli": ([367, 322, 311], None),
}
TOTALS = {"sst2": (67349, 872), "cola": (8551, 1043), "rte": (2490, 277), "agnews": (10001, 7600), "trec": (5452, 500)}
KNOWN = [
    ("sst2", "test", "it 's a charming and often affecting journey .", "positive"),
    ("sst2", "test", "unflinchingly bleak and desperate", "negative"),
    ("cola", "train", "One more pseudo generalization and I'm giving up.", "acceptable"),
    ("agnews", "test", "Unions representing workers at Turner   Newall say they are 'disappointed'", "Business"),
    ("trec", "test", "How far is it from Denver to Aspen ?", "number"),
    ("trec", "test", "What county is Modesto , California in ?", "location"),
    ("trec", "test", "Who was Galileo ?", "human"),
    ("qnli", "train", "What is the first major city in the stream of the Rhine?", "not_entailment"),
    ("rte", "test", "Dana Reeve, the widow of the actor Christopher Reeve", "not_entailment"),
    ("mnli", "train", "In Temple Bar , the bookshop at the Gallery", "entailment"),
    ("mnli-mm", "test", "So after two or three days he called Callgrove", "contradiction"),
    ("snli", "train", "A person rolls down a hill riding a wagon as another watches .", "neutral"),
]


@pytest.fixture(scope="module")
def read():
    root = real_folder("text")
    texts = {name: read_texts(str(root / row.folder), name) for name, row in TEXT_FOLDERS.items()}
    return texts.__getitem__


@pytest.mark.parametrize("name", TEXT_FOLDERS)
def test_counts(read, name):
    texts = read(name)
    assert texts.class_names == TEXT_TASKS[name].classes.names
    assert texts.validation is None
    train, test = COUNTS[name]
    assert np.bincount(texts.train.labels).tolist() == train
    assert (texts.test and np.bincount(texts.test.labels).tolist()) == test
    if name in TOTALS:
        assert (len(texts.train.texts), len(texts.test.texts)) == TOTALS[name]
    for part in (texts.train, texts.test):
        if part:
            assert len(part.texts) == len(part.labels)
            assert {len(example) for example in part.texts} == {len(TEXT_TASKS[name].columns.texts)}
            assert all(text == text.strip() and text for example in part.texts for text in example)


@pytest.mark.parametrize(("name", "part", "beginning", "meaning"), KNOWN)
def test_meaning_of_labels(read, name, part, beginning, meaning):
    texts = read(name)
    rows = getattr(texts, part)
    matching = [row for row, example in enumerate(rows.texts) if example[0].startswith(beginning)]
    assert matching
    assert {texts.class_names[rows.labels[row]] for row in matching[:1]} == {meaning}


def test_both_texts_of_a_pair_are_in_their_places(read):
    questions, answers = zip(*read("qnli").train.texts[:200], strict=True)
    assert sum(text.endswith("?") for text in questions) > 190
    assert sum(text.endswith("?") for text in answers) < 10


def test_the_numbered_copy_of_mnli_agrees_with_the_named_one(read):
    """0, 1, 2 are entailment, neutral, contradiction: GLUE's order, which the published label words invert."""
    rows = (real_folder("text", "mnli") / "mnli.tsv").read_text("utf-8").splitlines()
    assert [int(row[0]) for row in rows] == read("mnli-mm").test.labels.tolist()


def test_the_variable_names_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / "text" / "trec"
    folder.mkdir(parents=True)
    monkeypatch.delenv("FEDBBPT_DATA", raising=False)
    assert default_folder("trec") is None
    monkeypatch.setenv("FEDBBPT_DATA", "")
    assert default_folder("trec") is None
    monkeypatch.setenv("FEDBBPT_DATA", str(tmp_path))
    (folder / "train.txt").write_text("NUM:dist How far ?\n")
    assert default_folder("trec") is None
    (folder / "test.txt").write_text("NUM:dist How far ?\n")
    assert default_folder("trec") == folder
    assert default_folder("qqp") is None
    assert holds_files("trec", folder)
    assert not holds_files("sst2", folder)


def test_a_file_of_another_form_is_named(tmp_path):
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("no label\n")
    with pytest.raises(TaskError, match=r"train\.txt line 1 is not of the form COARSE:fine question"):
        read_texts(str(tmp_path), "trec")
