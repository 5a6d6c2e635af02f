from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_texts import real_folder
from synthetic_texts import phrases, write_splits, write_table

from fedbbpt_jax.data import text_tasks
from fedbbpt_jax.data.partition import find_partition
from fedbbpt_jax.data.text_datasets import TEXT_TASKS
from fedbbpt_jax.data.text_folders import TEXT_FOLDERS
from fedbbpt_jax.data.text_rows import LabelledTexts, TextColumns, TextRows
from fedbbpt_jax.data.text_tasks import draw, load_text_task
from fedbbpt_jax.errors import TaskError

PARTS = ("train", "validation", "test")
CLASSES = {"cat": 12, "dog": 9, "hen": 10}


def load(folder: Path, name: str = "", **options):
    return load_text_task(name, **{"data": str(folder), "shots": 3, **options})


def drawn(task) -> dict[str, list[tuple[str, str, int]]]:
    """Split, class and place of each example of each part."""
    told = {part: [text.split() for (text,) in getattr(task, part).texts] for part in PARTS}
    return {part: [(split, label, int(i)) for split, label, i in rows] for part, rows in told.items()}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(text_tasks, "read_hub_tables", lambda *_: pytest.fail("asked the hub"))


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return write_splits(folder, {"train": CLASSES, "validation": CLASSES, "test": CLASSES})


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("one") / "pets.csv", phrases("all", {"cat": 20, "dog": 10, "hen": 30}))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_labels_are_those_of_the_texts(suffix, tmp_path):
    task = load(write_splits(tmp_path / "pets", {"train": CLASSES, "test": CLASSES}, suffix))
    assert (task.name, task.source, task.class_names) == ("pets", str(tmp_path / "pets"), ("cat", "dog", "hen"))
    for part, rows in drawn(task).items():
        labels = getattr(task, part).labels
        assert [task.class_names[place] for place in labels] == [label for _, label, _ in rows]
        assert labels.dtype == np.int32
    assert (task.template, task.label_words, task.metric) == ("", (" cat", " dog", " hen"), "accuracy")
    assert task.class_texts == ("cat", "dog", "hen")


def test_each_part_comes_from_its_own_split(three_splits):
    parts = drawn(load(three_splits, shots=9))
    assert {split for split, *_ in parts["train"]} == {"train"}
    assert {split for split, *_ in parts["validation"]} == {"validation"}
    assert sorted(parts["test"]) == [("test", label, i) for label, n in CLASSES.items() for i in range(n)]
    for part in ("train", "validation"):
        assert Counter(label for _, label, _ in parts[part]) == dict.fromkeys(CLASSES, 9)


@pytest.mark.parametrize("shots", [1, 3, 4, 8])
def test_without_a_validation_split_the_rest_of_train_gives_it(tmp_path, shots):
    parts = drawn(load(write_splits(tmp_path, {"train": CLASSES, "test": CLASSES}), shots=shots))
    assert {split for split, *_ in parts["train"] + parts["validation"]} == {"train"}
    assert not set(parts["train"]) & set(parts["validation"])
    assert Counter(label for _, label, _ in parts["train"]) == dict.fromkeys(CLASSES, shots)
    left = {label: min(shots, n - shots) for label, n in CLASSES.items()}
    assert Counter(label for _, label, _ in parts["validation"]) == left


def test_without_a_test_split_validation_is_the_test(tmp_path):
    parts = drawn(load(write_splits(tmp_path, {"train": CLASSES, "dev": CLASSES})))
    assert {split for split, *_ in parts["train"] + parts["validation"]} == {"train"}
    assert len(parts["test"]) == sum(CLASSES.values())


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_one_file_is_divided_by_class(one_file, seed, shots):
    """30 % of each class are the test, whatever the seed; no text is in two parts."""
    parts = drawn(load(one_file, seed=seed, shots=shots))
    assert Counter(label for _, label, _ in parts["test"]) == {"cat": 6, "dog": 3, "hen": 9}
    assert parts["test"] == drawn(load(one_file, shots=1))["test"]
    everything = [example for part in parts.values() for example in part]
    assert len(set(everything)) == len(everything)


def test_seeds(three_splits):
    first, again, other = (drawn(load(three_splits, seed=seed)) for seed in (13, 13, 21))
    assert first == again
    assert first["test"] == other["test"]
    assert first["train"] != other["train"]
    assert first["validation"] != other["validation"]


