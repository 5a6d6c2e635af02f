"""Heads: class features, label words, and what a prompt may look like."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_checkpoints import BPE_VOCABULARY, RANDOM, compiled, padded_texts, random_network, write_bpe
from transformers import AutoTokenizer, RobertaConfig

from fedbbpt_jax.black_box.frozen import clip_classifier
from fedbbpt_jax.models.classifiers import (
    ImageClassifier,
    MaskedText,
    VerbalizedClassifier,
    as_float,
    class_features,
    label_word_ids,
)
from fedbbpt_jax.models.clip import CLIP
from fedbbpt_jax.models.loading import load_clip, tokenize
from fedbbpt_jax.models.roberta import RobertaForMaskedLM
from fedbbpt_jax.pretrained import MINI_CLIP

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("the digit {}", "a digit {}", "{} the digit")
MASK, MASKS = BPE_VOCABULARY.index("<mask>"), (7, 1, 3, 2, 1, 2)
ATOL = 1e-6  # unit vectors in float32
SCORES = 5e-5  # the same, times a temperature of 20


@pytest.fixture(autouse=True, scope="module")
def exact():
    """As the other tests of models, with whom these share compiled operations."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def clip():
    return load_clip(MINI_CLIP)


@pytest.fixture(scope="module")
def model(clip):
    return nnx.merge(clip.graphdef, clip.params)


encode_text = nnx.jit(CLIP.encode_text)


@nnx.jit
def score(classifier, prompts, inputs):
    return classifier(prompts, inputs)


# Class features


def test_features_are_the_mean_over_templates_scaled_to_length_one(clip, model):
    per_template = [
        np.asarray(encode_text(model, *tokenize(clip.tokenizer, [template.replace("{}", name) for name in NAMES])))
        for template in TEMPLATES
    ]
    mean = np.mean(np.float64(per_template), axis=0)
    expected = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    features = class_features(model, clip.tokenizer, NAMES, TEMPLATES)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, expected, atol=ATOL)
    assert np.abs(expected - per_template[0]).max() > 1e-2  # the templates differ


def test_one_template_gives_its_own_features(clip, model):
    features = class_features(model, clip.tokenizer, NAMES, ("the digit {}",))
    expected = encode_text(model, *tokenize(clip.tokenizer, [f"the digit {name}" for name in NAMES]))
    np.testing.assert_allclose(features, expected, atol=ATOL)


def test_every_template_weighs_the_same_in_any_order(clip, model):
    features = class_features(model, clip.tokenizer, NAMES, TEMPLATES)
    np.testing.assert_allclose(features, class_features(model, clip.tokenizer, NAMES, TEMPLATES[::-1]), atol=ATOL)


def test_names_that_the_tokenizer_does_not_know_are_refused(clip):
    """The shipped model knows digits only: both words become its token for unknown ones."""
    with pytest.raises(ValueError, match="'cat' and 'dog' the same features"):
        clip_classifier(clip, ("one", "cat", "two", "dog", *NAMES[3:9]), ("the digit {}",))


@pytest.mark.parametrize("template", ["", "the digit", "{} or {}", "{0}", "{name}", "{"])
def test_a_template_without_exactly_one_place_is_refused(clip, template):
    with pytest.raises(ValueError, match=r"one \{\}") as error:
        clip_classifier(clip, NAMES, ("the digit {}", template))
    assert repr(template) in str(error.value)


@pytest.mark.filterwarnings("ignore:Token indices")
def test_a_text_longer_than_the_positions_is_refused(clip):
    """The network has 12, of which two are the marks of begin and end."""
    with pytest.raises(ValueError, match=r"13 tokens.* 12 positions"):
        clip_classifier(clip, (" ".join(["seven"] * 11),), ("{}",))


@pytest.mark.parametrize(
    ("names", "templates", "named"), [((), ("{}",), "class"), (NAMES, (), "template")], ids=["names", "templates"]
)
def test_nothing_to_name_is_refused(clip, names, templates, named):
    with pytest.raises(ValueError, match=named):
        clip_classifier(clip, names, templates)


# Label words


@pytest.fixture(scope="module")
def roberta_tokenizer(tmp_path_factory):
    """The published vocabulary of RoBERTa."""
    source = Path(os.environ.get("FEDBBPT_DATA", "")) / "tokenizers" / "roberta"
    if not source.is_dir():
        pytest.skip("FEDBBPT_DATA names no folder with the real vocabularies")
    folder = tmp_path_factory.mktemp("roberta")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    write_bpe(folder)
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_label_words_of_the_real_vocabulary(roberta_tokenizer):
    ids = label_word_ids(roberta_tokenizer, (" great", " terrible"))
    assert ids.dtype == np.int32
    assert ids.tolist() == [372, 6587]  # as published


def test_a_real_word_without_its_space_is_refused(roberta_tokenizer):
    """The same word at the beginning of a text is two tokens."""
    with pytest.raises(ValueError, match="the label word 'terrible' is 2 tokens") as error:
        label_word_ids(roberta_tokenizer, (" great", "terrible"))
    assert "' terrible', with the space before it" in str(error.value)


def test_label_words_are_their_tokens(bpe):
    assert label_word_ids(bpe, (" bad", " good", "a")).tolist() == [
        BPE_VOCABULARY.index(token) for token in ("Ġbad", "Ġgood", "a")
    ]


