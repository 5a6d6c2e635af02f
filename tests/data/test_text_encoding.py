from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_texts import real_folder, real_tokenizer
from synthetic_texts import word_tokenizer

from fedbbpt_jax.data.text_encoding import encode_masked, encode_sentences, encode_task, texts_that_fit
from fedbbpt_jax.data.text_rows import TextRows
from fedbbpt_jax.data.text_tasks import TaskTexts, load_text_task
from fedbbpt_jax.data.text_templates import render
from fedbbpt_jax.errors import TaskError

ONE, TWO = "{0} It was [MASK].", "{0}[SEP]{1}? [MASK],"


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{(first + i) % 40}" for i in range(count))


def tokens(ids, attended=None) -> list[str]:
    return word_tokenizer().convert_ids_to_tokens(ids if attended is None else ids[attended])


def test_ids_of_one_text():
    ids, attended = encode_masked([("w1 w2",), ("w3",)], ONE, word_tokenizer(), 30)
    assert (ids.dtype, attended.dtype, ids.shape) == (np.int32, bool, (2, 8))
    assert tokens(ids[0]) == ["<s>", "w1", "w2", "It", "was", "<mask>", ".", "</s>"]
    assert tokens(ids[1]) == ["<s>", "w3", "It", "was", "<mask>", ".", "</s>", "<pad>"]
    np.testing.assert_array_equal(attended, ids != word_tokenizer().pad_token_id)


def test_ids_of_two_texts():
    ids, _ = encode_masked([("w1", "w2 w3")], TWO, word_tokenizer(), 30)
    assert tokens(ids[0])[:9] == ["<s>", "w1", "</s>", "w2", "w3", "?", "<mask>", ",", "</s>"]


