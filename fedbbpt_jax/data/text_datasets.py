"""The table of text data sets: BDPL's seven of GLUE and BBT's, where the hub has them and how a model is asked.

In a template `{0}` and `{1}` are the texts, `[MASK]` and `[SEP]` the tokenizer's own tokens. Label words stand at the
mask, with the space before them. Class texts are what a sentence is compared with by an encoder of sentences.

Source: Diao et al., 2023, "Black-Box Prompt Learning for Pre-trained Language Models" (BDPL); Sun et al., 2022,
"Black-Box Tuning for Language-Model-as-a-Service" (BBT); both with their code. TREC's template and words are those of
Gao et al., 2021, "Making Pre-trained Language Models Better Few-shot Learners" (LM-BFF). Class texts are the project's.

Differs from BDPL: its label words of MNLI are no, maybe, yes, which says "no" to an entailment, GLUE's first label.
Here they are yes, maybe, no; `published_label_words` has the published order. Differs from BBT: label words have the
space before them that they have in a text, and Athlete is athlete, so that each of them is one token and not the
beginning of a word.

The hub could not be reached when this was written. That each data set has these splits and columns is known from public
code that loads it; none of them needs a loading script.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedbbpt_jax.data.image_rows import Splits
from fedbbpt_jax.data.text_rows import Classes, TextColumns
from fedbbpt_jax.types import Metric


class TextTask(NamedTuple):
    """A row of the table.

    Attributes:
      description: a line for `fedbbpt list tasks`.
      hub_id: of a data set of the Hugging Face hub.
      columns: of the hub's.
      classes: their names and spellings.
      template: the text that is asked, with one `[MASK]`.
      label_words: N words, each one token.
      class_texts: N texts for an encoder of sentences.
      metric: what the papers report.
      config: the name of the hub's configuration, where it has several.
      splits: which splits play which part.
      published_label_words: where those of the paper are others.
      clean: applied to every text.
    """

    description: str
    hub_id: str
    columns: TextColumns
    classes: Classes
    template: str
    label_words: tuple[str, ...]
    class_texts: tuple[str, ...]
    metric: Metric = "accuracy"
    config: str | None = None
    splits: Splits = Splits("train", None, "test")
    published_label_words: tuple[str, ...] = ()
    clean: Callable[[str], str] = str.strip


def without_line_breaks(text: str) -> str:
    r"""Returns the text with spaces for line breaks, which Yelp's reviews write as a backslash and an n."""
    return text.replace("\\n", " ").strip()


GLUE = "nyu-mll/glue"
GLUE_SPLITS = Splits("train", None, "validation")  # the labels of its test split are not public
INFERENCE = Classes(("entailment", "neutral", "contradiction"), unlabelled=("-1", "-"))
INFERENCE_TEXTS = (
    "the second statement follows from the first",
    "the second statement may or may not be true",
    "the second statement contradicts the first",
)
ENTAILMENT = Classes(("entailment", "not_entailment"))
SENTIMENT = Classes(("negative", "positive"), codes=("1", "2"))
ONTOLOGY = (
    ("Company", " Company", "a company"),
    ("EducationalInstitution", " Education", "a school or university"),
    ("Artist", " Artist", "an artist"),
    ("Athlete", " athlete", "an athlete"),
    ("OfficeHolder", " Office", "a politician or holder of an office"),
    ("MeanOfTransportation", " Transportation", "a ship, car, train or aircraft"),
    ("Building", " Building", "a building"),
    ("NaturalPlace", " Natural", "a river, mountain or other natural place"),
    ("Village", " Village", "a village"),
    ("Animal", " Animal", "an animal"),
    ("Plant", " Plant", "a plant"),
    ("Album", " Album", "an album of music"),
    ("Film", " Film", "a film"),
    ("WrittenWork", " Written", "a book, newspaper or other written work"),
)
QUESTIONS = (
    ("abbreviation", "ABBR", " Expression", "what an abbreviation means"),
    ("entity", "ENTY", " Entity", "which thing, animal, product or work"),
    ("description", "DESC", " Description", "what something is, why or how it happens"),
    ("human", "HUM", " Human", "which person or group of people"),
    ("location", "LOC", " Location", "which place"),
    ("number", "NUM", " Number", "how many, how much or when"),
)

MNLI = TextTask(
    "whether one statement follows from another, 3 classes, test of the training's genres",
    GLUE,
    TextColumns(("premise", "hypothesis"), "label"),
    INFERENCE,
    "{0}[SEP]{1} entailment? [MASK].",
    (" yes", " maybe", " no"),
    INFERENCE_TEXTS,
    config="mnli",
    splits=Splits("train", None, "validation_matched"),
    published_label_words=(" no", " maybe", " yes"),
)

