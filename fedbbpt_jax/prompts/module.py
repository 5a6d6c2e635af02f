"""Flax modules as prompt generators: split once into structure and a plain pytree of parameters."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
from jax import Array

from fedbbpt_jax.types import Params, PromptGenerator, PyTree


def from_module(build: Callable[[nnx.Rngs], nnx.Module]) -> PromptGenerator:
    """Returns the generator whose parameters are the `nnx.Param`s of `build(rngs)` and whose call is the module's.

    Args:
      build: makes a module that maps features `[B, F]` to a prompt, `[...]` or `[B, ...]`. It may hold no state beside
        its parameters.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)

    def init(key: Array) -> Params:
        _, params = nnx.split(build(nnx.Rngs(key)), nnx.Param)
        return nnx.to_pure_dict(params)

    def generate(params: Params, features: Array) -> PyTree:
        return nnx.merge(graphdef, params)(features)  # type: ignore[operator]

    return PromptGenerator(init, generate)
