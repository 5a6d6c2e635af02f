"""Twenty sampled prompts as one batch, against one forward for each, as BDPL's code makes them.

    python experiments/benchmark_words.py

A random RoBERTa of 4 layers of width 128, 16 texts of 20 to 60 tokens, 20 prompts of 6 words; the median of five turns,
relative to the first line. BDPL pads its texts to 450 tokens and takes each sample's words through the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import RobertaConfig

from fedbbpt_jax.black_box.frozen import frozen
from fedbbpt_jax.models.classifiers import MaskedText, VerbalizedClassifier
from fedbbpt_jax.models.roberta import RobertaForMaskedLM
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.types import Query

NUM_TEXTS, NUM_SAMPLES, PROMPT, MASK, LONGEST, PADDED = 16, 20, 6, 4, 64, 444


def main() -> None:
    config = RobertaConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512
    )
    model: Any = RobertaForMaskedLM(config, rngs=nnx.Rngs(0))
    box = frozen(VerbalizedClassifier(model, np.array([7, 8]), MASK))
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, 1000, (NUM_SAMPLES, PROMPT)).astype(np.int32)
    lengths = rng.integers(20, 61, NUM_TEXTS)
    labels = jnp.asarray(rng.integers(0, 2, NUM_TEXTS))

    @jax.jit
    def losses(box: Any, prompts: jax.Array, texts: MaskedText) -> jax.Array:
        scores = box(Query(prompts[None], jax.tree.map(lambda x: x[None], texts))).scores[0]
        return cross_entropy(scores, jnp.broadcast_to(labels, scores.shape[:2])).mean(1)

    def serial(texts: MaskedText) -> list[float]:
        return [float(losses(box, jnp.asarray(prompt)[None], texts)[0]) for prompt in prompts]

    short, padded = (texts_of(rng, lengths, width) for width in (LONGEST, PADDED))
    ways = {
        "one batch of 20 prompts, texts padded to the longest": lambda: losses(box, jnp.asarray(prompts), short),
        "one forward for each prompt, padded to the longest": lambda: serial(short),
        "one batch of 20 prompts, texts padded to 450 with the prompt": lambda: losses(
            box, jnp.asarray(prompts), padded
        ),
        "one forward for each prompt, padded to 450 (BDPL's way)": lambda: serial(padded),
    }
    print_ratios(ways)


def texts_of(rng: np.random.Generator, lengths: np.ndarray, width: int) -> MaskedText:
    """Returns random texts with the mask behind their first token, padded to a width."""
    attended = np.arange(width) < lengths[:, None]
    ids = np.where(attended, rng.integers(5, 1000, attended.shape), 1)
    ids[:, 0], ids[:, 1] = 0, MASK
    return MaskedText(jnp.asarray(ids, jnp.int32), jnp.asarray(attended))


def print_ratios(ways: dict[str, Callable[[], object]]) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        jax.block_until_ready(way())  # compiles
    for _ in range(5):
        for name, way in ways.items():
            started = time.perf_counter()
            jax.block_until_ready(way())
            seconds[name].append(time.perf_counter() - started)
    first = np.median(next(iter(seconds.values())))
    for name, turns in seconds.items():
        print(f"{name:62} {np.median(turns) / first:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
