"""The command line on models of the published width, two layers deep and random, and on real photographs."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from transformers import CLIPConfig, ViTMAEConfig

from fedbbpt_jax import cli
from fedbbpt_jax.models.checkpoint import write_model
from fedbbpt_jax.models.clip import CLIP, CLIP_DIALECT
from fedbbpt_jax.models.vit_mae import VIT_DIALECT, ViTEncoder
from fedbbpt_jax.pretrained import MINI_CLIP

PHOTOGRAPHS = Path(os.environ.get("FEDBBPT_DATA", "")) / "image" / "clothing10"
SHALLOW = {"num_hidden_layers": 2}
PIXELS = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
PIXELS |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


def tokenizer_of_the_task() -> str:
    """A tokenizer that knows the words of the task; bos, eos and padding are those of the shipped one."""
    tokenizer = json.loads((MINI_CLIP / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    names = [c.name for c in (PHOTOGRAPHS / "test").iterdir()]
    for word in sorted({"a", "photo", "of", "-", ".", *"-".join(names).replace("-", " ").split()} - known.keys()):
        known[word] = len(known)
    return json.dumps(tokenizer)


def write_random(folder, network, config, dialect):
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.split(network(config, rngs=nnx.Rngs(0)))[1]))
    rng = np.random.default_rng(0)

    def draw(path, x):
        return (path[-1].key == "scale") + 0.04 * rng.standard_normal(x.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(draw, params)
    write_model(folder, params, config, dialect, "float16")
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    (folder / "tokenizer.json").write_text(tokenizer_of_the_task())
    shutil.copy(MINI_CLIP / "tokenizer_config.json", folder)


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="FEDBBPT_DATA names no folder with image/clothing10")
def test_published_coordinator_on_photographs(tmp_path):
    """One round of two clients: what is reported is what a hand counts."""
    write_random(
        tmp_path / "clip",
        CLIP,
        CLIPConfig(text_config={"eos_token_id": 30, **SHALLOW}, vision_config={"patch_size": 16, **SHALLOW}),
        CLIP_DIALECT,
    )
    write_random(tmp_path / "mae", ViTEncoder, ViTMAEConfig(**SHALLOW), VIT_DIALECT)
    folder = tmp_path / "run"
    arguments = f"run --data {PHOTOGRAPHS} --model {tmp_path / 'clip'} --encoder {tmp_path / 'mae'}"
    arguments += " --generator coordinator --optimizer sgd --num-clients 2 --num-rounds 1 --local-steps 1"
    arguments += " --shots 2 --batch-size 2 --num-directions 2 --test-limit 10 --chunk-size 4 --quiet"
    arguments += f" --output-dir {folder}"
    assert cli.main(arguments.split()) == 0

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["task"] == "clothing10"
    assert summary["num_evaluations"] == 2 * (2 * 2)  # clients, and both sides of two directions
    assert summary["num_requests"] == summary["num_valid"] == 2 * (2 * 2) * 2
    assert summary["uplink_bytes"] == summary["downlink_bytes"] == 2 * 39_680  # 9,920 floats per client
    assert summary["num_eval_requests"] == 2 * 10 + 2 * (2 * 10)  # test twice; validation, two per class, twice
    assert json.loads((folder / "config.json").read_text())["precision"] == "highest"
    stored = load_file(folder / "prompt.safetensors")
    assert sum(x.size for name, x in stored.items() if name.startswith("params.")) == 9_920
    assert stored["params.trigger"].shape == (1, 800)
    assert stored["prompt"].shape == (6, 224, 224, 3)
    assert np.abs(stored["prompt"]).max() > 0  # one step away from where it began
