"""CLIP against itself, and against `transformers.CLIPModel` on torch where torch is installed.

Differences are measured relative to the largest reference score. The two frameworks sum in another order: 5e-5 is some
hundred roundings of float32, and a wrong activation or a wrong pooling rule is off by more than 1e-3.
"""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import CLIPConfig

from fedbbpt_jax.black_box.frozen import clip_classifier
from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.models.clip import tokenize
from fedbbpt_jax.models.loading import load_clip
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.types import Query

PARITY, DETECTED = 5e-5, 1e-3
OTHER_ACTIVATION = {"quick_gelu": "gelu", "gelu": "quick_gelu"}
OTHER_EOS = {2: 5, 5: 2}  # 2 is the historical rule, the largest id of the text; 5 is a token of its own
FILES_BESIDE_THE_WEIGHTS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def encode(clip, images, ids, attended):
    """Returns features of normalised images `[B, H, W, 3]` and of texts, and their scores `[images, texts]`."""
    model = nnx.merge(clip.graphdef, clip.params)
    features = model.encode_image(images), model.encode_text(ids, attended)
    return *features, model.scores(*features)


def scores(folder, inputs):
    return encode(load_clip(folder), *inputs)[-1]


def torch_scores(model, images, ids, attended) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        answer = model(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(attended).long(),
            pixel_values=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        )
    return answer.logits_per_image.numpy()


def relative_difference(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


@pytest.fixture(scope="module")
def mini():
    """The shipped model on 64 test images and the ten class texts."""
    clip, task = load_clip(MINI_CLIP), load_task("clean")
    pixels = task.test.inputs[:64]
    inputs = (pixels - clip.mean) / clip.std, *tokenize(clip.tokenizer, list(task.class_texts))
    image_features, text_features, ours = encode(clip, *inputs)
    classifier = clip_classifier(clip, task.class_texts)
    answer = jax.jit(lambda box, query: box(query))(classifier, Query(jnp.zeros((1, 1, 32, 32, 3)), pixels[None]))
    return SimpleNamespace(
        clip=clip, inputs=inputs, images=image_features, texts=text_features, scores=ours, answer=answer
    )


def test_features_are_unit_vectors_and_scores_their_scaled_cosine(mini):
    for features in (mini.images, mini.texts):
        np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-6)  # float32
    scale = np.exp(float(mini.clip.params["logit_scale"]))
    assert relative_difference(mini.scores, scale * np.asarray(mini.images) @ np.asarray(mini.texts).T) <= PARITY


def test_classifier_answers_with_the_scores_of_the_model(mini):
    assert mini.answer.scores.shape == (1, 1, 64, 10)
    assert relative_difference(mini.answer.scores[0, 0], mini.scores) <= PARITY
    assert mini.answer.valid.all()


def test_tokens_are_int32_and_the_mask_hides_padding(mini):
    ids, attended = tokenize(mini.clip.tokenizer, ["the digit seven", "a digit"])
    assert ids.dtype == np.int32
    assert attended.dtype == bool
    assert attended.sum(1).tolist() == [5, 4]  # words, and the marks of begin and end
    assert (ids[~attended] == 0).all()


def test_padding_does_not_change_a_text(mini):
    images, ids, attended = mini.inputs
    ids, attended = (np.pad(x, ((0, 0), (0, 4))) for x in (ids, attended))
    _, padded, _ = encode(mini.clip, images, ids, attended)
    np.testing.assert_allclose(padded, mini.texts, atol=1e-5)  # float32, on unit vectors


def test_mini_clip_agrees_with_transformers(mini):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    reference, report = transformers.CLIPModel.from_pretrained(
        MINI_CLIP, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = torch_scores(reference.eval(), *mini.inputs)
    assert theirs.shape == (64, 10)
    assert relative_difference(mini.scores, theirs) <= PARITY
    assert relative_difference(mini.answer.scores[0, 0], theirs) <= PARITY


@pytest.fixture(
    scope="module",
    params=[(activation, eos) for activation in OTHER_ACTIVATION for eos in OTHER_EOS],
    ids="{0[0]}-eos-{0[1]}".format,
)
def checkpoint(request, tmp_path_factory):
    """A random checkpoint in which every part matters, with inputs and the reference's scores of them."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    activation, eos = request.param
    common = {"hidden_act": activation, "initializer_range": 0.4, "num_hidden_layers": 2}
    text = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "layer_norm_eps": 1e-3}
    text |= {"vocab_size": 31, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 1}
    vision = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "layer_norm_eps": 1e-2}
    vision |= {"image_size": 24, "patch_size": 8}
    config = CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=20)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large weights take activations out of their linear part; biases and norms leave their neutral values.
            parameter += 0.3 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("random_clip")
    model.save_pretrained(folder)
    for name in FILES_BESIDE_THE_WEIGHTS:
        shutil.copy(MINI_CLIP / name, folder)
    inputs = random_inputs()
    reference = torch_scores(model, *inputs)
    return SimpleNamespace(folder=folder, activation=activation, eos=eos, inputs=inputs, scores=reference)


def random_inputs():
    """Images `[7, 24, 24, 3]` and texts `[6, 9]`, padded behind and, in the last two, before.

    Each text ends in its only token 5; all its other ids are larger, so the two rules pool at different places.
    """
    rng = np.random.default_rng(0)
    start, stop = np.array([0, 0, 0, 0, 2, 3])[:, None], np.array([9, 8, 6, 4, 7, 9])[:, None]
    attended = (np.arange(9) >= start) & (np.arange(9) < stop)
    ids = np.where(np.arange(9) == stop - 1, 5, rng.integers(6, 31, (6, 9)))
    ids = np.where(attended, ids, 1).astype(np.int32)
    return rng.normal(size=(7, 24, 24, 3)).astype(np.float32), ids, attended


def with_config(checkpoint, folder, towers, **changes):
    """Returns a copy of the checkpoint whose configuration of some towers says something else."""
    shutil.copytree(checkpoint.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for tower in towers:
        config[tower] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_random_checkpoint_agrees_with_transformers(checkpoint):
    assert relative_difference(scores(checkpoint.folder, checkpoint.inputs), checkpoint.scores) <= PARITY


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_wrong_activation_is_detected(checkpoint, tower, tmp_path):
    wrong = with_config(checkpoint, tmp_path / "wrong", [tower], hidden_act=OTHER_ACTIVATION[checkpoint.activation])
    assert relative_difference(scores(wrong, checkpoint.inputs), checkpoint.scores) > DETECTED


def test_wrong_end_of_text_rule_is_detected(checkpoint, tmp_path):
    wrong = with_config(checkpoint, tmp_path / "wrong", ["text_config"], eos_token_id=OTHER_EOS[checkpoint.eos])
    assert relative_difference(scores(wrong, checkpoint.inputs), checkpoint.scores) > DETECTED


def test_ignored_padding_is_detected(checkpoint):
    images, ids, attended = checkpoint.inputs
    unmasked = scores(checkpoint.folder, (images, ids, np.ones_like(attended)))
    assert relative_difference(unmasked, checkpoint.scores) > DETECTED
