import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedbbpt_jax.black_box.frozen import clip_classifier
from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.errors import CheckpointError
from fedbbpt_jax.models.loading import load_clip, num_params, read_params, stored_tensors
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.prompts.pixels import full_overlay
from fedbbpt_jax.training.evaluate import compile_evaluation

WEIGHTS = MINI_CLIP / "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped checkpoint, to be spoilt."""
    return shutil.copytree(MINI_CLIP, tmp_path / "clip")


@pytest.fixture(scope="module")
def clip():
    return load_clip(MINI_CLIP)


def edit_config(folder, part=None, **changes):
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_stored_tensors_are_read_back_bit_by_bit(clip, tmp_path):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), clip.params)
    save_file(stored_tensors(params, "float32"), tmp_path / "model.safetensors")
    read = read_params(tmp_path / "model.safetensors", clip.params)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, read)))


def test_names_and_layouts_are_those_of_the_file(clip):
    """What is read from the shipped file is written back as the same names, shapes and numbers."""
    stored, written = load_file(WEIGHTS), stored_tensors(clip.params, "float16")
    assert stored.keys() == written.keys()
    assert all(np.array_equal(stored[name], written[name]) for name in stored)
    assert stored["vision_model.embeddings.patch_embedding.weight"].shape == (128, 3, 8, 8)
    assert stored["text_model.encoder.layers.1.mlp.fc1.weight"].shape == (128, 64)


def test_params_are_float32(clip):
    assert {leaf.dtype for leaf in jax.tree.leaves(clip.params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_other_stored_types_are_read(clip, dtype, tmp_path):
    """The shipped float16 numbers are exact in the wider types, and within 2^-8 of themselves in bfloat16."""
    save_file(stored_tensors(clip.params, dtype), tmp_path / "model.safetensors")
    read = read_params(tmp_path / "model.safetensors", clip.params)
    rtol = 2**-8 if dtype == "bfloat16" else 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), read, clip.params)


def test_every_problem_is_listed_at_once(folder):
    tensors = load_file(WEIGHTS)
    del tensors["logit_scale"], tensors["text_model.encoder.layers.0.mlp.fc1.bias"]
    tensors["text_model.encoder.layers.7.mlp.fc1.bias"] = np.zeros(3, np.float32)
    tensors["visual_projection.weight"] = np.zeros((96, 127), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_clip(folder)
    message = str(error.value)
    assert str(folder / "model.safetensors") in message
    assert "missing logit_scale" in message
    assert "missing text_model.encoder.layers.0.mlp.fc1.bias (128,)" in message
    assert "unexpected text_model.encoder.layers.7.mlp.fc1.bias" in message
    assert "visual_projection.weight has shape (127, 96), expected (128, 96)" in message
    assert message.count(";") == 3


def test_position_buffers_of_older_checkpoints_are_ignored(folder, clip):
    buffers = {f"{tower}_model.embeddings.position_ids": np.arange(3)[None] for tower in ("text", "vision")}
    save_file(load_file(WEIGHTS) | buffers, folder / "model.safetensors")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), load_clip(folder).params, clip.params)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage" * 1000, WEIGHTS.read_bytes()[:100], WEIGHTS.read_bytes()[:-1000]],
    ids=["empty", "corrupt", "cut-in-the-header", "cut-in-the-data"],
)
def test_unreadable_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: "):
        load_clip(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["config.json"],
        ["model.safetensors"],
        ["preprocessor_config.json"],
        ["tokenizer.json"],
        ["tokenizer.json", "tokenizer_config.json"],
    ],
    ids="+".join,
)
def test_missing_file(folder, names):
    for name in names:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=str(folder)) as error:
        load_clip(folder)
    assert "\n" not in str(error.value)  # the command line promises one line


@pytest.mark.parametrize("name", ["nothing", "model.safetensors"])
def test_missing_folder(name):
    with pytest.raises(CheckpointError, match=rf"{name} holds no config\.json; expected a CLIP checkpoint"):
        load_clip(MINI_CLIP / name)


@pytest.mark.parametrize("model_type", ["bert", "siglip", "clip_text_model"])
def test_config_of_another_model(folder, model_type):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 32}))
    with pytest.raises(CheckpointError, match=f"holds a '{model_type}' model; expected 'clip'"):
        load_clip(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_unreadable_configuration(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"cannot read the configuration in {folder}"):
        load_clip(folder)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("vision_config", "hidden_act", "relu"),
        ("text_config", "num_attention_heads", 5),
        ("vision_config", "hidden_size", "wide"),
    ],
    ids=["activation", "heads", "type"],
)
def test_config_that_cannot_be_built(folder, part, name, value):
    edit_config(folder, part, **{name: value})
    with pytest.raises(CheckpointError, match=f"{name}|{value}|attention heads") as error:
        load_clip(folder)
    assert "\n" not in str(error.value)  # the command line promises one line


def test_config_of_other_sizes_names_the_tensors(folder):
    edit_config(folder, "vision_config", patch_size=16)
    with pytest.raises(CheckpointError, match=r"patch_embedding\.weight has shape .*position_embedding\.weight has"):
        load_clip(folder)


def test_mini_clip_is_small_and_stored_in_float16(clip):
    assert sum(file.stat().st_size for file in MINI_CLIP.iterdir()) <= 4_000_000
    assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {np.dtype(np.float16)}
    assert num_params(clip.params) == 611_777  # as its card says


def test_mini_clip_normalises_as_its_preprocessor_says(clip):
    assert clip.image_size == 32
    assert (clip.mean == np.float32(0.5)).all()
    assert (clip.std == np.float32(0.3)).all()


def test_mini_clip_reads_clean_digits_without_training(clip):
    """Validation scans of the clean task entered no gradient of its pre-training."""
    task, generator = load_task("clean"), full_overlay(32)
    evaluate = compile_evaluation(generator, cross_entropy)
    no_prompt = jax.tree.map(lambda x: x[None], generator.init(jax.random.key(0)))
    result = evaluate(clip_classifier(clip, task.class_texts), no_prompt, task.validation)
    assert float(result.accuracy) >= 0.96