@pytest.mark.parametrize(
    ("multiple", "max_length", "width"), [(1, 99, 9), (8, 99, 16), (64, 99, 64), (64, 50, 50), (8, 9, 9)]
)
def test_width(multiple, max_length, width):
    ids, attended = encode_masked([(words(3),), (words(1),)], ONE, word_tokenizer(), max_length, multiple=multiple)
    assert ids.shape == attended.shape == (2, width)
    assert attended.sum(1).tolist() == [9, 7]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(6, 40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_long_text_loses_its_end(sizes, max_length):
    """As much of the text stays as there is room for, and all of the template."""
    ids, attended = encode_masked([(words(size),) for size in sizes], ONE, word_tokenizer(), max_length)
    for size, own, mask in zip(sizes, ids, attended, strict=True):
        kept = min(size, max_length - 6)
        assert tokens(own, mask) == ["<s>", *words(kept).split(), "It", "was", "<mask>", ".", "</s>"]


@given(st.integers(0, 60), st.integers(0, 60), st.integers(6, 60))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_of_two_texts_the_longer_loses_its_end(first, second, max_length):
    ids, attended = encode_masked([(words(first), words(second, 7))], TWO, word_tokenizer(), max_length)
    found = tokens(ids[0], attended[0])
    end = found.index("</s>")
    left, right = found[1:end], found[end + 1 : -4]
    assert found[-4:] == ["?", "<mask>", ",", "</s>"]
    assert left == words(len(left)).split()
    assert right == words(len(right), 7).split()
    room = max_length - 6
    if first + second <= room:
        assert (len(left), len(right)) == (first, second)
    else:
        assert room - 1 <= len(left) + len(right) <= room  # an odd token is not given to either
        shorter, longer = sorted([(first, len(left)), (second, len(right))])
        assert shorter[1] == min(shorter[0], room // 2)
        assert longer[1] >= shorter[1]


def test_texts_keep_400_tokens_and_200_each_of_two():
    """BDPL's limits, wherever there is room for more."""
    _, attended = encode_masked([(words(450),), (words(400),), (words(9),)], ONE, word_tokenizer(), 600)
    assert attended.sum(1).tolist() == [406, 406, 15]
    _, attended = encode_masked([(words(450), words(3)), (words(450), words(260))], TWO, word_tokenizer(), 600)
    assert attended.sum(1).tolist() == [209, 406]


@pytest.mark.parametrize("max_length", [1, 5])
def test_a_template_that_does_not_fit(max_length):
    message = rf"the template .* alone is {6 - max_length} tokens too long: {max_length} positions are left for it"
    with pytest.raises(TaskError, match=message):
        encode_masked([("w1 w2",)], ONE, word_tokenizer(), max_length)


def test_a_text_must_not_hold_the_mask():
    """`[MASK]` is a word like others to this tokenizer."""
    ids, _ = encode_masked([("w1 [MASK]",)], ONE, word_tokenizer(), 30)
    assert tokens(ids[0])[2] == "[MASK]"
    with pytest.raises(TaskError, match=r"2 masks in 'w2 <mask> It was <mask>\.'; expected one"):
        encode_masked([("w1",), ("w2 <mask>",)], ONE, word_tokenizer(), 30)


def test_what_a_masked_language_model_needs():
    with pytest.raises(TaskError, match="needs a template, such as"):
        encode_masked([("w1",)], "", word_tokenizer(), 30)
    with pytest.raises(TaskError, match="needs a tokenizer with a mask token"):
        encode_masked([("w1",)], ONE, SimpleNamespace(mask_token=None), 30)
    with pytest.raises(TaskError, match="a template for 1 of texts"):
        encode_masked([("w1",)], TWO, word_tokenizer(), 30)


def test_examples_that_fit_are_kept_whole():
    """BBT leaves out what is too long."""
    texts = [(words(size),) for size in (3, 6, 4, 500)]
    kept = texts_that_fit(ONE, word_tokenizer(), 10)(texts)
    assert kept.tolist() == [True, False, True, False]
    _, attended = encode_masked(
        [text for text, keep in zip(texts, kept, strict=True) if keep], ONE, word_tokenizer(), 10
    )
    assert attended.sum(1).tolist() == [9, 10]


def test_sentences():
    ids, attended = encode_sentences([("w1 w2",), (words(20),)], word_tokenizer(), 10, multiple=4)
    assert ids.shape == (2, 10)
    assert tokens(ids[0], attended[0]) == ["<s>", "w1", "w2", "</s>"]
    assert tokens(ids[1], attended[1]) == ["<s>", *words(8).split(), "</s>"]
    ids, attended = encode_sentences([("w1", "w2 w3")], word_tokenizer(), 20)
    assert tokens(ids[0], attended[0]) == ["<s>", "w1", "</s>", "</s>", "w2", "w3", "</s>"]
    ids, attended = encode_sentences([(words(3), words(30, 5))], word_tokenizer(), 12)
    assert tokens(ids[0], attended[0])[1:4] == words(3).split()
    assert attended.sum() == 12


def test_a_task_is_encoded_part_by_part():
    parts = [
        TextRows(tuple((words(i + 1),) for i in range(size)), np.arange(size, dtype=np.int32) % 2) for size in (4, 2, 9)
    ]
    task = TaskTexts("name", "here", ("a", "b"), ONE, (" good", " bad"), ("good", "bad"), "f1", *parts)
    encoded = encode_task(task, lambda texts: encode_masked(texts, task.template, word_tokenizer(), 30, multiple=1))
    assert (encoded.name, encoded.class_names, encoded.image_size) == ("name", ("a", "b"), 0)
    assert encoded.metric == "f1"
    for part, rows in zip((encoded.train, encoded.validation, encoded.test), parts, strict=True):
        assert part.inputs.ids.shape == (len(rows.texts), len(rows.texts) + 6)
        assert part.inputs.attended.sum(1).tolist() == [7 + i for i in range(len(rows.texts))]
        np.testing.assert_array_equal(part.labels, rows.labels)
        assert (part.features.shape, part.features.dtype) == ((len(rows.texts), 0), np.float32)


# Real texts and vocabularies


@pytest.mark.parametrize("name", ["sst2", "agnews", "trec", "rte", "snli"])
def test_ids_are_those_of_transformers_on_the_whole_string(name):
    tokenizer = real_tokenizer("roberta")
    real_folder("text")
    task = load_text_task(name, test_limit=120)
    ids, attended = encode_masked(task.test.texts, task.template, tokenizer, 512)
    num_cut = 0
    for example, own, mask in zip(task.test.texts, ids, attended, strict=True):
        asked = tokenizer(render(task.template, example, tokenizer))["input_ids"]
        assert asked.count(tokenizer.mask_token_id) == 1
        if len(tokenizer(example[0])["input_ids"]) > 202:  # one statement of RTE
            num_cut += 1
            assert own[:201].tolist() == asked[:201]
        else:
            assert own[mask].tolist() == asked
        assert (own[~mask] == tokenizer.pad_token_id).all()
    assert num_cut == (name == "rte")


def test_published_ids():
    tokenizer = real_tokenizer("roberta")
    ids, attended = encode_masked([("A great film.",)], "{0} It was [MASK].", tokenizer, 512)
    assert ids[0][attended[0]].tolist() == [0, 250, 372, 822, 4, 85, 21, 50264, 4, 2]
    ids, attended = encode_sentences([("A great film.",)], real_tokenizer("bert"), 512)
    assert ids[0][attended[0]].tolist() == [101, 1037, 2307, 2143, 1012, 102]


@given(st.text(max_size=60), st.integers(9, 40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_text_fits_any_length(text, max_length):
    """Characters of several tokens are not divided; nothing but the text is cut."""
    tokenizer = real_tokenizer("roberta")
    ids, attended = encode_masked([(text,)], "{0} It was [MASK].", tokenizer, max_length)
    own = ids[0][attended[0]]
    assert len(own) <= max_length
    assert own[-5:].tolist() == [85, 21, 50264, 4, 2]
    assert text.startswith(tokenizer.decode(own[1:-5]).rstrip()) or len(tokenizer(text)["input_ids"]) + 5 <= max_length


def test_long_real_pairs_fit_a_small_model():
    tokenizer = real_tokenizer("roberta")
    real_folder("text")
    task = load_text_task("rte")
    ids, attended = encode_masked(task.test.texts, task.template, tokenizer, 40)
    assert ids.shape == (277, 40)
    assert (attended.sum(1) >= 30).sum() > 200
    assert (ids == tokenizer.mask_token_id).sum(1).tolist() == [1] * 277
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    for own in ids:  # no space is left where a text is cut
        first = tokenizer.decode(own[1 : own.tolist().index(tokenizer.sep_token_id)])
        assert first == first.rstrip()
