import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.data.image_rows import Splits
from fedbbpt_jax.data.text_rows import Classes, TextColumns, TextTable, find_columns, label_tables
from fedbbpt_jax.errors import TaskError

ONE = Splits("train", None, None)
UNKNOWN = Classes()
SENTIMENT = Classes(("negative", "positive"), codes=("1", "2"), unlabelled=("-1",))


def table(columns: dict[str, list], **features) -> TextTable:
    made = pa.table(columns)
    return TextTable(made, datasets.Features(datasets.Features.from_arrow_schema(made.schema) | features))


def found(*names: str, named=(), label="", usual=(), **others) -> TextColumns:
    made = table({name: ["a"] for name in names} | others)
    return find_columns(made.features, TextColumns(named, label), TextColumns(usual, "label"), "here")


def labelled(values: list, classes: Classes = UNKNOWN, splits: Splits = ONE, **features):
    made = table({"text": [f"t{i}" for i in range(len(values))], "label": values}, **features)
    return label_tables({"train": [made]}, TextColumns(("text",), "label"), classes, splits, "here")


@pytest.mark.parametrize(
    ("names", "texts", "label"),
    [
        (["label", "text"], ("text",), "label"),
        (["idx", "sentence", "label"], ("sentence",), "label"),
        (["premise", "hypothesis", "gold_label"], ("premise", "hypothesis"), "gold_label"),
        (["index", "question", "sentence", "label"], ("question", "sentence"), "label"),
        (["sentence1", "sentence2", "label"], ("sentence1", "sentence2"), "label"),
        (["Review", "class"], ("Review",), "class"),
        (["question", "coarse_label"], ("question",), "coarse_label"),
        (["class", "title", "description"], ("description",), "class"),
    ],
)
def test_columns_by_their_usual_names(names, texts, label):
    assert found(*names) == TextColumns(texts, label)


def test_named_columns_come_first_and_those_of_a_known_task_next():
    names = ("text", "body", "label", "stars")
    assert found(*names) == TextColumns(("text",), "label")
    assert found(*names, usual=("body",)) == TextColumns(("body",), "label")
    assert found(*names, usual=("body",), named=("text",), label="stars") == TextColumns(("text",), "stars")
    assert found("premise", "hypothesis", "label", usual=("sentence1", "sentence2")).texts == ("premise", "hypothesis")
    assert found("text", "premise", "hypothesis", "label", usual=("sentence",)).texts == ("text",)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ["text", "stars"],
            {},
            r"here has the columns text, stars \(the first line .*\); expected labels in one calle",
        ),
        (["text", "label"], {"label": "stars"}, "here has the columns text, label; it has no column 'stars'"),
        (["text", "label"], {"named": ("text", "b")}, "it has no column 'b'"),
        (["a", "b", "label"], {}, "expected 1 or 2 of texts beside 'label', called sentence1 and sentence2, or that"),
        (["text", "label"], {"usual": ("premise", "hypothesis")}, "expected 2 of texts beside 'label', called sent"),
        (["premise", "hypothesis", "label"], {"usual": ("a",)}, "expected 1 of texts beside 'label', called text or"),
        (["a", "b", "c", "label"], {"named": ("a", "b", "c")}, "expected 1 or 2 of texts"),
        (["label"], {}, "expected 1 or 2 of texts"),
    ],
)
def test_columns_that_are_not_there(names, options, message):
    with pytest.raises(TaskError, match=message):
        found(*names, **options)


def test_numbers_are_no_texts():
    with pytest.raises(TaskError, match="has the columns label, text; expected 1 or 2 of texts"):
        found("label", text=[3])


@pytest.mark.parametrize(
    ("values", "places"),
    [
        (["negative", "positive", "positive"], [0, 1, 1]),
        (["Positive", "NEGATIVE "], [1, 0]),
        ([0, 1, 1], [0, 1, 1]),
        (["1", "0"], [1, 0]),
        (["1", "2", "2"], [0, 1, 1]),
        ([2, 1], [1, 0]),
        ([1.0, 0.0], [1, 0]),
        ([1, -1, 0, -1], [1, 0]),
        (["1"], [0]),
    ],
)
def test_spellings_of_known_classes(values, places):
    texts = labelled(values, SENTIMENT)
    assert texts.class_names == ("negative", "positive")
    assert texts.train.labels.tolist() == places
    assert texts.train.labels.dtype == "int32"
    assert not texts.numbered


