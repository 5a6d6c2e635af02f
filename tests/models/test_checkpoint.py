"""Finding checkpoints, and reading and writing their tensors."""

import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from random_checkpoints import (
    RANDOM,
    edit_config,
    save_random,
    torch_models,
    write_bpe,
    write_clip_files,
    write_pixel_format,
)
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig

from fedbbpt_jax.errors import CheckpointError
from fedbbpt_jax.models.bert import BERT_DIALECT
from fedbbpt_jax.models.checkpoint import find_checkpoint, num_params, read_params, tensor_name, write_model
from fedbbpt_jax.models.clip import CLIP_DIALECT
from fedbbpt_jax.models.loading import load_clip, load_roberta, load_vit
from fedbbpt_jax.models.roberta import ROBERTA_DIALECT
from fedbbpt_jax.models.vit_mae import VIT_DIALECT
from fedbbpt_jax.pretrained import MINI_CLIP

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped checkpoint, to be spoilt."""
    return shutil.copytree(MINI_CLIP, tmp_path / "clip")


@pytest.fixture(scope="module")
def clip():
    return load_clip(MINI_CLIP)


@pytest.fixture(scope="module")
def read(clip):
    """Reads the weights of a folder that has the shipped configuration."""
    return lambda folder: read_params(folder, clip.params, CLIP_DIALECT)


def equal(params, others) -> bool:
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), params, others)
    return all(jax.tree.leaves(same))


def refusal(ask, *args) -> str:
    """Returns the message of the `CheckpointError`: one line, as the command line promises."""
    with pytest.raises(CheckpointError) as error:
        ask(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# Names and layouts


@pytest.mark.parametrize(
    ("dialect", "path", "name"),
    [
        (BERT_DIALECT, "encoder.layers.3.self_attn.q_proj.kernel", "encoder.layer.3.attention.self.query.weight"),
        (BERT_DIALECT, "encoder.layers.0.layer_norm1.scale", "encoder.layer.0.attention.output.LayerNorm.weight"),
        (BERT_DIALECT, "embeddings.layer_norm.bias", "embeddings.LayerNorm.bias"),
        (ROBERTA_DIALECT, "lm_head.transform.layer_norm.scale", "lm_head.layer_norm.weight"),
        (ROBERTA_DIALECT, "roberta.encoder.layers.1.mlp.fc2.bias", "roberta.encoder.layer.1.output.dense.bias"),
        (VIT_DIALECT, "encoder.layers.2.self_attn.out_proj.kernel", "encoder.layer.2.attention.output.dense.weight"),
        (VIT_DIALECT, "embeddings.patch_embedding.kernel", "embeddings.patch_embeddings.projection.weight"),
        (VIT_DIALECT, "embeddings.cls_token", "embeddings.cls_token"),
    ],
)
def test_names_of_the_dialects(dialect, path, name):
    """As in the published checkpoints."""
    assert tensor_name(tuple(path.split(".")), dialect) == name


def write(folder, params, dtype):
    write_model(folder, params, CLIPConfig.from_pretrained(MINI_CLIP), CLIP_DIALECT, dtype)


def test_names_and_layouts_are_those_of_the_file(clip, tmp_path):
    """What is read from the shipped file is written back as the same names, shapes and numbers."""
    write(tmp_path, clip.params, "float16")
    stored, written = load_file(MINI_CLIP / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert stored.keys() == written.keys()
    assert all(np.array_equal(stored[name], written[name]) for name in stored)
    assert stored["vision_model.embeddings.patch_embedding.weight"].shape == (128, 3, 8, 8)
    assert stored["text_model.encoder.layers.1.mlp.fc1.weight"].shape == (128, 64)


def test_what_is_written_is_read_back_bit_by_bit(clip, tmp_path):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), clip.params)
    write(tmp_path / "new", params, "float32")
    write_clip_files(tmp_path / "new")
    assert equal(load_clip(tmp_path / "new").params, params)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_every_stored_type_is_read_as_float32(clip, read, dtype, tmp_path):
    """The shipped float16 numbers are exact in the wider types, and within 2^-8 of themselves in bfloat16."""
    write(tmp_path, clip.params, dtype)
    stored_type = {str(tensor.dtype) for tensor in load_file(tmp_path / WEIGHTS).values()}
    assert stored_type == {dtype}
    params = read(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    rtol = 2**-8 if dtype == "bfloat16" else 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), params, clip.params)


@pytest.mark.parity
def test_transformers_reads_what_is_written(clip, tmp_path):
    transformers, torch = torch_models(), pytest.importorskip("torch")
    write(tmp_path, clip.params, "float32")
    model, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kernel = clip.params["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
    theirs = model.vision_model.embeddings.patch_embedding.weight.detach()
    assert theirs.dtype == torch.float32
    np.testing.assert_array_equal(theirs.permute(2, 3, 1, 0), kernel)


def test_num_params_is_that_of_the_card(clip):
    assert num_params(clip.params) == 611_777


# Tensors that do not fit


def test_every_problem_is_listed_at_once(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["logit_scale"], tensors["text_model.encoder.layers.0.mlp.fc1.bias"]
    tensors["text_model.encoder.layers.7.mlp.fc1.bias"] = np.zeros(3, np.float32)
    tensors["visual_projection.weight"] = np.zeros((96, 127), np.float32)
    save_file(tensors, folder / WEIGHTS)
    message = refusal(load_clip, folder)
    assert str(folder) in message
    assert "missing logit_scale" in message
    assert "missing text_model.encoder.layers.0.mlp.fc1.bias (128,)" in message
    assert "unexpected text_model.encoder.layers.7.mlp.fc1.bias" in message
    assert "visual_projection.weight has shape (127, 96), expected (128, 96)" in message
    assert message.count(";") == 3


def test_config_of_other_sizes_names_the_tensors(folder):
    edit_config(folder, "vision_config", patch_size=16)
    assert re.search(r"patch_embedding\.weight has shape .*position_embedding\.weight has", refusal(load_clip, folder))


def test_position_buffers_of_older_checkpoints_are_ignored(folder, clip, read):
    buffers = {f"{tower}_model.embeddings.position_ids": np.arange(3)[None] for tower in ("text", "vision")}
    save_file(load_file(folder / WEIGHTS) | buffers, folder / WEIGHTS)
    assert equal(read(folder), clip.params)


@pytest.mark.parity
def test_what_a_tied_head_repeats_is_ignored(tmp_path):
    """Older RoBERTa files hold the word embeddings twice, a pooler and the positions."""
    transformers = torch_models()
    config = transformers.RobertaConfig(**RANDOM, vocab_size=39, max_position_embeddings=20, type_vocab_size=1)
    save_random(transformers.RobertaForMaskedLM(config), tmp_path)
    write_bpe(tmp_path)
    before = load_roberta(tmp_path).params
    older = {
        "lm_head.decoder.weight": np.zeros((39, 24), np.float32),
        "lm_head.decoder.bias": np.zeros(39, np.float32),
        "roberta.pooler.dense.weight": np.zeros((24, 24), np.float32),
        "roberta.pooler.dense.bias": np.zeros(24, np.float32),
        "roberta.embeddings.position_ids": np.arange(20)[None],
    }
    save_file(load_file(tmp_path / WEIGHTS) | older, tmp_path / WEIGHTS)
    assert equal(load_roberta(tmp_path).params, before)


# Files that cannot be read


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"garbage" * 1000,
        lambda content: content[:100],
        lambda content: content[:-1000],
    ],
    ids=["empty", "corrupt", "cut-in-the-header", "cut-in-the-data"],
)
def test_unreadable_weights(folder, spoil, read):
    file = folder / WEIGHTS
    file.write_bytes(spoil(file.read_bytes()))
    assert refusal(read, folder).startswith(f"cannot read {file}: ")


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["pytorch_model-00001-of-00001.bin", "training_args.bin"]])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder, names, read):
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    message = refusal(read, folder)
    assert all(name in message for name in [str(folder), WEIGHTS, *names])
    assert re.search(r'python -c ".*from_pretrained\(.*\.save_pretrained\(', message)


@pytest.mark.parametrize("architectures", [["M; import os"], ["M as M; print('x') #"], [], [3], None])
def test_the_conversion_command_holds_no_code_of_the_checkpoint(read, folder, architectures):
    """Whoever does not trust a pickled file should not be handed words of its author to run."""
    edit_config(folder, architectures=architectures)
    (folder / WEIGHTS).unlink()
    command = re.search(r'python -c "(.*)"', refusal(read, folder))[1]
    assert re.fullmatch(r"from transformers import \w+ as M; M\.from_pretrained\(.*\)\.save_pretrained\(.*\)", command)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("network", "load", "write_files"),
    [("CLIPModel", load_clip, write_clip_files), ("RobertaForMaskedLM", load_roberta, write_bpe),
     ("ViTModel", load_vit, write_pixel_format)],
)  # fmt: skip
def test_the_conversion_command_converts(network, load, write_files, tmp_path):
    """As it is printed, run on a pickled model, it makes a folder that loads, for each kind of network."""
    transformers, torch = torch_models(), pytest.importorskip("torch")
    small = {"vocab_size": 39, "max_position_embeddings": 20, "type_vocab_size": 1}
    config = {
        "CLIPModel": lambda: transformers.CLIPConfig.from_pretrained(MINI_CLIP),
        "RobertaForMaskedLM": lambda: transformers.RobertaConfig(**RANDOM, **small),
        "ViTModel": lambda: transformers.ViTConfig(**RANDOM, image_size=16, patch_size=8),
    }[network]()
    save_random(getattr(transformers, network)(config), tmp_path)
    write_files(tmp_path)
    before = load(tmp_path).params
    stored = {name: torch.from_numpy(tensor) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    (tmp_path / WEIGHTS).unlink()
    torch.save(stored, tmp_path / "pytorch_model.bin")  # under the names of files, which are not those of the modules
    command = re.search(r'python -c "(.*)"', refusal(load, tmp_path))[1]
    exec(command.replace("SOURCE", str(tmp_path)).replace("FOLDER", str(tmp_path)), {})
    assert equal(load(tmp_path).params, before)


# Shards


def split(folder, num_shards=3):
    """Splits the weights in `folder` into shards with an index, and returns its content."""
    tensors = load_file(folder / WEIGHTS)
    files = {
        name: f"model-{1 + i % num_shards:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_read_together(folder, clip, read):
    split(folder)
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert equal(read(folder), clip.params)


@pytest.mark.parity
def test_shards_of_transformers_are_read(tmp_path):
    transformers = torch_models()
    config = transformers.ViTConfig(**RANDOM, image_size=16, patch_size=8)
    model = transformers.ViTModel(config)
    for name, options in {"whole": {}, "shards": {"max_shard_size": "8KB"}}.items():
        torch_models()  # seeds the noise alike
        save_random(model, tmp_path / name, noise=0.0, **options)
        write_pixel_format(tmp_path / name)
    assert (tmp_path / "shards" / INDEX).is_file()
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert equal(load_vit(tmp_path / "shards").params, load_vit(tmp_path / "whole").params)


def test_a_whole_file_goes_before_shards(folder, clip, read):
    (folder / INDEX).write_text("no index")
    assert equal(read(folder), clip.params)


def test_missing_shards_are_named(folder, read):
    split(folder)
    lost = ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    for name in lost:
        (folder / name).unlink()
    message = refusal(read, folder)
    assert all(name in message for name in [str(folder), INDEX, *lost])
    assert "model-00002" not in message


def test_an_unreadable_shard_is_named(folder, read):
    split(folder)
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert refusal(read, folder).startswith(f"cannot read {file}: ")


def test_a_tensor_of_no_shard_is_missing(folder, read):
    split(folder)
    file = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[:2]
    save_file({name: tensors[name] for name in tensors if name not in lost}, file)
    message = refusal(read, folder)
    assert all(f"missing {name}" in message for name in lost)
    assert message.count("missing") == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}', '{"weight_map": {"a": 1}}', "\udcff"],
)
def test_a_corrupt_index(folder, content, read):
    split(folder)
    (folder / INDEX).write_bytes(content.encode(errors="surrogateescape"))
    assert refusal(read, folder).startswith(f"cannot read {folder / INDEX}: ")


# Folders and ids


def test_a_folder_is_its_own_checkpoint(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_checkpoint(folder) == find_checkpoint(str(folder)) == find_checkpoint("~/clip") == folder


@pytest.mark.parametrize("source", ["./nothing", "../nothing", "/nothing", "~/nothing", "a/b/c", "a//b", "a/", "a b"])
def test_what_is_neither_a_folder_nor_an_id(source):
    """Known without asking the hub: it would name another problem."""
    assert refusal(find_checkpoint, source) == f"{source} is no folder; expected a checkpoint's folder or a hub id"


def test_a_file_is_no_folder(folder):
    assert "is no folder" in refusal(find_checkpoint, folder / WEIGHTS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill(cache, source, *, commit, refs):
    """Lays out the shipped model in the cache as the hub's client does, and returns its folder."""
    repository = cache / f"models--{source.replace('/', '--')}"
    snapshot = shutil.copytree(MINI_CLIP, repository / "snapshots" / commit)
    for ref in refs:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot


