"""Texts to token ids of fixed shape, for masked language models and for encoders of sentences.

A text that is too long loses its end, as in BDPL: then the test is the same whatever the model and the length of the
prompt. BBT leaves long examples out instead (`texts_that_fit`), which makes another test of every tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedbbpt_jax.data.text_rows import TextRows, Texts
from fedbbpt_jax.data.text_tasks import Keep, TaskTexts
from fedbbpt_jax.data.text_templates import check_template, render
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.models.classifiers import MaskedText
from fedbbpt_jax.models.sentence_classifiers import EncodedText
from fedbbpt_jax.types import Examples, Task

TEXT_TOKENS = 400  # of one text, and half of it for each of two (BDPL)


def encode_task(task: TaskTexts, encode: Callable[[Sequence[Texts]], Any]) -> Task:
    """Returns the task as a model takes it. A text has no features, so that F = 0.

    Args:
      task: as loaded.
      encode: texts to inputs `[n, ...]`, such as `lambda texts: encode_masked(texts, task.template, tokenizer, 512)`.
    """

    def part(rows: TextRows) -> Examples:
        return Examples(encode(rows.texts), np.zeros((len(rows.labels), 0), np.float32), rows.labels)

    parts = part(task.train), part(task.validation), part(task.test)
    return Task(task.name, task.class_names, (), *parts, metric=task.metric)


def encode_masked(
    texts: Sequence[Texts], template: str, tokenizer: Any, max_length: int, *, multiple: int = 8
) -> MaskedText:
    """Returns the texts in the template, each with one mask: ids int32 and attended bool, both `[n, T]`.

    A text keeps at most 400 tokens, each of two 200; if an example is still longer than `max_length`, the longer of
    its texts is cut further. Template and mask are never cut.

    Args:
      texts: n examples of one or two texts.
      template: such as "{0} It was [MASK].".
      tokenizer: of transformers, with a mask token.
      max_length: most tokens, those at begin and end included: the model's positions less those of the prompt.
      multiple: T is the longest text, rounded up to a multiple of this, but not above `max_length`.

    Raises:
      TaskError: there is no template or no mask token, the template alone is too long, or a text holds the mask.
    """
    _check(texts, template, tokenizer)
    limit = TEXT_TOKENS // len(texts[0])
    columns = [_shortened(column, limit, tokenizer) for column in zip(*texts, strict=True)]
    shortened = list(zip(*columns, strict=True))
    rendered = [render(template, example, tokenizer) for example in shortened]
    encoded = tokenizer(rendered, verbose=False)["input_ids"]
    for row, own in enumerate(encoded):
        if len(own) > max_length:
            encoded[row] = _fitted(shortened[row], template, tokenizer, max_length)
    ids, attended = _padded(encoded, tokenizer.pad_token_id, max_length, multiple)
    num_masks = (ids == tokenizer.mask_token_id).sum(1)
    if (num_masks != 1).any():
        row = int(np.argmax(num_masks != 1))
        raise TaskError(
            f"{num_masks[row]} masks in {rendered[row]!r}; expected one: a text must not hold {tokenizer.mask_token}"
        )
    return MaskedText(ids, attended)


def encode_sentences(texts: Sequence[Texts], tokenizer: Any, max_length: int, *, multiple: int = 8) -> EncodedText:
    """Returns the texts as they are, two of them with the tokenizer's separator between: ids and attended `[n, T]`.

    Of a text that is too long the end is cut; of two, that of the longer.

    Args:
      texts: n examples of one or two texts.
      tokenizer: of transformers.
      max_length: most tokens, those at begin and end included.
      multiple: T is the longest text, rounded up to a multiple of this, but not above `max_length`.
    """
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation="longest_first", max_length=max_length, verbose=False)["input_ids"]
    return EncodedText(*_padded(encoded, tokenizer.pad_token_id, max_length, multiple))


def texts_that_fit(template: str, tokenizer: Any, max_length: int) -> Keep:
    """Returns the choice of examples that are at most `max_length` tokens in the template, uncut (BBT: 512).

    Raises:
      TaskError: when called: there is no template or no mask token.
    """

    def keep(texts: Sequence[Texts]) -> np.ndarray:
        _check(texts, template, tokenizer)
        rendered = [render(template, example, tokenizer) for example in texts]
        return np.array([len(ids) <= max_length for ids in tokenizer(rendered, verbose=False)["input_ids"]])

    return keep


def _check(texts: Sequence[Texts], template: str, tokenizer: Any) -> None:
    if not template:
        raise TaskError("a masked language model needs a template, such as '{0} It was [MASK].'; got none")
    check_template(template, len(texts[0]))
    if tokenizer.mask_token is None:
        raise TaskError("a masked language model needs a tokenizer with a mask token; this one has none")


def _shortened(texts: Sequence[str], limit: int, tokenizer: Any) -> list[str]:
    """Returns the beginnings of the texts that are at most `limit` tokens long."""
    offsets = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = zip(texts, offsets["offset_mapping"], strict=True)
    return [text if len(own) <= limit else _beginning(text, limit, tokenizer) for text, own in found]


def _beginning(text: str, limit: int, tokenizer: Any) -> str:
    while True:  # what is left may be divided otherwise, but is shorter every time
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in encoded["offset_mapping"]]
        if len(starts) <= limit:
            return text
        text = text[: min(starts[limit], len(text) - 1)].rstrip()


def _fitted(texts: Texts, template: str, tokenizer: Any, max_length: int) -> list[int]:
    """Returns the ids, at most `max_length`, of the template with what is left of the texts; the longer one is cut."""
    parts = list(texts)
    while True:
        ids = tokenizer(render(template, tuple(parts), tokenizer), verbose=False)["input_ids"]
        excess = len(ids) - max_length
        if excess <= 0:
            return ids
        sizes = [len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in parts]
        if not any(sizes):
            raise TaskError(
                f"the template {template!r} alone is {excess} tokens too long: {max_length} positions are left for it "
                "beside the prompt"
            )
        left = max(sum(sizes) - excess, 0)
        most = max(left - sum(sizes) + max(sizes), left // len(sizes))  # what the longer of two keeps, or each of them
        parts = [_beginning(part, most, tokenizer) for part in parts]


def _padded(ids: Sequence[Sequence[int]], pad: int, max_length: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(own) for own in ids])
    width = min(-(-lengths.max() // multiple) * multiple, max_length)
    attended = np.arange(width) < lengths[:, None]
    padded = np.full(attended.shape, pad, np.int32)
    padded[attended] = np.concatenate([np.asarray(own, np.int32) for own in ids])
    return padded, attended
