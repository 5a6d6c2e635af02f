"""Shared pieces: a tiny linear black box, so that tests of the method need no model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version

os.environ["FEDBBPT_CACHE"] = f"{tempfile.gettempdir()}/fedbbpt-tests-{os.getpid()}"  # not the user's
# Processes of the tests share what they compile, and so do runs of the tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/fedbbpt-tests-compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no test may look further than loopback
# Programs that run once are not worth compiling well, unless XLA_FLAGS says otherwise; eight devices on any machine.
# Later versions of jaxlib no longer know the second flag, and abort on it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.types import Examples, PromptGenerator, Query, Response


def linear_box(query: Query) -> Response:
    """Scores of vectors: the input plus the prompt, through a fixed curve, so that losses are smooth and not linear."""
    moved = query.inputs[:, None] + query.prompt[:, :, None]  # [C, K, B, N]
    scores = moved + 0.3 * jnp.sin(moved)
    return Response(scores, jnp.isfinite(scores).all(-1))


def vector_generator(size: int) -> PromptGenerator:
    """A prompt that is its own parameters."""
    return PromptGenerator(lambda key: {"shift": jnp.zeros(size)}, lambda params, features: params["shift"])


@pytest.fixture(scope="session", autouse=True)
def _empty_cache() -> Iterator[None]:
    """Removes what the tests measured."""
    yield
    shutil.rmtree(os.environ["FEDBBPT_CACHE"], ignore_errors=True)


@pytest.fixture
def vectors() -> Examples:
    """60 vectors of 4 numbers in 4 classes, whose largest number rarely names the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int32) % 4
    inputs = rng.normal(0, 1, (60, 4)).astype(np.float32) + np.float32([3, 0, -2, 1]) + np.eye(4, dtype="f")[labels] * 2
    return Examples(inputs, np.zeros((60, 0), np.float32), labels)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(7)