def test_names_of_a_class_label_count_and_not_its_numbers():
    """The hub's Yelp calls its classes 1 and 2, and stores 0 and 1."""
    texts = labelled([0, 1, -1, 1], SENTIMENT, label=datasets.ClassLabel(names=["1", "2"]))
    assert texts.train.labels.tolist() == [0, 1, 1]
    assert [text for (text,) in texts.train.texts] == ["t0", "t1", "t3"]
    swapped = labelled([0, 1, 1], SENTIMENT, label=datasets.ClassLabel(names=["positive", "negative"]))
    assert swapped.train.labels.tolist() == [1, 0, 0]


def test_each_split_is_spelled_by_itself():
    parts = {"train": ["positive", "negative"], "test": ["2", "1"]}
    tables = {name: [table({"text": ["a", "b"], "label": values})] for name, values in parts.items()}
    columns, splits = TextColumns(("text",), "label"), Splits("train", None, "test")
    texts = label_tables(tables, columns, SENTIMENT, splits, "here")
    assert texts.test is not None
    assert texts.train.labels.tolist() == texts.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["negative", "neutral"],
            "here has the labels 'neutral'; expected negative, positive, or 0 to 1 in this order",
        ),
        ([0, 1, 2], "has the labels '0', '1', '2'; expected"),
        (["-1", "+1"], r"has the labels '\+1'; expected"),
        (["negative", "1"], "has the labels '1', 'negative'; expected"),
        ([str(i) for i in range(30, 40)], "has the labels '30', '31', '32', '33', '34', ...; expected"),
        (["negative", None, "positive"], r"here \(train\) has no label in row 2; expected one for every text"),
        (["negative", " "], "has no label in row 2"),
        ([0.0, float("nan")], "has no label in row 2"),
    ],
)
def test_labels_that_are_not_known(values, message):
    with pytest.raises(TaskError, match=message):
        labelled(values, SENTIMENT)


def test_classes_of_an_unknown_data_set_are_its_values():
    assert labelled(["b", "a", "b"]).class_names == ("a", "b")
    assert labelled(["b", "a", "b"]).train.labels.tolist() == [1, 0, 1]
    assert labelled([True, False]).class_names == ("False", "True")
    declared = labelled([0, 2], label=datasets.ClassLabel(names=["x", "c", "b"]))
    assert (declared.class_names, declared.train.labels.tolist(), declared.numbered) == (("x", "c", "b"), [0, 2], False)
    with pytest.raises(TaskError, match="has the label 3 in row 2; expected 0 to 2"):
        labelled([0, 3], label=datasets.ClassLabel(names=["x", "c", "b"]))


def test_similar_names_of_an_unknown_data_set_are_classes_of_their_own():
    assert labelled(["c", "C++", "C#", "C"]).class_names == ("C", "C#", "C++", "c")


@given(st.lists(st.integers(-20, 200), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_numbers_are_sorted_as_numbers(values):
    texts = labelled([str(value) for value in values])
    assert texts.numbered
    assert [int(name) for name in texts.class_names] == sorted(set(values))
    assert [int(texts.class_names[place]) for place in texts.train.labels] == values


def test_texts_are_cleaned_and_empty_ones_left_out():
    made = table({"a": [" x ", "", "y", None, "z"], "b": ["1", "2", " \t", "4", "5 "], "label": [0, 0, 1, 1, 1]})
    texts = label_tables({"train": [made]}, TextColumns(("a", "b"), "label"), Classes(), ONE, "here")
    assert texts.train.texts == (("x", "1"), ("z", "5"))
    assert texts.train.labels.tolist() == [0, 1]


def test_nothing_is_left():
    made = {"train": [table({"text": ["a"], "label": ["x"]})], "test": [table({"text": [" "], "label": ["x"]})]}
    with pytest.raises(TaskError, match=r"here \(test\) has no labelled texts in text"):
        label_tables(made, TextColumns(("text",), "label"), Classes(), Splits("train", None, "test"), "here")


def test_splits_can_be_pooled_and_files_follow_each_other():
    def made(text):
        return table({"text": [text], "label": ["x"]})

    tables = {"train": [made("a"), made("b")], "validation": [made("c")]}
    splits = Splits("train+validation", None, "validation")
    texts = label_tables(tables, TextColumns(("text",), "label"), Classes(), splits, "here")
    assert texts.train.texts == (("a",), ("b",), ("c",))
    assert texts.test is not None
    assert texts.test.texts == (("c",),)
