"""The hub's data sets, mocked at the boundary: `datasets.load_dataset`."""

from types import SimpleNamespace

import datasets
import pytest

from fedbbpt_jax.data import image_hub
from fedbbpt_jax.data.text_hub import read_hub_tables
from fedbbpt_jax.data.text_tasks import load_text_task, read_texts
from fedbbpt_jax.errors import TaskError

SIZES = {"train": 60, "validation_matched": 12, "validation_mismatched": 15, "test_matched": 6}


def made(columns: tuple[str, ...], names: list[str], sizes: dict[str, int], hidden: str = "") -> datasets.DatasetDict:
    """As `load_dataset` gives it: classes take turns; labels of the split `hidden` are -1, as GLUE's test."""
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({**{name: datasets.Value("string") for name in columns}, "label": label})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    **{name: [f"{split} {name} {i}" for i in range(size)] for name in columns},
                    "label": [-1 if split.startswith(hidden or "?") else i % len(names) for i in range(size)],
                },
                features,
            )
            for split, size in sizes.items()
        }
    )


@pytest.fixture(autouse=True)
def no_local_folder(monkeypatch):
    monkeypatch.delenv("FEDBBPT_DATA", raising=False)


@pytest.fixture
def hub(monkeypatch):
    """Keeps the calls that reach the hub, and answers with what it is given."""
    hub = SimpleNamespace(calls=[], answer=None)

    def load_dataset(*args, **options):
        hub.calls.append((args, options))
        if isinstance(hub.answer, Exception):
            raise hub.answer
        return hub.answer

    monkeypatch.setattr(image_hub.datasets, "load_dataset", load_dataset)
    return hub


@pytest.mark.parametrize(("name", "test"), [("mnli", "validation_matched"), ("mnli-mm", "validation_mismatched")])
def test_glue_tests_on_its_validation_split(hub, name, test):
    columns = ("premise", "hypothesis")
    hub.answer = made(columns, ["entailment", "neutral", "contradiction"], SIZES, hidden="test")
    task = load_text_task(name, shots=2, revision="main")
    assert hub.calls == [(("nyu-mll/glue", "mnli"), {"revision": "main"})]
    assert task.source == "nyu-mll/glue"
    assert len(task.test.texts) == SIZES[test]
    assert task.test.texts[1] == (f"{test} premise 1", f"{test} hypothesis 1")
    assert task.test.labels.tolist() == [i % 3 for i in range(SIZES[test])]
    assert {text.split()[0] for example in (*task.train.texts, *task.validation.texts) for text in example} == {"train"}


def test_examples_without_a_label_are_left_out(hub):
    """SNLI has -1 where annotators did not agree."""
    hub.answer = made(("premise", "hypothesis"), ["entailment", "neutral", "contradiction"], {"train": 30, "test": 12})
    hub.answer["test"] = hub.answer["test"].map(
        lambda row, i: row | {"label": -1 if i < 4 else i % 3}, with_indices=True
    )
    task = load_text_task("snli", shots=2)
    assert [text for text, _ in task.test.texts] == [f"test premise {i}" for i in range(4, 12)]
    assert task.test.labels.tolist() == [i % 3 for i in range(4, 12)]


def test_a_data_set_of_no_table_has_its_own_classes(hub):
    hub.answer = made(("text",), ["ham", "spam"], {"train": 20, "valid": 8, "test": 6})
    task = load_text_task("", data="someone/mail", shots=3)
    assert hub.calls == [(("someone/mail", None), {"revision": None})]
    assert (task.name, task.class_names, task.label_words) == ("mail", ("ham", "spam"), (" ham", " spam"))
    assert {text.split()[0] for (text,) in task.validation.texts} == {"valid"}


def test_only_what_is_used_is_read(hub):
    hub.answer = made(("text",), ["ham", "spam"], {"train": 20, "test": 6, "unsupervised": 5})
    tables, splits = read_hub_tables("someone/mail")
    assert (list(tables), splits.test) == (["train", "test"], "test")
    assert tables["test"][0].columns.column_names == ["text", "label"]


def test_texts_are_found_in_the_columns_that_are_there(hub):
    """Questions are in another column than usual for TREC's copy on the hub, classes in the usual one."""
    answer = made(("question",), ["x"], {"train": 30, "test": 12})
    codes = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
    hub.answer = datasets.DatasetDict(
        {
            name: split.remove_columns("label").add_column("label_coarse_original", (codes * 9)[: len(split)])
            for name, split in answer.items()
        }
    )
    texts = read_texts("someone/questions", "trec")
    assert texts.class_names[:2] == ("abbreviation", "entity")
    assert texts.train.labels.tolist() == [i % 6 for i in range(30)]


def test_what_cannot_be_loaded_is_one_line(hub):
    hub.answer = ConnectionError("Couldn't reach the Hub\n(offline)")
    with pytest.raises(TaskError, match="cannot load 'nyu-mll/glue': not a folder here, and the hub could") as error:
        load_text_task("qqp")
    assert "\n" not in str(error.value)
    assert "Couldn't reach the Hub (offline)" in str(error.value)
