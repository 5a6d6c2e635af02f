"""How many candidates are in flight at once: timed once for each frozen model and device, and remembered.

Too few leave an accelerator idle; too many leave the cache of a CPU, or fill the memory. What is measured is the number
of prompted examples in flight, since a batch of another size then needs no measurement of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fedbbpt_jax.federated.round import response_losses
from fedbbpt_jax.types import BlackBox, Examples, Method, Query

SHIPPED = {("mini-clip", "cpu"): 64}
"""By model and backend: the fastest of `SIZES` where the project was measured."""
DEFAULT = 64
"""Where nothing can be remembered: all runs of a sweep, and all processes, must agree."""
SIZES = tuple(4**i for i in range(1, 7))
LONG = 0.5
"""Seconds of a chunk, from which on larger ones are not tried: nothing that waits for them is worth the measurement."""


def choose_chunk_size(model: str, box: BlackBox, method: Method, examples: Examples, batch_size: int) -> int:
    """Returns how many candidates, of `batch_size` examples each, to have in flight at once.

    That of a shipped model is known. Otherwise it is looked up in `chunk_sizes.json` in the cache folder; where it is
    not there yet, prompted examples are timed (the losses are thrown away) and the best size is written there. The
    cache folder is `FEDBBPT_CACHE`, or `fedbbpt_jax` in the user's cache. With several processes the first decides.

    Args:
      model: as an experiment names it.
      box: the frozen model.
      method: whose prompts and losses are timed.
      examples: any of the task's.
      batch_size: B.
    """
    size = SHIPPED.get((model, jax.default_backend())) or _remembered(box, method, examples)
    if jax.process_count() > 1:
        size = int(multihost_utils.broadcast_one_to_all(np.int32(size)))
    return max(1, size // batch_size)


def measure_examples_in_flight(box: BlackBox, method: Method, examples: Examples) -> int:
    """Returns the size of `SIZES` up to which each gives at least 5 % more answers per second than the one before.

    What follows a size that takes `LONG` is not tried.
    """
    best, most = SIZES[0], 0.0
    for size in SIZES:
        try:
            seconds = seconds_of_answers(box, method, examples, size)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                break
            raise
        if size / seconds < 1.05 * most:
            break
        best, most = size, size / seconds
        if seconds > LONG:
            break
    return best


def seconds_of_answers(box: BlackBox, method: Method, examples: Examples, size: int) -> float:
    """Returns the least seconds, of three turns unless one takes `LONG`, of the losses of `size` examples.

    Args:
      box: in this process.
      method: whose prompts and losses are timed.
      examples: any; they are repeated.
      size: examples in flight at once.
    """
    batch = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[np.arange(size) % len(x)]), examples)

    @jax.jit
    def losses(box: BlackBox, batch: Examples):
        prompt = method.generator.generate(method.generator.init(jax.random.key(0)), batch.features)
        prompt, inputs, labels = jax.tree.map(lambda x: x[None], (prompt, batch.inputs, batch.labels))
        return response_losses(method, box(Query(jax.tree.map(lambda x: x[None], prompt), inputs)), labels)

    jax.block_until_ready(losses(box, batch))
    least = math.inf
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(losses(box, batch))
        least = min(least, time.perf_counter() - started)
        if least > LONG:
            break
    return least


def cache_file() -> Path:
    """Returns where sizes are remembered."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FEDBBPT_CACHE") or user / "fedbbpt_jax") / "chunk_sizes.json"


def _remembered(box: BlackBox, method: Method, examples: Examples) -> int:
    file, name = cache_file(), _signature(box, examples)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = _read(file)
        if name not in known:
            known[name] = measure_examples_in_flight(box, method, examples)
            draft = file.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(known, indent=2))
            draft.replace(file)
    except OSError:
        return DEFAULT
    return known[name]


def _read(file: Path) -> dict[str, int]:
    """Returns what is remembered; nothing, if the file is not there or was damaged."""
    try:
        known = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    sound = isinstance(known, dict) and all(type(size) is int and size in SIZES for size in known.values())
    return known if sound else {}


def _signature(box: BlackBox, examples: Examples) -> str:
    """Returns a name for what the speed depends on: the device, and the shapes of weights and inputs."""
    weights = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(box)]
    inputs = [(x.shape[1:], str(x.dtype)) for x in jax.tree.leaves(examples)]
    shapes = hashlib.sha256(repr((weights, inputs)).encode()).hexdigest()[:16]
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {shapes}"
