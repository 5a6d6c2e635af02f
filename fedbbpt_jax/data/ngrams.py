"""Vocabularies for discrete prompts: phrases whose words stand together more often than chance, and their tokens.

Source: Diao et al., 2023, "Black-Box Prompt Learning for Pre-trained Language Models" (BDPL), and its published code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

Phrase = tuple[str, ...]


def pmi_ngrams(
    texts: Iterable[str], *, max_length: int = 5, min_pmi: float = 1.0, min_count: int = 5, min_frequency: int = 5
) -> list[str]:
    r"""Returns phrases of up to `max_length` words, the most frequent first.

    Texts are cut between words that do not belong together; those a, b do that are frequent, as a pair too, and have

    $$\mathrm{PMI}(a, b) = \ln \frac{n\, c(ab)}{c(a)\, c(b)} \ge \mathrm{min\_pmi}$$

    with counts c and the number n of pairs. Pieces that are frequent are phrases, single words included. Then phrases
    are counted anew wherever they stand, inside longer ones too. Of the same count, the last in the alphabet is first;
    what follows a phrase's last letter or digit is cut off.

    Differs from the published code, which leaves out the last piece of each text.

    Args:
      texts: of the training data; words are what spaces separate.
      max_length: longer pieces are no phrases.
      min_pmi: in nats.
      min_count: words, pairs and pieces that are counted more often than this are frequent.
      min_frequency: phrases that are counted anew more often than this are kept.

    Raises:
      ValueError: no phrase is left.

    Example:
      >>> pmi_ngrams(["very bad plot", "very bad cast.", "cast.", "plot"], min_count=1, min_frequency=1, min_pmi=0.5)
      ['very bad', 'plot', 'cast']
    """
    sentences = [words for text in texts if (words := text.split())]
    words, pairs = Counter(chain(*sentences)), Counter(chain(*map(pairwise, sentences)))
    together = {
        (a, b)
        for (a, b), count in pairs.items()
        if min(count, words[a], words[b]) > min_count
        and math.log(pairs.total() * count / (words[a] * words[b])) >= min_pmi
    }
    pieces = Counter(chain(*(_cut(sentence, together) for sentence in sentences)))
    phrases = {piece for piece, count in pieces.items() if count > min_count}
    everywhere = Counter(chain(*(_occurrences(sentence, phrases, max_length) for sentence in sentences)))
    ranked = sorted(((count, p) for p, count in everywhere.items() if count > min_frequency), reverse=True)
    found = list(dict.fromkeys(filter(None, (_up_to_last_letter(" ".join(p)) for _, p in ranked))))
    if not found:
        raise ValueError(
            f"no phrase in {len(sentences)} texts is counted more than {max(min_count, min_frequency)} times; give "
            "more texts, or a lower min_count and min_frequency"
        )
    return found


def candidate_tokens(tokenizer: Any, ngrams: Sequence[str], num_words: int) -> np.ndarray:
    """Returns the first N different tokens of phrases, int32 `[N]`; fewer where phrases have fewer.

    Each phrase is encoded with a space before it, as it stands in a text, and falls into its tokens: a language model
    that fills masks takes single tokens, not phrases.

    Args:
      tokenizer: of transformers.
      ngrams: phrases, the most wanted first.
      num_words: N.

    Raises:
      ValueError: N is not positive, or phrases have no tokens.
    """
    if num_words < 1:
        raise ValueError(f"num_words must be positive, got {num_words}")
    pieces = (tokenizer.encode(" " + ngram, add_special_tokens=False) for ngram in ngrams)
    ids = list(dict.fromkeys(chain(*pieces)))[:num_words]
    if not ids:
        raise ValueError(f"a vocabulary of {len(ngrams)} phrases has no tokens")
    return np.asarray(ids, np.int32)


def _cut(sentence: list[str], together: set[Phrase]) -> list[Phrase]:
    """Returns the pieces of a sentence whose neighbouring words belong together."""
    pieces = [[sentence[0]]]
    for pair in pairwise(sentence):
        if pair in together:
            pieces[-1].append(pair[1])
        else:
            pieces.append([pair[1]])
    return [tuple(piece) for piece in pieces]


def _occurrences(sentence: list[str], phrases: set[Phrase], max_length: int) -> list[Phrase]:
    """Returns the phrases that stand anywhere in a sentence, as often as they do."""
    places = range(len(sentence))
    found = (tuple(sentence[i : i + n]) for i in places for n in range(1, min(max_length, len(sentence) - i) + 1))
    return [phrase for phrase in found if phrase in phrases]


def _up_to_last_letter(text: str) -> str:
    return text[: max((i + 1 for i, letter in enumerate(text) if letter.isalnum()), default=0)]
