r"""Adaptive federated optimization: the server takes an optimizer's step along what the clients moved on average.

$$\Delta_t = \theta_t - \sum_i w_i \theta_{t,i} \Big/ \sum_i w_i, \qquad \theta_{t+1} = \theta_t + tx(\Delta_t)$$

Source: Reddi et al., 2021, "Adaptive Federated Optimization", Algorithms 1 and 2. There the difference has the opposite
sign and is added; here it is what an optax transformation takes for a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedbbpt_jax.types import Federation, PyTree, Total


class ServerOptimizerState(NamedTuple):
    """The server's state of the federation inside and that of the server's transformation."""

    inner: PyTree
    transformation: optax.OptState


def with_server_optimizer(federation: Federation, tx: optax.GradientTransformation) -> Federation:
    r"""Returns the federation whose server applies `tx` to the difference $\Delta_t$ of parameters, a pseudo-gradient.

    `optax.sgd(1.0)` is plain averaging. The rest of the clients' state, such as momenta, and parameters that stay with
    their clients are what the federation inside makes of them. A round whose weights are all 0 leaves everything as it
    was, the transformation's state too. Nothing more travels.

    Source: Reddi et al., 2021, Algorithm 1.

    Args:
      federation: averages clients whose state has a field `params`.
      tx: the server's optimizer, such as `fedadam(0.03)`; schedules count rounds.

    Example:
      >>> from fedbbpt_jax.estimators.directions import rademacher
      >>> from fedbbpt_jax.estimators.spsa import spsa
      >>> from fedbbpt_jax.federated.averaging import weighted_mean
      >>> from fedbbpt_jax.optimizers.descent import descent
      >>> client = descent(spsa(rademacher(), 5, 0.05), optax.sgd(0.1)).init(jnp.zeros(2))
      >>> federation = with_server_optimizer(weighted_mean(), optax.sgd(0.5))
      >>> server, moved = federation.init(client), client._replace(params=jnp.array([1.0, -2.0]))
      >>> clients = jax.tree.map(lambda x: x[None], moved)
      >>> server = federation.aggregate(server, jnp.zeros(1, int), clients, jnp.ones(1), lambda x: x.sum(0))
      >>> federation.outcomes(server).params
      Array([[ 0.5, -1. ]], dtype=float32)
    """

    def init(client: PyTree) -> ServerOptimizerState:
        inner = federation.init(client)
        one = jax.tree.map(lambda x: x[None], client.params)
        return ServerOptimizerState(inner, tx.init(_averaged_only(inner.params, one)))

    def aggregate(
        server: ServerOptimizerState, ids: Array, clients: PyTree, weights: Array, total: Total
    ) -> ServerOptimizerState:
        after = federation.aggregate(server.inner, ids, clients, weights, total)
        old, new = (_averaged_only(params, clients.params) for params in (server.inner.params, after.params))
        updates, transformation = tx.update(jax.tree.map(jnp.subtract, old, new), server.transformation, old)
        moved = optax.apply_updates(old, updates)
        params = jax.tree.map(
            lambda x, other: other if x is None else x, moved, after.params, is_leaf=lambda x: x is None
        )
        stepped = ServerOptimizerState(after._replace(params=params), transformation)
        anyone = total(weights) > 0
        return jax.tree.map(lambda x, kept: jnp.where(anyone, x, kept), stepped, server)

    return Federation(
        init=init,
        broadcast=lambda server, ids: federation.broadcast(server.inner, ids),
        aggregate=aggregate,
        outcomes=lambda server: federation.outcomes(server.inner),
        payload_bytes=federation.payload_bytes,
    )


def fedavgm(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Returns FedAvgM's server: momentum 0.9, $v_t = 0.9\, v_{t-1} + \Delta_t$, $\theta_{t+1} = \theta_t - \eta v_t$.

    Source: Hsu et al., 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", section 4.3 (there $\eta = 1$).

    Example:
      >>> tx = fedavgm(1.0)
      >>> updates, state = tx.update(jnp.array([0.5, -1.0]), tx.init(jnp.zeros(2)))
      >>> updates
      Array([-0.5,  1. ], dtype=float32)
    """
    return optax.sgd(learning_rate, momentum=0.9)


def fedadam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Returns FedAdam's server with the paper's constants, $\beta_1 = 0.9$, $\beta_2 = 0.99$ and $\tau = 10^{-3}$.

    $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) \Delta_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) \Delta_t^2, \quad
    \theta_{t+1} = \theta_t - \eta\, \hat m_t / (\sqrt{\hat v_t} + \tau)$$

    Differs from Algorithm 2 in two ways, both optax's: moments are corrected for their bias (m by $1 - \beta_1^t$, v by
    $1 - \beta_2^t$), and v starts at 0, not at $\tau^2$ or more. Where differences are well above $\tau$ the paper's
    steps are longer, 2.1 times in round 13 and 1.3 times in round 100.

    Source: Reddi et al., 2021, Algorithm 2.

    Example:
      >>> tx = fedadam(0.03)
      >>> updates, state = tx.update(jnp.array([0.5, -1.0]), tx.init(jnp.zeros(2)))
      >>> updates.round(5)
      Array([-0.02994,  0.02997], dtype=float32)
    """
    return optax.adam(learning_rate, b1=0.9, b2=0.99, eps=1e-3)


def fedyogi(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Returns FedYogi's server: FedAdam's, whose $v_t$ grows and falls additively.

    $$v_t = v_{t-1} - (1 - \beta_2)\, \Delta_t^2\, \mathrm{sign}(v_{t-1} - \Delta_t^2)$$

    Differs from Algorithm 2 in two ways, both optax's: moments are corrected for their bias, as in `fedadam`, and both
    start at 1e-6. That is the paper's $\tau^2$ for v, though the correction makes it 1e-4 in the first round; for m it
    moves what no client moved by less than 0.001 learning rates a round.

    Source: Reddi et al., 2021, Algorithm 2.

    Example:
      >>> tx = fedyogi(0.03)
      >>> updates, state = tx.update(jnp.array([0.5, -1.0]), tx.init(jnp.zeros(2)))
      >>> updates.round(5)
      Array([-0.02993,  0.02997], dtype=float32)
    """
    return optax.yogi(learning_rate, b1=0.9, b2=0.99, eps=1e-3)


SERVER_OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
}
"""By name, from a learning rate of the server."""


def _averaged_only(params: PyTree, clients: PyTree) -> PyTree:
    """Returns the server's parameters, None where they are kept per client: there the rank is that of `[C, ...]`."""
    return jax.tree.map(lambda x, client: x if x.ndim < client.ndim else None, params, clients)
