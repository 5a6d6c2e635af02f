"""Loading the four kinds of networks with what turns text and pixels into their inputs."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from random_checkpoints import (
    RANDOM,
    edit_config,
    random_network,
    write_bpe,
    write_clip_files,
    write_pixel_format,
    write_wordpiece,
)
from safetensors.numpy import load_file
from transformers import BertConfig, RobertaConfig, ViTConfig, ViTMAEConfig

from fedbbpt_jax.black_box.frozen import clip_classifier
from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.errors import CheckpointError
from fedbbpt_jax.models.bert import BERT_DIALECT, BertEncoder
from fedbbpt_jax.models.checkpoint import write_model
from fedbbpt_jax.models.loading import load_bert, load_clip, load_roberta, load_vit, tokenize
from fedbbpt_jax.models.roberta import ROBERTA_DIALECT, ROBERTA_UNTIED_DIALECT, RobertaForMaskedLM
from fedbbpt_jax.models.vit_mae import VIT_DIALECT, ViTEncoder
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.prompts.pixels import full_overlay
from fedbbpt_jax.training.evaluate import compile_evaluation

WORDS = {"vocab_size": 39, "max_position_embeddings": 20, "type_vocab_size": 1}
PIXELS = {"image_size": 16, "patch_size": 8}


def refusal(load, folder) -> str:
    """Returns the message of the `CheckpointError`: one line, as the command line promises."""
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def written(folder, network, config, dialect, write_files):
    """Returns a folder with random weights, and the parameters."""
    _, params = random_network(network, config)
    write_model(folder, params, config, dialect, "float32")
    write_files(folder)
    return params


@pytest.fixture(scope="module")
def written_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    written(folder, BertEncoder, BertConfig(**RANDOM, **WORDS), BERT_DIALECT, write_wordpiece)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped checkpoint, to be spoilt."""
    return shutil.copytree(MINI_CLIP, tmp_path / "clip")


@pytest.fixture(scope="module")
def clip():
    return load_clip(MINI_CLIP)


@pytest.mark.parametrize(
    ("load", "network", "config", "dialect", "write_files"),
    [
        (load_bert, BertEncoder, BertConfig(**RANDOM, **WORDS), BERT_DIALECT, write_wordpiece),
        (load_roberta, RobertaForMaskedLM, RobertaConfig(**RANDOM, **WORDS), ROBERTA_DIALECT, write_bpe),
        (
            load_roberta,
            RobertaForMaskedLM,
            RobertaConfig(**RANDOM, **WORDS, tie_word_embeddings=False),
            ROBERTA_UNTIED_DIALECT,
            write_bpe,
        ),
        (load_vit, ViTEncoder, ViTConfig(**RANDOM, **PIXELS), VIT_DIALECT, write_pixel_format),
        (load_vit, ViTEncoder, ViTConfig(**RANDOM, **PIXELS, qkv_bias=False), VIT_DIALECT, write_pixel_format),
        (load_vit, ViTEncoder, ViTMAEConfig(**RANDOM, **PIXELS), VIT_DIALECT, write_pixel_format),
    ],
    ids=["bert", "roberta", "roberta-untied", "vit", "vit-without-qkv-bias", "vit-mae"],
)
def test_what_is_written_is_loaded(load, network, config, dialect, write_files, tmp_path):
    params = written(tmp_path, network, config, dialect, write_files)
    loaded = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert isinstance(nnx.merge(loaded.graphdef, loaded.params), network)


