"""The table: what its rows say of themselves, and that a real RoBERTa can be asked them."""

import pytest
from real_texts import real_tokenizer

from fedbbpt_jax.data.text_datasets import TEXT_TASKS, without_line_breaks
from fedbbpt_jax.data.text_folders import TEXT_FOLDERS
from fedbbpt_jax.data.text_templates import check_template, render
from fedbbpt_jax.models.classifiers import label_word_ids
from fedbbpt_jax.training.metrics import METRICS

NUM_CLASSES = {"mnli": 3, "mnli-mm": 3, "snli": 3, "agnews": 4, "dbpedia": 14, "trec": 6}
METRIC = {"qqp": "f1", "mrpc": "f1", "cola": "matthews"}


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_rows(name):
    row = TEXT_TASKS[name]
    size = NUM_CLASSES.get(name, 2)
    for texts in (row.classes.names, row.label_words, row.class_texts):
        assert len(texts) == len(set(texts)) == size
    assert all(word.startswith(" ") for word in row.label_words)
    assert row.metric == METRIC.get(name, "accuracy")
    assert row.metric in METRICS
    assert len(row.classes.codes) in (0, size)
    assert row.description
    assert "\n" not in row.description
    assert row.splits.train == "train"
    assert row.splits.validation is None
    check_template(row.template, len(row.columns.texts))


def test_published_words_in_the_order_of_the_classes():
    words = {
        "sst2": (" terrible", " great"),
        "qqp": (" no", " yes"),
        "mrpc": (" no", " yes"),
        "cola": (" no", " yes"),
        "agnews": (" World", " Sports", " Business", " Tech"),
        "yelp": (" bad", " great"),
    }
    assert {name: TEXT_TASKS[name].label_words for name in words} == words
    assert TEXT_TASKS["sst2"].class_texts == TEXT_TASKS["sst2"].classes.names == ("negative", "positive")
    ontology = TEXT_TASKS["dbpedia"]
    beginnings = [word.strip().lower()[:4] for word in ontology.label_words]
    told = zip(beginnings, ontology.classes.names, strict=True)
    assert [name for beginning, name in told if beginning not in name.lower()] == []
    assert [name[0] for name in TEXT_TASKS["trec"].classes.names] == ["a", "e", "d", "h", "l", "n"]
    assert TEXT_TASKS["trec"].label_words[1:] == (" Entity", " Description", " Human", " Location", " Number")


def test_seven_tasks_of_glue():
    glue = {row.config for row in TEXT_TASKS.values() if row.hub_id == "nyu-mll/glue"}
    assert glue == {"mnli", "qqp", "sst2", "mrpc", "cola", "qnli", "rte"}
    assert set(TEXT_FOLDERS) <= set(TEXT_TASKS)


def test_an_entailment_is_a_yes():
    for name in ("mnli", "mnli-mm", "snli", "qnli", "rte"):
        row = TEXT_TASKS[name]
        words = dict(zip(row.classes.names, (word.lower() for word in row.label_words), strict=True))
        assert words["entailment"] == " yes"
        assert words.get("neutral", " maybe") == " maybe"
        assert {words.get("contradiction", " no"), words.get("not_entailment", " no")} == {" no"}
    assert TEXT_TASKS["mnli"].published_label_words == (" no", " maybe", " yes")


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_real_roberta_can_be_asked(name):
    tokenizer, row = real_tokenizer("roberta"), TEXT_TASKS[name]
    ids = label_word_ids(tokenizer, row.label_words)
    assert all(tokenizer.decode([token]) == word for token, word in zip(ids, row.label_words, strict=True))
    if row.published_label_words:
        assert sorted(label_word_ids(tokenizer, row.published_label_words)) == sorted(ids)
    texts = ("A first text.", "And another one")[: len(row.columns.texts)]
    asked = tokenizer(render(row.template, texts, tokenizer))["input_ids"]
    assert asked.count(tokenizer.mask_token_id) == 1
    assert asked.index(tokenizer.mask_token_id) > 0
    assert "Ġ" not in tokenizer.convert_ids_to_tokens(asked)  # no space of its own before the mask or twice


def test_line_breaks_of_yelp():
    assert without_line_breaks(r"Good.\n\nBut late.\n") == "Good.  But late."
    assert TEXT_TASKS["yelp"].clean is without_line_breaks
