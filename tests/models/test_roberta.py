"""RoBERTa and its prompts against `transformers.RobertaForMaskedLM` on torch."""

from contextlib import ExitStack
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import (
    BPE_VOCABULARY,
    DETECTED,
    PARITY,
    RANDOM,
    answer,
    compiled,
    difference,
    padded_texts,
    save_random,
    to_torch,
    torch_models,
    with_config,
    write_bpe,
)

from fedbbpt_jax.black_box.frozen import masked_lm_classifier
from fedbbpt_jax.models import roberta
from fedbbpt_jax.models.classifiers import MaskedText
from fedbbpt_jax.models.layers import ACTIVATIONS
from fedbbpt_jax.models.loading import load_roberta
from fedbbpt_jax.types import Query

pytestmark = pytest.mark.parity

BOS, PAD, EOS, MASK, NUM_WORDS = 0, 1, 2, BPE_VOCABULARY.index("<mask>"), len(BPE_VOCABULARY)
NUM_TEXTS, LENGTH, NUM_PROMPT, WIDTH = 6, 9, 4, RANDOM["hidden_size"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lm_scores(model, ids, attended, prompt=None, deep=None):
    """Returns scores of all words `[B, P + T, V]`."""
    return model(ids, attended, prompt, deep)


def with_prompt(text, prompt):
    """Returns `[B, P + T, ...]`, the prompt behind the first token."""
    return np.concatenate([text[:, :1], prompt, text[:, 1:]], axis=1)


def torch_scores(model, attended, *, deep=None, **inputs):
    """Returns what torch answers at the attended positions `[n, V]`; `deep` `[L, P, E]` joins the prompt's states."""
    torch = pytest.importorskip("torch")
    inputs = {name: to_torch(value)[0] for name, value in inputs.items()}

    def add(prefix):
        def hook(layer, args):
            states = args[0].clone()
            states[:, 1 : 1 + len(prefix)] += prefix
            return states, *args[1:]

        return hook

    with torch.no_grad(), ExitStack() as hooks:
        for layer, prefix in zip(model.roberta.encoder.layer, [] if deep is None else to_torch(deep)[0], strict=False):
            hooks.callback(layer.register_forward_pre_hook(add(prefix)).remove)
        return model(attention_mask=to_torch(attended)[0], **inputs).logits.numpy()[attended]


def random_checkpoint(folder, *, tied):
    """Returns a random checkpoint, texts, and torch's scores of them."""
    transformers = torch_models()
    sizes = {"vocab_size": NUM_WORDS, "max_position_embeddings": LENGTH + NUM_PROMPT + PAD + 1, "type_vocab_size": 1}
    # The epsilon is so large that others show.
    config = transformers.RobertaConfig(**RANDOM, **sizes, layer_norm_eps=1e-3, tie_word_embeddings=tied)
    model = save_random(transformers.RobertaForMaskedLM(config), folder)
    write_bpe(folder)
    ids, attended = padded_texts(NUM_TEXTS, LENGTH, NUM_WORDS - 1, first=BOS, last=EOS, pad=PAD, lowest=4)
    reference = torch_scores(model, attended, input_ids=ids)
    loaded = load_roberta(folder)
    return SimpleNamespace(folder=folder, loaded=loaded, model=model, ids=ids, attended=attended, reference=reference)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("roberta"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("roberta_untied"), tied=False)


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


def our_scores(checkpoint, *prompt, loaded=None):
    """Returns scores of the attended words `[n, V]`, also from another network than the checkpoint's."""
    loaded = loaded or checkpoint.loaded
    scores = answer(lm_scores, loaded, checkpoint.ids, checkpoint.attended, *prompt)
    is_prompt = np.ones((NUM_TEXTS, scores.shape[1] - LENGTH), bool)
    return scores[with_prompt(checkpoint.attended, is_prompt)]


def test_random_checkpoint_agrees_with_transformers(checkpoint):
    """Texts of several lengths in one batch: positions count words, not columns."""
    assert len({*checkpoint.attended.sum(1)}) == 4
    assert difference(our_scores(checkpoint), checkpoint.reference) <= PARITY


def test_an_untied_head_has_words_of_its_own(untied):
    read, stored = untied.loaded.params["lm_head"]["decoder"], untied.model.lm_head.decoder
    np.testing.assert_array_equal(read["kernel"].T, stored.weight.detach())
    np.testing.assert_array_equal(read["bias"], stored.bias.detach())


def prompted(checkpoint, prompt):
    """Returns what torch is asked where `prompt` `[B, P, E]` stands behind the first token: all of it explicit."""
    words = checkpoint.model.roberta.embeddings.word_embeddings.weight.detach().numpy()
    attended = with_prompt(checkpoint.attended, np.ones(prompt.shape[:2], bool))
    positions = np.where(attended, PAD + np.cumsum(attended, axis=1), PAD)
    return {
        "attended": attended,
        "inputs_embeds": with_prompt(words[checkpoint.ids], prompt),
        "position_ids": positions,
    }


def test_prompt_embeddings_stand_behind_the_first_token(checkpoint):
    prompt = normal(NUM_TEXTS, NUM_PROMPT, WIDTH)
    theirs = torch_scores(checkpoint.model, **prompted(checkpoint, prompt))
    assert difference(our_scores(checkpoint, prompt), theirs) <= PARITY


@pytest.mark.parametrize("per_text", [False, True], ids=["shared", "per-text"])
def test_deep_prefixes_join_the_prompt_before_each_layer(tied, per_text):
    prompt = normal(NUM_TEXTS, NUM_PROMPT, WIDTH)
    deep = normal(RANDOM["num_hidden_layers"], NUM_PROMPT, WIDTH, seed=1)
    theirs = torch_scores(tied.model, deep=deep, **prompted(tied, prompt))
    ours = our_scores(tied, prompt, np.stack([deep] * NUM_TEXTS) if per_text else deep)
    assert difference(ours, theirs) <= PARITY
    assert difference(our_scores(tied, prompt), theirs) > DETECTED  # the prefixes do something


def test_prefixes_of_a_text_are_its_own(tied):
    prompt = normal(NUM_TEXTS, NUM_PROMPT, WIDTH)
    deep = normal(NUM_TEXTS, RANDOM["num_hidden_layers"], NUM_PROMPT, WIDTH, seed=1)
    theirs = torch_scores(tied.model, deep=deep[2], **prompted(tied, prompt))
    of_text_2 = slice(*np.cumsum(tied.attended.sum(1) + NUM_PROMPT)[1:3])
    assert difference(our_scores(tied, prompt, deep)[of_text_2], theirs[of_text_2]) <= PARITY


def masked(checkpoint):
    """Returns the ids with a mask at another place in each text."""
    ids = checkpoint.ids.copy()
    ids[np.arange(NUM_TEXTS), 1 + np.arange(NUM_TEXTS) % 2] = MASK
    return ids


def test_prompt_words_score_label_words_as_the_model_does(checkpoint):
    """The classifier, asked with two prompts as token ids, against torch on texts that contain those tokens."""
    ids, words = masked(checkpoint), np.random.default_rng(0).integers(4, MASK, (2, NUM_PROMPT)).astype(np.int32)
    label_ids = [BPE_VOCABULARY.index("Ġgood"), BPE_VOCABULARY.index("Ġbad")]
    box = masked_lm_classifier(checkpoint.loaded, (" good", " bad"))
    query = Query(words[None], MaskedText(ids[None], checkpoint.attended[None]))
    ours = jax.jit(lambda box, query: box(query))(box, query).scores  # [1, K, B, N]
    assert ours.shape == (1, 2, NUM_TEXTS, 2)
    for k in range(2):
        longer = with_prompt(ids, np.tile(words[k], (NUM_TEXTS, 1)))
        attended = with_prompt(checkpoint.attended, np.ones((NUM_TEXTS, NUM_PROMPT), bool))
        theirs = torch_scores(checkpoint.model, attended, input_ids=longer)
        theirs = theirs[longer[attended] == MASK][:, label_ids]
        assert difference(ours[0, k], theirs) <= PARITY


def test_prompt_and_text_longer_than_the_positions_are_refused(tied):
    """A prompt of 4 fills them in the tests above: RoBERTa leaves its first two rows, of 15, unused."""
    longer = jnp.zeros((NUM_TEXTS, NUM_PROMPT + 1, WIDTH))
    with pytest.raises(ValueError, match=r"5 .*9 .*13 positions"):
        our_scores(tied, longer)


def test_wrong_activation_is_detected(tied, tmp_path):
    wrong = with_config(tied.folder, tmp_path / "wrong", hidden_act="quick_gelu")
    assert difference(our_scores(tied, loaded=load_roberta(wrong)), tied.reference) > DETECTED


def test_wrong_epsilon_is_detected(tied, tmp_path):
    wrong = with_config(tied.folder, tmp_path / "wrong", layer_norm_eps=1e-5)
    assert difference(our_scores(tied, loaded=load_roberta(wrong)), tied.reference) > DETECTED


def tanh_gelu(x):
    return jax.nn.gelu(x, approximate=True)


def test_tanh_in_place_of_erf_is_detected_in_the_layers(tied, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "gelu", tanh_gelu)
    assert difference(our_scores(tied, loaded=load_roberta(tied.folder)), tied.reference) > DETECTED


def test_tanh_in_place_of_erf_is_detected_in_the_head(tied, monkeypatch):
    monkeypatch.setattr(roberta, "gelu", tanh_gelu)
    assert difference(our_scores(tied), tied.reference) > DETECTED


def test_positions_without_their_offset_are_detected(tied):
    loaded = load_roberta(tied.folder)
    embeddings = loaded.params["roberta"]["embeddings"]["position_embeddings"]
    embeddings["embedding"] = jnp.roll(embeddings["embedding"], PAD + 1, axis=0)  # row 2, the first used, becomes row 0
    scores = answer(lm_scores, loaded, tied.ids, tied.attended)
    assert difference(scores[tied.attended], tied.reference) > DETECTED


def test_ignored_padding_is_detected(tied):
    everything = np.ones_like(tied.attended)
    scores = answer(lm_scores, tied.loaded, tied.ids, everything)
    assert difference(scores[tied.attended], tied.reference) > DETECTED


@pytest.mark.slow
def test_shape_of_roberta_large_agrees_with_transformers(tmp_path):
    """The size of the real model, random numbers."""
    transformers = torch_models()
    config = transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = save_random(transformers.RobertaForMaskedLM(config), tmp_path, noise=0.01)
    write_bpe(tmp_path)
    ids, attended = padded_texts(2, 24, 50264, first=BOS, last=EOS, pad=PAD, lowest=4)
    theirs = torch_scores(model, attended, input_ids=ids)
    del model
    ours = compiled(lm_scores, load_roberta(tmp_path), ids, attended)[attended]
    assert difference(ours, theirs) <= PARITY
