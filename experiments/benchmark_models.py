"""Loading and compiling at full shape: ViT-B/16 CLIP and RoBERTa-large from random checkpoints.

    python experiments/benchmark_models.py

Prints, as the median of three fresh processes: the time to load relative to reading the same file into memory, the peak
of resident memory above that of the empty process relative to the weights, and the seconds from a loaded model to the
first answer of its frozen box, compilation included.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import CLIPConfig, RobertaConfig

from fedbbpt_jax.black_box.frozen import frozen, query_only
from fedbbpt_jax.models.checkpoint import read_config, read_model, write_model
from fedbbpt_jax.models.classifiers import ImageClassifier, MaskedText, VerbalizedClassifier
from fedbbpt_jax.models.clip import CLIP, CLIP_DIALECT
from fedbbpt_jax.models.loading import PixelFormat
from fedbbpt_jax.models.roberta import ROBERTA_DIALECT, RobertaForMaskedLM
from fedbbpt_jax.types import Query

NETWORKS = {
    "CLIP ViT-B/16": (CLIP, CLIPConfig(vision_config={"patch_size": 16}), CLIP_DIALECT),
    "RoBERTa-large": (
        RobertaForMaskedLM,
        RobertaConfig(
            vocab_size=50265,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
        ROBERTA_DIALECT,
    ),
}
NUM_PROCESSES = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        for name, (network, config, dialect) in NETWORKS.items():
            folder = Path(work) / name.replace("/", "-")
            _, state = nnx.split(network(config, rngs=nnx.Rngs(0)))
            write_model(folder, nnx.to_pure_dict(state), config, dialect, "float32")
            size = (folder / "model.safetensors").stat().st_size
            runs = [measured(name, folder) for _ in range(NUM_PROCESSES)]
            load, memory, first = (statistics.median(column) for column in zip(*runs, strict=True))
            print(
                f"{name}: {size / 1e6:,.0f} MB, loaded in {load:.2f} x the time to read the file, peak memory "
                f"{memory:.2f} x the weights, first answer after {first:.1f} s",
                flush=True,
            )


def measured(name: str, folder: Path) -> list[float]:
    """Returns the three figures of one fresh process."""
    command = [sys.executable, __file__, name, str(folder)]
    return [float(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def measure(name: str, folder: Path) -> None:
    network, config, dialect = NETWORKS[name]
    file = folder / "model.safetensors"
    jnp.zeros(1).block_until_ready()
    before = peak_bytes()
    started = time.perf_counter()
    config = read_config(folder, {config.model_type: type(config)})
    graphdef, params = read_model(folder, network, config, dialect)
    jax.block_until_ready(params)
    load_seconds = time.perf_counter() - started
    memory = (peak_bytes() - before) / file.stat().st_size
    started = time.perf_counter()
    file.read_bytes()
    read_seconds = time.perf_counter() - started
    model = nnx.merge(graphdef, params)
    started = time.perf_counter()
    jax.block_until_ready(first_answer(model))
    print(load_seconds / read_seconds, memory, time.perf_counter() - started)


def first_answer(model: CLIP | RobertaForMaskedLM):
    """Returns the frozen box's answer to one prompt on two inputs."""
    if isinstance(model, CLIP):
        pixels = PixelFormat(224, np.zeros(3, np.float32), np.ones(3, np.float32))
        classifier = ImageClassifier(model, jnp.ones((10, 512)), pixels)
        query = Query(jnp.zeros((1, 1, 224, 224, 3)), jnp.zeros((1, 2, 224, 224, 3)))
    else:
        classifier = VerbalizedClassifier(model, np.array([372, 6587]), mask_token_id=50264)
        ids = jnp.full((1, 2, 64), 7).at[:, :, 60].set(50264)
        query = Query(jnp.zeros((1, 1, 10, 1024)), MaskedText(ids, jnp.ones((1, 2, 64), bool)))
    box = query_only(frozen(classifier))
    return jax.jit(lambda box, query: box(query))(box, query)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else measure(sys.argv[1], Path(sys.argv[2]))