# Tokenisers


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A RoBERTa tokeniser of two files, vocabulary and merges."""
    folder = tmp_path_factory.mktemp("bpe")
    config = RobertaConfig(**RANDOM, **WORDS)
    written(folder, RobertaForMaskedLM, config, ROBERTA_DIALECT, write_bpe)
    assert not (folder / "tokenizer.json").exists()
    return load_roberta(folder).tokenizer


def test_a_vocabulary_with_merges_makes_a_tokenizer(bpe):
    ids, attended = tokenize(bpe, ["a good<mask>", "bad"])
    assert bpe.convert_ids_to_tokens(ids[0]) == ["<s>", "a", "Ġgood", "<mask>", "</s>"]
    assert bpe.convert_ids_to_tokens(ids[1])[:4] == ["<s>", "b", "ad", "</s>"]
    assert attended.sum(1).tolist() == [5, 4]


def test_a_word_list_makes_a_tokenizer(written_bert):
    tokenizer = load_bert(written_bert).tokenizer
    ids, _ = tokenize(tokenizer, ["A good film##s zzz"])
    assert tokenizer.convert_ids_to_tokens(ids[0])[:4] == ["[CLS]", "a", "good", "film"]


@pytest.mark.parametrize("lost", [["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"]], ids="+".join)
def test_half_a_tokenizer_is_refused(lost, tmp_path):
    written(tmp_path, RobertaForMaskedLM, RobertaConfig(**RANDOM, **WORDS), ROBERTA_DIALECT, write_bpe)
    for name in lost:
        (tmp_path / name).unlink()
    assert refusal(load_roberta, tmp_path).startswith(f"{tmp_path} holds no tokenizer.json, vocab.json with merges.txt")


def test_tokens_are_int32_and_the_mask_hides_padding(clip):
    ids, attended = tokenize(clip.tokenizer, ["the digit seven", "a digit"])
    assert ids.dtype == np.int32
    assert attended.dtype == bool
    assert attended.sum(1).tolist() == [5, 4]  # words, and the marks of begin and end
    assert (ids[~attended] == 0).all()


def test_long_texts_lose_their_end_where_a_length_is_given(bpe):
    whole, _ = tokenize(bpe, ["good good good good"])
    cut, attended = tokenize(bpe, ["good good good good", "a"], max_length=4)
    assert cut.shape == attended.shape == (2, 4)
    np.testing.assert_array_equal(cut[0], [*whole[0, :3], whole[0, -1]])  # the mark of the end stays


@pytest.fixture
def real_vocabulary():
    """Copies a real vocabulary into a folder."""
    data = os.environ.get("FEDBBPT_DATA", "")
    if not (Path(data) / "tokenizers" / "roberta").is_dir():
        pytest.skip("FEDBBPT_DATA names no folder with the real vocabularies")

    def copy(kind, *names):
        return lambda folder: [
            shutil.copyfile(Path(data) / "tokenizers" / kind / name, folder / name) for name in names
        ]

    return copy


def test_real_vocabulary_of_roberta(real_vocabulary, tmp_path):
    config = RobertaConfig(**RANDOM, **WORDS | {"vocab_size": 50265})
    files = real_vocabulary("roberta", "vocab.json", "merges.txt")
    written(tmp_path, RobertaForMaskedLM, config, ROBERTA_DIALECT, files)
    ids, _ = tokenize(load_roberta(tmp_path).tokenizer, ["A great film. It was<mask>."])
    assert ids[0].tolist() == [0, 250, 372, 822, 4, 85, 21, 50264, 4, 2]  # as published


def test_real_vocabulary_of_bert(real_vocabulary, tmp_path):
    config = BertConfig(**RANDOM, **WORDS | {"vocab_size": 30522})
    written(tmp_path, BertEncoder, config, BERT_DIALECT, real_vocabulary("bert", "vocab.txt"))
    ids, _ = tokenize(load_bert(tmp_path).tokenizer, ["A great film. It was [MASK]."])
    assert ids[0].tolist() == [101, 1037, 2307, 2143, 1012, 2009, 2001, 103, 1012, 102]  # as published


def test_the_mask_of_roberta_takes_the_space_before_it(bpe):
    """As in the published tokenizer.json: "good <mask>" has no token for the space, with which it was never trained."""
    ids, _ = tokenize(bpe, ["a good <mask>"])
    assert bpe.convert_ids_to_tokens(ids[0]) == ["<s>", "a", "Ġgood", "<mask>", "</s>"]


def test_a_masked_language_model_needs_a_mask(tmp_path):
    """The shipped tokenizer has none; a token that is added for it would have no embedding."""
    written(tmp_path, RobertaForMaskedLM, RobertaConfig(**RANDOM, **WORDS), ROBERTA_DIALECT, write_clip_files)
    assert "mask" in refusal(load_roberta, tmp_path)


# Folders that lack something or hold something else


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
    message = refusal(load_clip, folder)
    assert str(folder) in message
    assert f"holds no {names[0]}" in message


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (load_clip, "expected 'clip'"),
        (load_roberta, "expected 'roberta'"),
        (load_vit, "expected 'vit_mae' or 'vit'"),
    ],
    ids=["clip", "roberta", "vit"],
)
def test_another_kind_of_network(written_bert, load, expected):
    assert refusal(load, written_bert) == f"{written_bert} holds a 'bert' model; {expected}"


@pytest.mark.parametrize("model_type", ["bert", "siglip", "clip_text_model", None, ["clip"]])
def test_config_of_another_model(folder, model_type):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 32}))
    message = refusal(load_clip, folder)
    assert str(folder) in message
    assert f"holds a {model_type!r} model; expected 'clip'" in message or "cannot read the configuration" in message


@pytest.mark.parametrize("content", ["{", "[]", "\0", "3"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_unreadable_configuration(folder, name, content):
    (folder / name).write_text(content)
    assert refusal(load_clip, folder).startswith(f"cannot read the configuration in {folder}")


@pytest.mark.parametrize(
    ("part", "name", "value", "named"),
    [
        ("vision_config", "hidden_act", "relu", "'relu'; known: quick_gelu, gelu"),
        ("text_config", "num_attention_heads", 5, "attention heads"),
        ("vision_config", "hidden_size", "wide", "hidden_size"),
        ("vision_config", "patch_size", 0, "zero"),
    ],
    ids=["activation", "heads", "type", "zero"],
)
def test_config_that_cannot_be_built(folder, part, name, value, named):
    edit_config(folder, part, **{name: value})
    assert named in refusal(load_clip, folder)


@pytest.mark.parametrize(
    "values",
    [
        {"image_mean": None},
        {"image_mean": [0.5]},
        {"image_std": [0.3, 0.3]},
        {"image_std": [0.3, 0.0, 0.3]},
        {"image_mean": "grey"},
    ],
    ids=["none", "one", "two", "zero", "word"],
)
def test_pixel_format_that_cannot_be_used(folder, values):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    assert str(folder) in refusal(load_clip, folder)


def test_pixel_format_without_a_mean(folder):
    file = folder / "preprocessor_config.json"
    stored = json.loads(file.read_text())
    del stored["image_mean"]
    file.write_text(json.dumps(stored))
    assert "image_mean" in refusal(load_clip, folder)


# Pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(32, 32), (50, 40), (20, 70)], ids="{0[0]}x{0[1]}".format)
def test_transform_makes_pictures_the_size_of_the_network(clip, mode, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).convert(mode)
    pixels = clip.transform(picture)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8


def test_transform_leaves_a_picture_of_the_right_size_alone(clip):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(clip.transform(Image.fromarray(pixels)), pixels)


# The shipped model


def test_mini_clip_is_small_and_stored_in_float16():
    assert sum(file.stat().st_size for file in MINI_CLIP.iterdir()) <= 4_000_000
    assert {tensor.dtype for tensor in load_file(MINI_CLIP / "model.safetensors").values()} == {np.dtype(np.float16)}


def test_mini_clip_normalises_as_its_preprocessor_says(clip):
    assert clip.pixels.size == 32
    assert (clip.pixels.mean == np.float32(0.5)).all()
    assert (clip.pixels.std == np.float32(0.3)).all()


def test_mini_clip_reads_clean_digits_without_training(clip):
    """Validation scans of the clean task entered no gradient of its pre-training."""
    task, generator = load_task("clean"), full_overlay(32)
    evaluate = compile_evaluation(generator, cross_entropy)
    no_prompt = jax.tree.map(lambda x: x[None], generator.init(jax.random.key(0)))
    result = evaluate(clip_classifier(clip, task.class_names, task.templates), no_prompt, task.validation)
    assert float(result.accuracy) >= 0.96
