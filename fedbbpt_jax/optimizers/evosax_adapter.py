"""Distribution-based algorithms of evosax as optimizers. evosax itself is not imported: its user is."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fedbbpt_jax.estimators.spsa import estimate_info, if_answered, masked_mean
from fedbbpt_jax.types import EstimateInfo, Optimizer, Params, PyTree


class Strategy(Protocol):
    """What is used of an algorithm of evosax 0.3 whose state has a flat `mean`."""

    population_size: int

    @property
    def default_params(self) -> Any:
        """Hyperparameters."""
        ...

    def init(self, key: Array, mean: Params, params: Any, /) -> Any:
        """Returns the state around a mean."""
        ...

    def ask(self, key: Array, state: Any, params: Any, /) -> tuple[Params, Any]:
        """Returns candidates `[K, ...]` and the state."""
        ...

    def tell(self, key: Array, population: Params, fitness: Array, state: Any, params: Any, /) -> tuple[Any, Any]:
        """Returns the state and metrics."""
        ...

    def get_mean(self, state: Any, /) -> Params:
        """Returns the mean."""
        ...


class EvosaxState(NamedTuple):
    """The mean, which federations may change, and the algorithm's state with everything else."""

    params: Params
    inner: PyTree


def from_evosax(strategy: Strategy, hyperparameters: Any = None, *, seed: int = 0) -> Optimizer:
    """Returns an algorithm of evosax as an optimizer whose solution is the mean of its distribution.

    evosax draws a population at once, so each candidate is a row of a whole population: asking for K costs the drawing
    of K² candidates. That is nothing beside a language model, unless drawing decomposes a matrix; evosax's CMA-ES does
    (`optimizers/cma_es.py` does not).

    Differs from the rest of the project where answers fail: evosax ranks populations of fixed size, so that a failed
    candidate is told the worst loss of the others. Where all fail, nothing changes but counters.

    Args:
      strategy: such as `evosax.algorithms.Open_ES(population_size=16, solution=params)`; its solution has the structure
        of the parameters.
      hyperparameters: of the strategy; its defaults if left out.
      seed: of the strategy's initial state, the same for all clients.

    Raises:
      ValueError: the strategy keeps a population, not a mean.

    Example:
      >>> class Walk:  # evosax has better ones
      ...     population_size, default_params = 4, None
      >>> from_evosax(Walk())
      Traceback (most recent call last):
      ...
      ValueError: expected a distribution-based algorithm of evosax, which has get_mean, got Walk
    """
    if not hasattr(strategy, "get_mean"):
        raise ValueError(
            f"expected a distribution-based algorithm of evosax, which has get_mean, got {type(strategy).__name__}"
        )
    chosen = strategy.default_params if hyperparameters is None else hyperparameters

    def init(params: Params) -> EvosaxState:
        inner = strategy.init(jax.random.key(seed), params, chosen)
        return EvosaxState(params, jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), inner))

    def population(key: Array, state: EvosaxState) -> tuple[Params, Any]:
        around = state.inner.replace(mean=ravel_pytree(state.params)[0])
        return strategy.ask(jax.random.fold_in(key, 0), around, chosen)

    def ask(key: Array, state: EvosaxState, k: Array) -> Params:
        return jax.tree.map(lambda x: x[k], population(key, state)[0])

    def tell(key: Array, state: EvosaxState, losses: Array, valid: Array) -> tuple[EvosaxState, EstimateInfo]:
        means = masked_mean(losses, valid, axis=1)
        answered = valid.any(axis=1) & jnp.isfinite(means)
        worst = jnp.where(answered, means, -jnp.inf).max()
        fitness = jnp.where(answered, means, jnp.where(answered.any(), worst, 0.0))
        candidates, asked = population(key, state)
        inner, _ = strategy.tell(jax.random.fold_in(key, 1), candidates, fitness, asked, chosen)
        told = EvosaxState(strategy.get_mean(inner), jax.tree.map(_as_before, inner, state.inner))
        move = jax.tree.map(jnp.subtract, told.params, state.params)
        return if_answered(answered.any(), told, state), estimate_info(move, answered, losses, valid)

    return Optimizer(init, ask, tell, lambda state: state.params, strategy.population_size)


def _as_before(new: Array, old: Array) -> Array:
    """Returns the new number in the old one's type: evosax's counters and bests are Python's at first."""
    return jnp.asarray(new, old.dtype)