@pytest.mark.parametrize(("word", "pieces"), [("good", ["g", "oo", "d"]), (" goods", ["Ġgood", "s"])])
def test_a_word_of_several_tokens_is_refused_with_its_pieces(bpe, word, pieces):
    with pytest.raises(ValueError, match=f"the label word '{word}' is {len(pieces)} tokens") as error:
        label_word_ids(bpe, (" bad", word))
    assert str(pieces) in str(error.value)
    assert ("did you mean ' good'" in str(error.value)) == (word == "good")


def test_equal_label_words_are_refused(bpe):
    with pytest.raises(ValueError, match=r"' good', ' bad', ' good'.* not different"):
        label_word_ids(bpe, (" good", " bad", " good"))


@pytest.mark.parametrize("words", [(), ("",), (" good", "")], ids=["none", "empty", "one-empty"])
def test_no_label_word_is_refused(bpe, words):
    with pytest.raises(ValueError, match="label word"):
        label_word_ids(bpe, words)


# Prompts of images


@pytest.fixture(scope="module")
def images(clip, model):
    """A classifier, pictures in uint8 and a prompt for each."""
    rng = np.random.default_rng(0)
    classifier = ImageClassifier(model, class_features(model, clip.tokenizer, NAMES, TEMPLATES), clip.pixels)
    return classifier, rng.integers(0, 256, (16, 32, 32, 3), np.uint8), rng.normal(0, 0.2, (16, 32, 32, 3)).astype("f")


def test_bytes_and_fractions_score_the_same(images):
    classifier, pixels, prompts = images
    fractions = pixels.astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(as_float(jnp.asarray(pixels)), fractions, atol=1e-7)  # one rounding
    scores = score(classifier, prompts, pixels)
    np.testing.assert_allclose(scores, score(classifier, prompts, fractions), atol=SCORES)


def test_pixels_are_clipped_after_the_prompt_and_before_normalisation(images, model, clip):
    classifier, pixels, prompts = images
    prompted = np.clip(pixels / np.float32(255) + prompts, 0, 1)
    expected = model.scores(
        compiled(CLIP.encode_image, clip, (prompted - clip.pixels.mean) / clip.pixels.std),
        classifier.class_features[...],
    )
    np.testing.assert_allclose(score(classifier, prompts, pixels), expected, atol=SCORES)


# Prompts of texts


@pytest.fixture(scope="module")
def texts():
    """A random masked language model, its classifier, and texts with the mask at different places."""
    config = RobertaConfig(
        **RANDOM, vocab_size=len(BPE_VOCABULARY), max_position_embeddings=20, type_vocab_size=1, layer_norm_eps=1e-5
    )
    masked_lm = nnx.merge(*random_network(RobertaForMaskedLM, config))
    ids, attended = padded_texts(6, 9, MASK, first=0, last=2, pad=1, lowest=4)
    ids[np.arange(6), MASKS] = MASK
    return masked_lm, VerbalizedClassifier(masked_lm, np.array([7, 30, 5]), MASK), MaskedText(ids, attended)


def test_a_text_without_a_mask_has_no_score(texts):
    _, classifier, text = texts
    ids = np.where(np.arange(len(text.ids))[:, None] == 1, np.where(text.ids == MASK, 5, text.ids), text.ids)
    scores = np.asarray(classifier(jnp.zeros((len(ids), 0), jnp.int32), text._replace(ids=ids)))
    assert np.isnan(scores[1]).all()
    assert np.isfinite(np.delete(scores, 1, axis=0)).all()


def test_scores_are_those_of_the_language_model_at_the_mask(texts):
    masked_lm, classifier, text = texts
    prompts = np.random.default_rng(1).integers(4, MASK, (6, 4)).astype(np.int32)
    every_word = nnx.jit(RobertaForMaskedLM.__call__)(
        masked_lm, *text, classifier.trunk.embeddings.word_embeddings(prompts)
    )
    expected = np.stack([every_word[b, 4 + place] for b, place in enumerate(MASKS)])[:, [7, 30, 5]]
    scores = score(classifier, prompts, text)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)  # float32, of scores of size 3


def test_prompts_as_ids_and_as_their_embeddings_score_the_same(texts):
    _, classifier, text = texts
    ids = np.random.default_rng(1).integers(4, MASK, (6, 4)).astype(np.int32)
    embeddings = classifier.trunk.embeddings.word_embeddings(ids)
    np.testing.assert_allclose(score(classifier, ids, text), score(classifier, embeddings, text), atol=1e-5)  # float32


def test_a_rank_tells_ids_from_embeddings(texts, images):
    classifier = texts[1]
    assert classifier.prompt_rank(jnp.zeros((4, 3), jnp.int32)) == 1
    assert classifier.prompt_rank(jnp.zeros((4, 3, 24))) == 2
    assert images[0].prompt_rank(jnp.zeros((32, 32, 3))) == 3


def test_only_the_label_words_are_left_of_the_head(texts):
    """The table of input words stays, for prompts as ids; a head over all words would be as large again."""
    _, classifier, _ = texts
    _, state = nnx.split(classifier)
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.to_pure_dict(state))]
    assert shapes.count((len(BPE_VOCABULARY), 24)) == 1
    assert (3, 24) in shapes
