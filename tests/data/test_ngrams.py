import math

import numpy as np
import pytest

from fedbbpt_jax.data.ngrams import candidate_tokens, pmi_ngrams

# 4 x "not so good ." and 2 x "so what": counts not 4, so 6, good 4, "." 4, what 2; pairs "not so" 4, "so good" 4,
# "good ." 4, "so what" 2: 14 in all.
TEXTS = ["not so good ."] * 4 + ["so what"] * 2 + [" ", ""]


def pmi(pair, first, second, total=14):
    return math.log(total * pair / (first * second))


def test_a_hand_worked_vocabulary():
    """`so what` has PMI ln(28/12) = 0.85, `not so` and `so good` ln(56/24) = 0.85 too, `good .` ln(56/16) = 1.25.

    At 1, pieces are: not | so | good . (4 times), so | what (twice). "so" stands 6 times.
    """
    assert pmi(4, 4, 6) == pytest.approx(pmi(2, 6, 2)) == pytest.approx(0.847, abs=1e-3)
    found = pmi_ngrams(TEXTS, min_pmi=1.0, min_count=1, min_frequency=1)
    assert found == ["so", "not", "good", "what"]  # by count, then the last in the alphabet; "good ." lost its point


def test_words_that_belong_together_are_one_phrase():
    """At 0.8 every pair does: the texts themselves are phrases, and single words are none."""
    assert pmi_ngrams(TEXTS, min_pmi=0.8, min_count=1, min_frequency=1) == ["not so good", "so what"]


def test_pieces_longer_than_allowed_are_no_phrases():
    assert pmi_ngrams(TEXTS, min_pmi=0.8, min_count=1, min_frequency=1, max_length=3) == ["so what"]


def test_what_is_counted_seldom_does_not_count():
    """More often than min_count is meant for words, pairs and pieces; than min_frequency, for phrases at the end."""
    assert pmi_ngrams(TEXTS, min_pmi=1.0, min_count=2, min_frequency=1) == ["so", "not", "good"]
    assert pmi_ngrams(TEXTS, min_pmi=1.0, min_count=1, min_frequency=4) == ["so"]
    # 4 is not more than 4: no pair is frequent, and of the words only "so" is.
    assert pmi_ngrams(TEXTS, min_pmi=0.8, min_count=4, min_frequency=1) == ["so"]


def test_phrases_are_counted_inside_longer_ones_too():
    """`a b` is a phrase of its own 3 times, and within `a b c` 3 times more."""
    texts = ["a b"] * 3 + ["a b c"] * 3
    assert pmi_ngrams(texts, min_pmi=-9, min_count=2, min_frequency=5) == ["a b"]


def test_the_last_piece_of_a_text_counts():
    """The published code forgets it: there `z` would not be a phrase."""
    assert "z" in pmi_ngrams(["y z"] * 3, min_pmi=9, min_count=2, min_frequency=2)


def test_phrases_that_are_the_same_without_their_end_are_one():
    texts = ["well !"] * 3 + ["well ?"] * 3
    assert pmi_ngrams(texts, min_pmi=-9, min_count=2, min_frequency=2) == ["well"]


@pytest.mark.parametrize("texts", [[], ["", " "], ["a b c"], ["!"] * 9])
def test_an_empty_vocabulary_is_an_error_that_says_what_to_do(texts):
    with pytest.raises(ValueError, match=r"no phrase in \d texts .* lower min_count"):
        pmi_ngrams(texts)


class Halves:
    """A tokenizer that halves words; a token's id is its place in a list that grows."""

    def __init__(self):
        self.pieces = []

    def encode(self, text, add_special_tokens):
        assert text[0] == " "
        assert not add_special_tokens
        found = [piece for word in text.split() for piece in (word[: len(word) // 2], word[len(word) // 2 :])]
        self.pieces += [piece for piece in dict.fromkeys(found) if piece not in self.pieces]
        return [self.pieces.index(piece) for piece in found]


def test_tokens_of_phrases_once_each_in_their_order():
    tokenizer = Halves()
    found = candidate_tokens(tokenizer, ["abab", "abcd ef", "cdgh"], 9)
    assert [tokenizer.pieces[i] for i in found] == ["ab", "cd", "e", "f", "gh"]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(candidate_tokens(tokenizer, ["abab", "abcd ef", "cdgh"], 3), found[:3])


@pytest.mark.parametrize(("ngrams", "num_words", "message"), [([], 5, "no tokens"), (["ab"], 0, "num_words")])
def test_a_vocabulary_without_tokens_is_refused(ngrams, num_words, message):
    with pytest.raises(ValueError, match=message):
        candidate_tokens(Halves(), ngrams, num_words)
