"""Sentence encoders as classifiers: a prompt is what the same words in the text would be, on either side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_checkpoints import RANDOM, WORDPIECE_VOCABULARY, write_wordpiece
from transformers import AutoTokenizer, BertConfig

from fedbbpt_jax.black_box.sentences import label_classifier, sentence_classifier
from fedbbpt_jax.models.bert import BertEncoder
from fedbbpt_jax.models.loading import PretrainedText, tokenize
from fedbbpt_jax.models.sentence_classifiers import SCALE, EncodedText, embed_sentences
from fedbbpt_jax.types import Query

TEXTS = ["a good film", "bad films a good a bad film", "film", "good bad good bad", "a film"]
CLASSES = ["good", "a bad film", "bad bad"]
PROMPTS = np.array([[[5, 9], [6, 6]], [[8, 7], [8, 5]]], np.int32)  # two clients, two candidates, two tokens
CLIENTS, CANDIDATES, POSITIONS = PROMPTS.shape


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece")
    write_wordpiece(folder)
    config = BertConfig(**RANDOM, vocab_size=len(WORDPIECE_VOCABULARY), max_position_embeddings=24)
    config.save_pretrained(folder)
    graphdef, state = nnx.split(BertEncoder(config, rngs=nnx.Rngs(0)))
    return PretrainedText(graphdef, nnx.to_pure_dict(state), AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def texts(model):
    return EncodedText(*tokenize(model.tokenizer, TEXTS))


def embeddings(model, texts, prompts=((),)):
    """Of each text with each prompt written into it, `[prompts, texts, E]`."""
    tokens = [model.tokenizer.encode(text) for text in texts]
    rows = [[ids[0], *prompt, *ids[1:]] for prompt in prompts for ids in tokens]
    padded = np.array([row + [0] * (24 - len(row)) for row in rows])
    attended = np.array([[i < len(row) for i in range(24)] for row in rows])
    found = nnx.merge(model.graphdef, model.params).embed(jnp.asarray(padded), jnp.asarray(attended))
    return np.asarray(found).reshape(len(prompts), len(texts), -1)


def soft(model, prompts):
    return nnx.merge(model.graphdef, model.params).embeddings.word_embeddings(jnp.asarray(prompts))


def of_each_client(x):
    return jax.tree.map(lambda leaf: np.stack([leaf] * CLIENTS), x)


@pytest.fixture(params=["ids", pytest.param("embeddings", marks=pytest.mark.slow)])
def prompts(request, model):
    return jnp.asarray(PROMPTS) if request.param == "ids" else soft(model, PROMPTS)


@pytest.mark.slow
def test_a_prompt_in_the_sentences(model, texts, prompts):
    response = jax.jit(sentence_classifier(model, CLASSES).__call__)(Query(prompts, of_each_client(texts)))
    sentences = embeddings(model, TEXTS, PROMPTS.reshape(-1, POSITIONS))
    expected = SCALE * sentences @ embeddings(model, CLASSES)[0].T
    np.testing.assert_allclose(response.scores.reshape(expected.shape), expected, atol=2e-5)
    assert response.valid.all()


def test_a_prompt_in_the_class_texts(model, texts, prompts):
    sentences = embed_sentences(model, texts)
    response = jax.jit(label_classifier(model, CLASSES).__call__)(Query(prompts, of_each_client(sentences)))
    classes = embeddings(model, CLASSES, PROMPTS.reshape(-1, POSITIONS))
    expected = SCALE * np.einsum("be,mne->mbn", embeddings(model, TEXTS)[0], classes)
    np.testing.assert_allclose(response.scores.reshape(expected.shape), expected, atol=2e-5)
    assert response.valid.all()


@pytest.mark.slow
def test_without_a_prompt_the_sides_agree(model, texts):
    empty = jnp.zeros((1, 1, 0), jnp.int32)
    one = jax.tree.map(lambda x: x[None], (texts, embed_sentences(model, texts)))
    left = sentence_classifier(model, CLASSES)(Query(empty, one[0])).scores
    right = label_classifier(model, CLASSES)(Query(empty, one[1])).scores
    np.testing.assert_allclose(left, right, atol=2e-5)


@pytest.mark.slow
def test_rounds_may_batch_over_queries(model, texts, prompts):
    """The compiled round asks about one client and candidate at a time and maps over them."""
    box, sentences = label_classifier(model, CLASSES), of_each_client(embed_sentences(model, texts))
    whole = box(Query(prompts, sentences)).scores
    for k in range(CANDIDATES):
        apart = jax.vmap(lambda p, s: box(Query(p[None, None], s[None])).scores[0, 0])(prompts[:, k], sentences)
        np.testing.assert_allclose(apart, whole[:, k], atol=2e-5)


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_sentences_are_embedded_in_chunks(model, texts, chunk_size):
    np.testing.assert_allclose(embed_sentences(model, texts, chunk_size), embeddings(model, TEXTS)[0], atol=2e-6)


def test_prompts_that_do_not_fit_are_refused(model, texts):
    sentences = embed_sentences(model, texts)
    box = label_classifier(model, CLASSES)
    with pytest.raises(ValueError, match=r"for 1 clients, got \(2, 2, 2\)"):
        box(Query(jnp.asarray(PROMPTS), sentences[None]))
    with pytest.raises(ValueError, match=r"for 2 clients, got \(2, 2, 5, 2\)"):
        box(Query(jnp.asarray(PROMPTS)[:, :, None].repeat(5, 2), of_each_client(sentences)))
    with pytest.raises(ValueError, match=r"tokens are more than the model's 24 positions"):
        box(Query(jnp.zeros((1, 1, 23), jnp.int32), sentences[None]))


@pytest.mark.parametrize("classes", [CLASSES[:1], [CLASSES[0], CLASSES[0]], []])
def test_classes_must_differ(model, classes):
    with pytest.raises(ValueError, match="at least two classes"):
        label_classifier(model, classes)