@pytest.mark.parametrize("source", ["somebody/model", "model"])
def test_an_unknown_id_offline(cache, source):
    message = refusal(load_clip, source)
    assert repr(source) in message
    assert str(cache) in message
    assert "HF_HUB_OFFLINE" in message
    assert "pass the folder" in message


@pytest.mark.parametrize("source", ["somebody/model-1.5_b", "model"])
def test_an_id_in_the_cache(cache, source, clip):
    snapshot = fill(cache, source, commit=COMMIT, refs=["main"])
    assert find_checkpoint(source) == snapshot
    assert equal(load_clip(source).params, clip.params)


@pytest.mark.parametrize("revision", ["v2", "refs/pr/7", COMMIT[::-1]], ids=["tag", "pull-request", "commit"])
def test_a_revision_in_the_cache(cache, revision):
    main = fill(cache, "somebody/model", commit=COMMIT, refs=["main"])
    other = fill(cache, "somebody/model", commit=COMMIT[::-1], refs=["v2", "refs/pr/7"])
    assert find_checkpoint("somebody/model", revision) == other
    assert find_checkpoint("somebody/model") == main


def test_a_revision_that_is_not_in_the_cache(cache):
    fill(cache, "somebody/model", commit=COMMIT, refs=["main"])
    assert "somebody/model" in refusal(find_checkpoint, "somebody/model", "v3")