def test_test_limit_is_stratified_and_the_same_for_all_seeds(three_splits):
    first, other = (drawn(load(three_splits, seed=seed, test_limit=15))["test"] for seed in (0, 1))
    assert first == other
    counts = Counter(label for _, label, _ in first)
    assert max(abs(counts[label] - 15 * n / 31) for label, n in CLASSES.items()) < 1
    assert len(first) == 15
    assert len(drawn(load(three_splits, test_limit=1000))["test"]) == 31


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 1)), max_size=60), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equal_texts_are_in_one_part_only(rows, has_validation, has_test):
    """Texts repeat, within a split and across splits, even with other labels."""

    def split(rows) -> TextRows:
        return TextRows(tuple((str(text),) for text, _ in rows), np.array([label for _, label in rows], np.int32))

    train = split(rows + [(100 + i, i % 2) for i in range(12)])
    validation = split([(5, 0), (4, 1), (20, 0), (21, 1), (21, 0)]) if has_validation else None
    test = split([(3, 0), (4, 1), (30, 0), (3, 1)]) if has_test else None
    parts = draw(LabelledTexts(("x", "y"), train, validation, test), 2, 0, None, "here")
    seen = [set(part.texts) for part in parts]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert [len(part.texts) for part in parts[:2]] == [len(texts) for texts in seen[:2]]
    assert test is None or parts[2].texts == test.texts


def test_what_may_be_drawn_can_be_chosen(three_splits):
    def even(texts):
        return np.array([int(text.split()[2]) % 2 == 0 for (text,) in texts])

    parts = drawn(load(three_splits, keep=even))
    assert all(place % 2 == 0 for part in parts.values() for _, _, place in part)
    assert len(parts["test"]) == sum(-(-n // 2) for n in CLASSES.values())


def test_words_and_templates_can_be_given(three_splits):
    words, texts = (" x", " y", " z"), ("a", "b", "c")
    task = load(three_splits, template="{0} [MASK]", label_words=words, class_texts=texts)
    assert (task.template, task.label_words, task.class_texts) == ("{0} [MASK]", words, texts)
    assert load(three_splits, label_words=words).class_texts == ("x", "y", "z")


def test_columns_can_be_named(tmp_path):
    columns = {"a": [f"a {i}" for i in range(12)], "b": [f"b {i}" for i in range(12)], "stars": ["1", "5"] * 6}
    path = write_table(tmp_path / "x.csv", columns)
    named = TextColumns(("b",), "stars")
    task = load(path, columns=named, shots=1, label_words=(" bad", " good"))
    assert all(text.startswith("b ") for (text,) in task.train.texts)
    assert task.class_names == ("1", "5")
    with pytest.raises(TaskError, match=r"has the labels 1 to 5 and no names for them; expected label words"):
        load(path, columns=named, shots=1)
    with pytest.raises(TaskError, match="expected 1 or 2 of texts beside 'stars'"):
        load(path, columns=TextColumns((), "stars"))
    both = load(path, columns=TextColumns(("a", "b"), "stars"), shots=1, label_words=(" bad", " good"))
    assert both.train.texts[0][0][2:] == both.train.texts[0][1][2:]


def test_a_local_copy_of_a_known_task_has_its_words(tmp_path):
    """GLUE's own files: labels are numbers, and those of the test are hidden."""
    for split in ("train", "dev_matched", "dev_mismatched"):
        columns = {name: [f"{split} {name} {i}" for i in range(30)] for name in ("premise", "hypothesis")}
        columns["gold_label"] = [*(["entailment", "neutral", "contradiction"] * 10)[:29], "-"]
        write_table(tmp_path / f"{split}.tsv", columns)
    (tmp_path / "test_matched.tsv").write_text("premise\thypothesis\na\tb\n")
    task = load(tmp_path, "mnli", shots=2)
    assert (task.name, task.label_words, len(task.test.texts)) == ("mnli", (" yes", " maybe", " no"), 29)
    assert all(text.startswith("dev_matched") for example in task.test.texts for text in example)
    assert load(tmp_path, "mnli-mm", shots=2).test.texts[0][0] == "dev_mismatched premise 0"


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({"train": {"cat": 9, "dog": 3}, "test": CLASSES}, {}, "'hen' has 0 different examples, and 3 shots and 1 to"),
        ({"train": {"cat": 9, "dog": 3}, "test": {"cat": 1, "dog": 1}}, {}, "'dog' has 3 different examples, and 3 sh"),
        ({"train": CLASSES, "test": {"cat": 1, "dog": 1}}, {}, "'hen' has 0 different examples, and 1 to test is need"),
        ({"train": CLASSES, "validation": {"cat": 2}, "test": CLASSES}, {}, "'dog' has 0 .*and 1 to validate is need"),
        ({"train": CLASSES, "validation": CLASSES, "test": CLASSES}, {"shots": 10}, "'dog' has 9 .*and 10 shots were"),
        ({"train": CLASSES, "test": CLASSES}, {"shots": 9}, "'dog' has 9 different examples, and 9 shots and 1 to val"),
        ({"train": {"cat": 9}, "test": {"cat": 9}}, {}, r"has one class \(cat\); expected at least 2"),
        ({"validation": CLASSES, "test": CLASSES}, {}, "has the splits test, validation; expected one called train"),
        ({"train": CLASSES}, {"template": "{0}"}, r"a template for 1 of texts needs \{0\} and \[MASK\], each once"),
        (
            {"train": CLASSES},
            {"label_words": (" a",)},
            r"has 3 classes \(cat, dog, hen\); expected as many label words",
        ),
        ({"train": CLASSES}, {"class_texts": ("a",)}, "expected as many class texts, got 1"),
        ({"train": CLASSES}, {"shots": 0}, "shots and test_limit must be at least 1, got 0 and None"),
        ({"train": CLASSES}, {"test_limit": 0}, "shots and test_limit must be at least 1"),
        (
            {"train": CLASSES},
            {"revision": "v2"},
            "is here, and a revision is of the hub's data sets; got revision 'v2'",
        ),
        ({"train": CLASSES}, {"name": "sst2"}, "has the labels 'cat', 'dog', 'hen'; expected negative, positive"),
        ({"train": CLASSES}, {"name": "rte"}, "expected 2 of texts beside 'label'"),
    ],
)
def test_what_the_data_cannot_give(tmp_path, counts, options, message):
    with pytest.raises(TaskError, match=message) as error:
        load(write_splits(tmp_path, counts), **options)
    assert "\n" not in str(error.value)


