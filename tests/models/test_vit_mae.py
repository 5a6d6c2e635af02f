"""Vision transformers as extractors of features against `transformers` on torch."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from random_checkpoints import (
    DETECTED,
    PARITY,
    RANDOM,
    answer,
    channels_first,
    difference,
    save_random,
    to_torch,
    torch_models,
    with_config,
    write_pixel_format,
)
from safetensors.numpy import load_file

from fedbbpt_jax.models.layers import ACTIVATIONS
from fedbbpt_jax.models.loading import load_vit
from fedbbpt_jax.models.vit_mae import ViTEncoder

pytestmark = pytest.mark.parity

PATCH, IMAGE = 8, 16
IMAGES = np.random.default_rng(0).normal(size=(5, IMAGE, IMAGE, 3)).astype(np.float32)
# A decoder of another width than the encoder: none of its tensors could be taken for one of the encoder's.
DECODER = {"decoder_hidden_size": 12, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
NETWORKS = {
    "mae": ("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0}),
    "mae-with-decoder": ("ViTMAEForPreTraining", "ViTMAEConfig", {"mask_ratio": 0.75, **DECODER}),
    "mae-without-qkv-bias": ("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0, "qkv_bias": False}),
    "vit": ("ViTModel", "ViTConfig", {}),
    "vit-without-qkv-bias": ("ViTModel", "ViTConfig", {"qkv_bias": False}),
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", {"num_labels": 3}),
    "vit-masked": ("ViTForMaskedImageModeling", "ViTConfig", {"encoder_stride": PATCH}),
}


def random_checkpoint(folder, network):
    """Returns a random checkpoint and torch's states of the images `[B, T, E]`, nothing masked or shuffled."""
    transformers, torch = torch_models(), pytest.importorskip("torch")
    model_class, config_class, options = NETWORKS[network]
    # The epsilon is so large that others show.
    sizes = RANDOM | {"image_size": IMAGE, "patch_size": PATCH, "layer_norm_eps": 1e-2}
    config = getattr(transformers, config_class)(**sizes, **options)
    model = save_random(getattr(transformers, model_class)(config), folder)
    write_pixel_format(folder)
    encoder = getattr(model, "vit", model)
    num_patches = (IMAGE // PATCH) ** 2
    in_order = torch.arange(num_patches, dtype=torch.float32).repeat(len(IMAGES), 1)
    encoder.config.mask_ratio = 0.0
    with torch.no_grad():
        options = {"noise": in_order} if config_class == "ViTMAEConfig" else {}
        states = encoder(*to_torch(channels_first(IMAGES)), **options).last_hidden_state.numpy()
    return SimpleNamespace(folder=folder, states=states)


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("mae"), "mae")


def our_states(folder):
    return answer(ViTEncoder.__call__, load_vit(folder), IMAGES)


@pytest.mark.parametrize("network", NETWORKS)
def test_random_checkpoint_agrees_with_transformers(network, tmp_path):
    checkpoint = random_checkpoint(tmp_path, network)
    assert checkpoint.states.shape == (5, 5, RANDOM["hidden_size"])
    assert difference(our_states(tmp_path), checkpoint.states) <= PARITY


def test_tensors_beside_the_encoder_are_there_and_ignored(tmp_path):
    random_checkpoint(tmp_path, "mae-with-decoder")
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"vit", "decoder"}
    assert set(load_vit(tmp_path).params) == {"embeddings", "encoder", "layernorm"}


def test_features_are_the_states_of_the_class_token(mae):
    features = answer(ViTEncoder.features, load_vit(mae.folder), IMAGES)
    assert features.dtype == np.float32
    assert difference(features, mae.states[:, 0]) <= PARITY


def test_pixel_format_is_that_of_the_files(mae):
    pixels = load_vit(mae.folder).pixels
    assert pixels.size == IMAGE
    assert pixels.mean.tolist() == [0.5] * 3
    assert pixels.std.tolist() == [np.float32(0.3)] * 3


@pytest.mark.parametrize("change", [{"hidden_act": "quick_gelu"}, {"layer_norm_eps": 1e-5}], ids="-".join)
def test_wrong_activation_or_epsilon_is_detected(mae, change, tmp_path):
    assert difference(our_states(with_config(mae.folder, tmp_path / "wrong", **change)), mae.states) > DETECTED


def test_tanh_in_place_of_erf_is_detected(mae, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
    assert difference(our_states(mae.folder), mae.states) > DETECTED