def test_a_checkpoint_in_the_cache_that_lacks_a_file(cache):
    (fill(cache, "somebody/model", commit=COMMIT, refs=["main"]) / "config.json").unlink()
    assert "holds no config.json" in refusal(load_clip, "somebody/model")


@pytest.mark.parametrize("source", ["-model", "a..b", "a--b", "x" * 97])
def test_an_id_that_the_hub_does_not_allow(cache, source):
    assert repr(source) in refusal(find_checkpoint, source)


# Connections


@pytest.fixture
def hub(cache, monkeypatch):
    """The hub's own client, whose connection answers as a test says: `hub.handler` takes a request."""
    httpx = pytest.importorskip("httpx2", reason="the hub's client of this version connects otherwise")
    answers = SimpleNamespace(handler=None, httpx=httpx)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY",
        lambda: httpx.Client(transport=httpx.MockTransport(lambda request: answers.handler(request))),
    )
    huggingface_hub.close_session()
    yield answers
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    "name", ["ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "ProxyError"]
)
def test_no_connection(hub, cache, name):
    def fail(request):
        raise getattr(hub.httpx, name)("the wire is cut", request=request)

    hub.handler = fail
    message = refusal(load_clip, "somebody/model")
    assert "the wire is cut" in message
    assert str(cache) in message
    assert "pass the folder" in message


def test_without_a_connection_the_cache_answers(hub, cache):
    def fail(request):
        raise hub.httpx.ConnectError("the wire is cut", request=request)

    hub.handler = fail
    snapshot = fill(cache, "somebody/model", commit=COMMIT, refs=["main"])
    assert find_checkpoint("somebody/model") == snapshot


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, "RepoNotFound", "Repository Not Found"),
        (404, "RevisionNotFound", "Revision Not Found"),
        (403, "GatedRepo", "Cannot access gated repo"),
        (503, "", "503"),
    ],
    ids=["unknown", "unknown-revision", "gated", "out-of-order"],
)
def test_the_hub_refuses(hub, status, code, reason):
    """The message says why: who must accept a licence first does not look for a spelling mistake."""
    hub.handler = lambda request: hub.httpx.Response(status, headers={"X-Error-Code": code}, request=request)
    message = refusal(find_checkpoint, "somebody/model")
    assert "'somebody/model'" in message
    assert reason in message


def test_an_error_without_words(cache, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError

    monkeypatch.setattr("fedbbpt_jax.models.checkpoint.snapshot_download", fail)
    assert "'somebody/model'" in refusal(find_checkpoint, "somebody/model")