def test_files_of_other_columns(tmp_path):
    write_table(tmp_path / "train.csv", phrases("train", CLASSES))
    write_table(tmp_path / "test.csv", {"content": ["a", "b"], "label": ["cat", "dog"]})
    with pytest.raises(TaskError, match="has its texts and labels in other columns here than there"):
        load(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "a/b/c", "what is this"])
def test_what_is_neither_here_nor_a_hub_id(source):
    with pytest.raises(
        TaskError, match=r"cannot load .*: it is not here; expected a file, a folder, or the id of a hub"
    ):
        load_text_task("", data=source)


def test_unknown_name_without_data():
    with pytest.raises(TaskError, match="unknown text task 'sst'; expected one of mnli, mnli-mm, qqp"):
        load_text_task("sst")


# Real data


def test_data_comes_before_the_folder_of_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDBBPT_DATA", str(tmp_path))
    questions = "".join(
        f"{code}:x Is it {code} {i} ?\n" for i in range(4) for code in ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
    )
    for where, mark in ((tmp_path / "text" / "trec", "it"), (tmp_path / "mine", "this")):
        where.mkdir(parents=True)
        (where / "train.txt").write_text(questions.replace("it", mark))
        (where / "test.txt").write_text(questions.replace("it", mark).replace("?", "!"))
    theirs, mine = load_text_task("trec", shots=1), load_text_task("trec", data=str(tmp_path / "mine"), shots=1)
    assert (theirs.source, mine.source) == (str(tmp_path / "text" / "trec"), str(tmp_path / "mine"))
    assert ("Is it" in theirs.test.texts[0][0], "Is this" in mine.test.texts[0][0]) == (True, True)


@pytest.mark.parametrize("name", TEXT_FOLDERS)
def test_real_tasks(name):
    real_folder("text")
    task, again, other = (load_text_task(name, seed=seed, test_limit=100) for seed in (42, 42, 87))
    row = TEXT_TASKS[name]
    num_classes = len(row.classes.names)
    assert (task.label_words, task.class_texts, task.template) == (row.label_words, row.class_texts, row.template)
    assert task.metric == row.metric
    for part in (task.train, task.validation):
        assert np.bincount(part.labels).tolist() == [16] * num_classes
    assert len(task.test.texts) == 100
    texts = [*task.train.texts, *task.validation.texts, *task.test.texts]
    assert len({*task.train.texts, *task.validation.texts}) == 32 * num_classes
    assert not {*texts[: 32 * num_classes]} & {*task.test.texts}
    assert task.train.texts == again.train.texts
    assert task.test.texts == again.test.texts == other.test.texts
    assert set(task.train.texts) != set(other.train.texts)


def test_clients_can_be_skewed_by_label():
    """Labels are places among the classes, not ids of label words, for which FedOne's Dirichlet split finds no one."""
    real_folder("text")
    task = load_text_task("agnews", shots=40)
    clients = find_partition("dirichlet:0.3")(task.train.labels, 4, 0)
    assert sorted(np.concatenate(clients)) == list(range(160))
    assert min(map(len, clients)) > 0
