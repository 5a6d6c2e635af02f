"""Tasks that a served language model is asked about in plain text: no tokenizer and no weights are on this side.

An input is the number of its text, which the clients of one machine look up when they ask. A prompt is of phrases,
which stand before the text: `PROMPT TEXT It was`, and the model goes on with a label word.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedbbpt_jax.black_box.client.text_api import TextApi, chat, completions, written
from fedbbpt_jax.black_box.remote_texts import Render
from fedbbpt_jax.data.ngrams import pmi_ngrams
from fedbbpt_jax.data.text_encoding import encode_task
from fedbbpt_jax.data.text_rows import Texts
from fedbbpt_jax.data.text_templates import PLACES
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.training.experiment import ResolvedExperiment
from fedbbpt_jax.training.load_texts import read_phrases, task_texts
from fedbbpt_jax.types import Task

APIS = {"completions": completions, "chat": chat, "written": written}
BYTES_OF_A_TOKEN = 4
"""Of English, about; for forecasts only."""


def plain_task(e: ResolvedExperiment) -> Task:
    """Returns the task of an experiment with the numbers of its texts as inputs, int32 `[n]`.

    Raises:
      TaskError: the data cannot be read, or their template cannot be asked.
    """
    numbers = {text: number for number, text in enumerate(questions(e))}
    texts = task_texts(e)

    def encode(examples: Sequence[Texts]) -> np.ndarray:
        return np.array([numbers[asked(texts.template, example)] for example in examples], np.int32)

    return encode_task(texts, encode)


@functools.lru_cache(maxsize=4)
def questions(e: ResolvedExperiment) -> tuple[str, ...]:
    """Returns the different texts of all examples, as they are asked without a prompt."""
    texts = task_texts(e)
    parts = texts.train, texts.validation, texts.test
    return tuple(dict.fromkeys(asked(texts.template, example) for part in parts for example in part.texts))


def phrases(e: ResolvedExperiment) -> tuple[str, ...]:
    """Returns what a prompt is made of: the lines of a file, the PMI n-grams of the shots, or if too few their words.

    Raises:
      TaskError: the file cannot be read, or there are no phrases.
    """
    try:
        if e.text.vocabulary is not None:
            found = read_phrases(e.text.vocabulary)
        else:
            found = _frequent([text for texts in task_texts(e).train.texts for text in texts], e.text.num_words)
    except (OSError, ValueError) as error:
        raise TaskError(f"no phrases for a prompt: {error}") from error
    return tuple(dict.fromkeys(found))[: e.text.num_words]


def words_of(e: ResolvedExperiment, prompt: np.ndarray) -> str:
    """Returns a prompt, places among the phrases int `[P]`, as text."""
    known = phrases(e)
    return " ".join(known[place] for place in prompt)


def renderer(e: ResolvedExperiment) -> Render:
    """Returns what makes a text of a prompt and the number of an input."""
    known, texts = phrases(e), questions(e)
    return lambda prompt, number: " ".join([*(known[place] for place in prompt), texts[int(number)]])


def text_api(e: ResolvedExperiment) -> TextApi:
    """Returns how an experiment's model is asked."""
    return APIS[e.served.api](e.model)


def tokens_of_a_request(e: ResolvedExperiment) -> float:
    """Returns about how many tokens one prompt on one example is, with an answer of one token."""
    of_texts = np.mean([len(text.encode()) for text in questions(e)])
    of_phrases = e.text.prompt_length * (1 + np.mean([len(phrase.encode()) for phrase in phrases(e)]))
    return float(of_texts + of_phrases) / BYTES_OF_A_TOKEN + 1


def _frequent(texts: Sequence[str], number: int) -> list[str]:
    for rare in (5, 3, 2, 1):
        with contextlib.suppress(ValueError):
            if len(found := pmi_ngrams(texts, min_count=rare, min_frequency=rare)) >= number:
                return found
    return [word for word, _ in Counter(word for text in texts for word in text.split()).most_common()]


def asked(template: str, example: Texts) -> str:
    """Returns an example in a template, up to where the label word comes.

    Raises:
      TaskError: there is no template, or something that counts comes after the label word.

    Example:
      >>> asked("{0} It was [MASK].", ("A fine film.",))
      'A fine film. It was'
    """
    before, mask, after = template.partition("[MASK]")
    if not mask or any(letter.isalnum() for letter in after):
        raise TaskError(f"a language model goes on with a text: --templates must end in [MASK], got {template!r}")
    filling = {"[SEP]": "\n"} | {f"{{{index}}}": text for index, text in enumerate(example)}
    return "".join(filling.get(part, part) for part in PLACES.split(before)).rstrip()
