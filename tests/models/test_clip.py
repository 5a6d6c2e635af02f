"""CLIP against itself, and against `transformers.CLIPModel` on torch where torch is installed."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import (
    DETECTED,
    PARITY,
    RANDOM,
    answer,
    channels_first,
    compiled,
    difference,
    save_random,
    to_torch,
    torch_models,
    with_config,
    write_clip_files,
)

from fedbbpt_jax.black_box.frozen import clip_classifier
from fedbbpt_jax.models.clip import CLIP
from fedbbpt_jax.models.layers import ACTIVATIONS
from fedbbpt_jax.models.loading import load_clip, tokenize
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.types import Query

pytestmark = pytest.mark.parity

OTHER_EOS = {2: 5, 5: 2}  # 2 is the historical rule, the largest id of the text; 5 is a token of its own
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONTEXT = np.array([7, 6, 8, 6], np.int32)  # words that stand before each text where it is prompted


def features(model, images, ids, attended):
    """Returns unit features of normalised images `[B, H, W, 3]` and of texts, and their scores `[images, texts]`."""
    image_features, text_features = model.encode_image(images), model.encode_text(ids, attended)
    return image_features, text_features, model.scores(image_features, text_features)


def scores(clip, inputs):
    return answer(features, clip, *inputs)[-1]


def torch_features(model, images, ids, attended):
    """Returns the same as `features`."""
    torch = pytest.importorskip("torch")
    ids, attended, pixels = to_torch(ids, attended, channels_first(images))
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=attended, pixel_values=pixels)
    return output.image_embeds.numpy(), output.text_embeds.numpy(), output.logits_per_image.numpy()


@pytest.fixture(scope="module")
def mini():
    """The shipped model on random images and the ten class texts."""
    clip = load_clip(MINI_CLIP)
    pixels = np.random.default_rng(0).random((16, 32, 32, 3)).astype(np.float32)
    texts = tokenize(clip.tokenizer, [f"the digit {word}" for word in WORDS])
    inputs = (pixels - clip.pixels.mean) / clip.pixels.std, *texts
    image_features, text_features, ours = compiled(features, clip, *inputs)
    classifier = clip_classifier(clip, WORDS, ("the digit {}",))
    response = jax.jit(lambda box, query: box(query))(classifier, Query(jnp.zeros((1, 1, 32, 32, 3)), pixels[None]))
    return SimpleNamespace(
        clip=clip, inputs=inputs, images=image_features, texts=text_features, scores=ours, response=response
    )


def test_features_are_unit_vectors_and_scores_their_scaled_cosine(mini):
    for vectors in (mini.images, mini.texts):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)  # float32
    scale = np.exp(float(mini.clip.params["logit_scale"]))
    assert difference(mini.scores, scale * mini.images @ mini.texts.T) <= PARITY


def test_classifier_answers_with_the_scores_of_the_model(mini):
    assert mini.response.scores.shape == (1, 1, 16, 10)
    assert difference(mini.response.scores[0, 0], mini.scores) <= PARITY
    assert mini.response.valid.all()


def test_padding_does_not_change_a_text(mini):
    padded = (np.pad(x, ((0, 0), (0, 4))) for x in mini.inputs[1:])
    assert difference(compiled(CLIP.encode_text, mini.clip, *padded), mini.texts) <= 1e-5  # float32, on unit vectors


def test_mini_clip_agrees_with_transformers(mini):
    transformers, torch = torch_models(), pytest.importorskip("torch")
    reference, report = transformers.CLIPModel.from_pretrained(
        MINI_CLIP, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = torch_features(reference.eval(), *mini.inputs)[-1]
    assert difference(mini.scores, theirs) <= PARITY
    assert difference(mini.response.scores[0, 0], theirs) <= PARITY


@pytest.fixture(
    scope="module",
    params=[(14, "quick_gelu", 2), (16, "gelu", 2), (32, "quick_gelu", 5)],
    ids="patch{0[0]}-{0[1]}-eos{0[2]}".format,
)
def checkpoint(request, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("clip"), *request.param)


def random_checkpoint(folder, patch, activation, eos):
    """Returns a random checkpoint, inputs for it, and what torch makes of them."""
    transformers = torch_models()
    # The epsilons are so large that others show.
    text = {"hidden_act": activation, "layer_norm_eps": 1e-3, "vocab_size": 31, "max_position_embeddings": 13}
    text |= {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 1}
    vision = {"hidden_act": activation, "layer_norm_eps": 1e-2, "image_size": 2 * patch, "patch_size": patch}
    config = transformers.CLIPConfig(text_config=RANDOM | text, vision_config=RANDOM | vision, projection_dim=20)
    model = save_random(transformers.CLIPModel(config), folder)
    write_clip_files(folder)
    inputs = random_inputs(2 * patch)
    reference = torch_features(model, *inputs)
    return SimpleNamespace(
        folder=folder, loaded=load_clip(folder), eos=eos, model=model, inputs=inputs, reference=reference
    )


def random_inputs(image_size):
    """Images `[5, H, W, 3]` and texts `[6, 9]`, padded behind and, in the last two, before.

    Each text ends in its only token 5; all its other ids are larger, and one is the largest of all, so that the two
    rules pool at different places, and words inserted for a prompt are never the largest.
    """
    rng = np.random.default_rng(0)
    start, stop = np.array([0, 0, 0, 0, 2, 3])[:, None], np.array([9, 8, 6, 4, 7, 9])[:, None]
    attended = (np.arange(9) >= start) & (np.arange(9) < stop)
    ids = np.where(np.arange(9) == stop - 1, 5, rng.integers(9, 30, (6, 9)))
    ids = np.where(np.arange(9) == stop - 2, 30, ids)
    ids = np.where(attended, ids, 1).astype(np.int32)
    return rng.normal(size=(5, image_size, image_size, 3)).astype(np.float32), ids, attended


def test_random_checkpoint_agrees_with_transformers(checkpoint):
    ours = answer(features, checkpoint.loaded, *checkpoint.inputs)
    assert max(difference(a, b) for a, b in zip(ours, checkpoint.reference, strict=True)) <= PARITY


@pytest.mark.parametrize("per_text", [False, True], ids=["shared", "per-text"])
def test_context_acts_as_words_behind_the_first_token(checkpoint, per_text):
    images, ids, attended = checkpoint.inputs
    words = np.stack([np.roll(CONTEXT, i) for i in range(len(ids))]) if per_text else np.tile(CONTEXT, (len(ids), 1))
    longer = np.concatenate([ids[:, :1], words, ids[:, 1:]], axis=1)
    longer_attended = np.insert(attended, [1] * len(CONTEXT), True, axis=1)
    _, theirs, _ = torch_features(checkpoint.model, images, longer, longer_attended)
    embedded = checkpoint.loaded.params["text_model"]["embeddings"]["token_embedding"]["embedding"][words]
    ours = answer(CLIP.encode_text, checkpoint.loaded, ids, attended, embedded if per_text else embedded[0])
    assert difference(ours, theirs) <= PARITY
    assert difference(ours, checkpoint.reference[1]) > DETECTED  # the words do something


def test_an_empty_context_is_none(checkpoint):
    _, ids, attended = checkpoint.inputs
    empty = jnp.zeros((0, 24))
    ours = answer(CLIP.encode_text, checkpoint.loaded, ids, attended, empty)
    assert difference(ours, checkpoint.reference[1]) <= PARITY


def test_context_and_text_longer_than_the_positions_are_refused(checkpoint):
    """Four words of context fill the 13 positions in the test above."""
    _, ids, attended = checkpoint.inputs
    with pytest.raises(ValueError, match=r"14 tokens.* 13 positions"):
        answer(CLIP.encode_text, checkpoint.loaded, ids, attended, jnp.zeros((5, 24)))


@pytest.fixture(scope="module")
def with_erf(tmp_path_factory):
    """One checkpoint is enough for what must be noticed: its activation is the exact GELU, its end of text a token."""
    return random_checkpoint(tmp_path_factory.mktemp("clip"), 16, "gelu", 5)


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
@pytest.mark.parametrize("change", [{"hidden_act": "quick_gelu"}, {"layer_norm_eps": 1e-5}], ids="-".join)
def test_wrong_activation_or_epsilon_is_detected(with_erf, tower, change, tmp_path):
    wrong = with_config(with_erf.folder, tmp_path / "wrong", tower, **change)
    assert difference(scores(load_clip(wrong), with_erf.inputs), with_erf.reference[-1]) > DETECTED


def test_tanh_in_place_of_erf_is_detected(with_erf, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
    assert difference(scores(load_clip(with_erf.folder), with_erf.inputs), with_erf.reference[-1]) > DETECTED


def test_ignored_padding_is_detected(with_erf):
    images, ids, attended = with_erf.inputs
    unmasked = scores(with_erf.loaded, (images, ids, np.ones_like(attended)))
    assert difference(unmasked, with_erf.reference[-1]) > DETECTED


def test_wrong_end_of_text_rule_is_detected(checkpoint, tmp_path):
    """Both ways."""
    wrong = with_config(checkpoint.folder, tmp_path / "wrong", "text_config", eos_token_id=OTHER_EOS[checkpoint.eos])
    assert difference(scores(load_clip(wrong), checkpoint.inputs), checkpoint.reference[-1]) > DETECTED


@pytest.mark.slow
def test_shape_of_vit_b_16_agrees_with_transformers(tmp_path):
    """The size of the real model, random numbers."""
    transformers = torch_models()
    config = transformers.CLIPConfig(vision_config={"patch_size": 16}, text_config={"eos_token_id": 49407})
    model = save_random(transformers.CLIPModel(config), tmp_path, noise=0.01)
    write_clip_files(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 49406, (3, 16))
    attended = np.arange(16) < np.array([16, 12, 7])[:, None]
    ids = np.where(np.arange(16) == attended.sum(1, keepdims=True) - 1, 49407, ids).astype(np.int32)
    inputs = rng.normal(size=(2, 224, 224, 3)).astype(np.float32), ids, attended
    ours, theirs = compiled(features, load_clip(tmp_path), *inputs), torch_features(model, *inputs)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) <= PARITY