TEXT_TASKS: dict[str, TextTask] = {
    "mnli": MNLI,
    "mnli-mm": MNLI._replace(
        description="whether one statement follows from another, 3 classes, test of other genres",
        splits=Splits("train", None, "validation_mismatched"),
    ),
    "qqp": TextTask(
        "whether two questions ask the same, 2 classes, F1",
        GLUE,
        TextColumns(("question1", "question2"), "label"),
        Classes(("not_duplicate", "duplicate")),
        "{0}[SEP]{1}? [MASK],",
        (" no", " yes"),
        ("two questions that ask different things", "two questions that ask the same"),
        metric="f1",
        config="qqp",
        splits=GLUE_SPLITS,
    ),
    "sst2": TextTask(
        "sentiment of phrases from film reviews, 2 classes",
        GLUE,
        TextColumns(("sentence",), "label"),
        Classes(("negative", "positive")),
        "{0} It was [MASK].",
        (" terrible", " great"),
        ("negative", "positive"),
        config="sst2",
        splits=GLUE_SPLITS,
    ),
    "mrpc": TextTask(
        "whether two sentences say the same, 2 classes, F1",
        GLUE,
        TextColumns(("sentence1", "sentence2"), "label"),
        Classes(("not_equivalent", "equivalent")),
        "{0}[SEP]{1}? [MASK],",
        (" no", " yes"),
        ("two sentences that say different things", "two sentences that say the same"),
        metric="f1",
        config="mrpc",
        splits=GLUE_SPLITS,
    ),
    "cola": TextTask(
        "whether a sentence is good English, 2 classes, Matthews correlation",
        GLUE,
        TextColumns(("sentence",), "label"),
        Classes(("unacceptable", "acceptable")),
        "{0} correct? [MASK].",
        (" no", " yes"),
        ("an ungrammatical sentence", "a grammatical sentence"),
        metric="matthews",
        config="cola",
        splits=GLUE_SPLITS,
    ),
    "qnli": TextTask(
        "whether a sentence answers a question, 2 classes",
        GLUE,
        TextColumns(("question", "sentence"), "label"),
        ENTAILMENT,
        "{0}[SEP]{1} entailment? [MASK].",
        (" yes", " no"),
        ("the sentence answers the question", "the sentence does not answer the question"),
        config="qnli",
        splits=GLUE_SPLITS,
    ),
    "rte": TextTask(
        "whether one statement follows from another, 2 classes",
        GLUE,
        TextColumns(("sentence1", "sentence2"), "label"),
        ENTAILMENT,
        "{0}[SEP]{1} entailment? [MASK].",
        (" yes", " no"),
        ("the second statement follows from the first", "the second statement does not follow from the first"),
        config="rte",
        splits=GLUE_SPLITS,
    ),
    "agnews": TextTask(
        "topics of news, 4 classes",
        "fancyzhx/ag_news",
        TextColumns(("text",), "label"),
        Classes(("World", "Sports", "Business", "Sci/Tech"), codes=("1", "2", "3", "4")),
        "[MASK] News: {0}",
        (" World", " Sports", " Business", " Tech"),
        ("world", "sports", "business", "technology"),
    ),
    "yelp": TextTask(
        "sentiment of reviews, 2 classes",
        "fancyzhx/yelp_polarity",
        TextColumns(("text",), "label"),
        SENTIMENT,
        "{0} . It was [MASK] .",
        (" bad", " great"),
        ("negative", "positive"),
        clean=without_line_breaks,
    ),
    "dbpedia": TextTask(
        "what an article is about, 14 classes",
        "fancyzhx/dbpedia_14",
        TextColumns(("content",), "label"),
        Classes(tuple(name for name, *_ in ONTOLOGY), codes=tuple(str(place + 1) for place in range(len(ONTOLOGY)))),
        "[ Category: [MASK] ] {0}",
        tuple(word for _, word, _ in ONTOLOGY),
        tuple(text for *_, text in ONTOLOGY),
    ),
    "trec": TextTask(
        "what a question asks for, 6 classes",
        "SetFit/TREC-QC",
        TextColumns(("text",), "label_coarse_original"),
        Classes(tuple(name for name, *_ in QUESTIONS), codes=tuple(code for _, code, *_ in QUESTIONS)),
        "[MASK]: {0}",
        tuple(word for *_, word, _ in QUESTIONS),
        tuple(text for *_, text in QUESTIONS),
    ),
    "snli": TextTask(
        "whether a caption follows from another, 3 classes",
        "stanfordnlp/snli",
        TextColumns(("premise", "hypothesis"), "label"),
        INFERENCE,
        "{0} ? [MASK] , {1}",
        (" Yes", " Maybe", " No"),
        INFERENCE_TEXTS,
    ),
}
