"""One layer after another: a search of a small space each, the prompts of the other layers standing still."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.types import EstimateInfo, Optimizer, Params, PyTree


class LayersState(NamedTuple):
    """The searches of L layers, and whose turn it is.

    Attributes:
      params: of all layers, `[L, ...]`; what a server averages.
      layers: the state of each layer's optimizer, `[L, ...]`; its own parameters are those above.
      turn: int32, 0 to L - 1.
    """

    params: Params
    layers: PyTree
    turn: Array


def layer_by_layer(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer of parameters `[L, ...]` that takes one step of `optimizer` in one layer, then the next.

    L searches of d parameters cost as many requests as one of L·d, and of their losses each learns more. Layers take
    turns from the first to the last and round again.

    Source: Sun et al., 2022, "BBTv2: Towards a Gradient-Free Future with Large Language Models", algorithm 1.

    Args:
      optimizer: of the parameters of one layer; its state has a field `params`.

    Example:
      >>> from fedbbpt_jax.optimizers.cma_es import cma_es
      >>> optimizer = layer_by_layer(cma_es(4, initial_step_size=1.0))
      >>> state = optimizer.init(jnp.zeros((3, 2)))
      >>> (optimizer.ask(jax.random.key(0), state, jnp.asarray(1)) != 0).any(axis=1)
      Array([ True, False, False], dtype=bool)
    """

    def own(state: LayersState) -> PyTree:
        params, layer = jax.tree.map(lambda x: x[state.turn], (state.params, state.layers))
        return layer._replace(params=params)

    def init(params: Params) -> LayersState:
        return LayersState(params, jax.vmap(optimizer.init)(params), jnp.asarray(0, jnp.int32))

    def ask(key: Array, state: LayersState, k: Array) -> Params:
        return put(state.params, optimizer.ask(key, own(state), k), state.turn)

    def tell(key: Array, state: LayersState, losses: Array, valid: Array) -> tuple[LayersState, EstimateInfo]:
        told, info = optimizer.tell(key, own(state), losses, valid)
        params = put(state.params, optimizer.solution(told), state.turn)
        num_layers = len(jax.tree.leaves(params)[0])
        return LayersState(params, put(state.layers, told, state.turn), (state.turn + 1) % num_layers), info

    def put(layers: PyTree, layer: PyTree, turn: Array) -> PyTree:
        return jax.tree.map(lambda x, y: x.at[turn].set(y), layers, layer)

    return Optimizer(init, ask, tell, lambda state: state.params, optimizer.num_candidates)
