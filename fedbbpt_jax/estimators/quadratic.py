"""A landscape with a known gradient: clients with quadratic losses around different centres."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedbbpt_jax.estimators.variance import Landscape

Answer = Callable[[Array, Array], Array]


def quadratic_landscape(
    d: int,
    *,
    num_clients: int = 5,
    client_spread: float = 0.5,
    example_spread: float = 1.0,
    cubic: float = 0.0,
    batch_size: int = 4,
    answer: Answer = lambda losses, key: losses,
    seed: int = 0,
) -> Landscape:
    r"""Returns the losses $\frac12 (\theta - t)^\top H (\theta - t) + \frac{a}{6} \sum_i (\theta_i - t_i)^3$ at θ = 0.

    An example is a centre t, drawn around the centre of its client; H is diagonal from 0.5 to 2.

    Args:
      d: dimensions.
      num_clients: of equal weight.
      client_spread: standard deviation of the clients' centres around 1.
      example_spread: standard deviation of examples around their client's centre; each client has 64.
      cubic: a.
      batch_size: B, drawn with replacement.
      answer: `(losses, key) -> losses as answered`.
      seed: of all centres.

    Example:
      >>> landscape = quadratic_landscape(8, num_clients=3)
      >>> landscape.client_gradients(landscape.params).shape
      (3, 8)
    """
    rng = np.random.default_rng(seed)
    centres = 1 + client_spread * rng.standard_normal((num_clients, 1, d))
    targets = jnp.asarray(centres + example_spread * rng.standard_normal((num_clients, 64, d)), jnp.float32)
    curvature = jnp.linspace(0.5, 2.0, d)

    def loss(params: Array, target: Array) -> Array:
        away = params - target
        return 0.5 * (curvature * away**2).sum(-1) + cubic / 6 * (away**3).sum(-1)

    def draw(key: Array) -> tuple[Array, Array]:
        client_key, row_key = jax.random.split(key)
        return jax.random.randint(client_key, (), 0, num_clients), jax.random.randint(row_key, (batch_size,), 0, 64)

    def mean_loss(params: Array, examples: Array) -> Array:
        return loss(params, examples).mean()

    @jax.jit
    def losses(candidates: Array, draws: tuple[Array, Array], key: Array) -> tuple[Array, Array]:
        exact = jax.vmap(lambda p, client, rows: loss(p, targets[client, rows]))(candidates, *draws)
        return exact, answer(exact, key)

    @jax.jit
    def gradients(params: Array, draws: tuple[Array, Array]) -> Array:
        return jax.vmap(lambda client, rows: jax.grad(mean_loss)(params, targets[client, rows]))(*draws)

    @jax.jit
    def client_gradients(params: Array) -> Array:
        return jax.vmap(lambda examples: jax.grad(mean_loss)(params, examples))(targets)

    weights = jnp.full(num_clients, 1 / num_clients)
    return Landscape(jnp.zeros(d), draw, losses, gradients, client_gradients, weights)
