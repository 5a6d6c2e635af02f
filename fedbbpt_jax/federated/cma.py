r"""FedBPT: clients search with CMA-ES for a few generations, and the server makes one generation of where they end.

Client k starts from the server's distribution $(m_t, \sigma_t, C_t)$ and after T generations of λ candidates reports
its mean $m_k$, the loss $F_k$ there, and $\sum_j \sigma_{k,j}^2$ of its step sizes. For the server the means are
candidates and their losses are losses. It takes them for a sample of the step size that means of this kind have,

$$\sigma'_t = 2 \sqrt{\sum_{k \in \mathrm{best}\,|S|/2}\ \sum_j \sigma_{k,j}^2 \Big/ (|S| \lambda)},
\qquad \sigma_{t+1} = \sigma_t \cdot \sigma^{new}_t / \sigma'_t$$

with $\sigma^{new}$ what CMA-ES makes of $\sigma'$: a generation moves a mean by $\sigma_{k,j}^2 \cdot 2/\lambda$ in
variance, these add up, and their mean over the best half is $\sigma'^2$.

**Replay.** $C_t$ need not travel. It is a function of the reports of all rounds, and these are d + 2 numbers for each
client: whoever gets them replays the server's step (`replay`, which `aggregate` calls too). In d = 500 that is 20 kB
for the reports of ten clients, where C alone is 1 MB (and the strategy object that NVFlare sends more than 4). A client
that was away needs the reports of the rounds that it missed.

Differs from the paper in three ways. A half of an odd number is rounded down, and the sum is over as many clients as it
is divided by. Paths of clients begin at zero in each round, as in NVFlare, so that nothing but the distribution is
needed. The floor of the step size works: in NVFlare it is set and then overwritten.

Source: Sun et al., 2024, "FedBPT: Efficient Federated Black-box Prompt Tuning for Large Language Models", equation 6;
NVFlare's implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from fedbbpt_jax.estimators.spsa import check_positive, masked_mean
from fedbbpt_jax.optimizers.cma_es import (
    CMAState,
    ZeroRank,
    best_half,
    decomposed,
    default_rates,
    recombination_weights,
    recombined,
    whitened,
)
from fedbbpt_jax.optimizers.perturbed_loss import loss_ratio
from fedbbpt_jax.types import EstimateInfo, Federation, Optimizer, Params, Total


class FedBPTState(NamedTuple):
    """A client in a round.

    Attributes:
      distribution: of its CMA-ES.
      squared_step_sizes: sum over the round's generations, in squared units of the parameters.
      loss: at the mean after the last of them, nats or a ratio; NaN until it is reported.
    """

    distribution: CMAState
    squared_step_sizes: Array
    loss: Array

    @property
    def params(self) -> Params:
        """The mean."""
        return self.distribution.params


class Reports(NamedTuple):
    """What clients send, and what they get to replay the server's step.

    Attributes:
      means: float32 `[S, d]`.
      losses: at the means, float32 `[S]`; NaN where there is none, so that the client does not count.
      squared_step_sizes: float32 `[S]`.
    """

    means: Array
    losses: Array
    squared_step_sizes: Array


def fedbpt_client(optimizer: Optimizer) -> Optimizer:
    """Returns a CMA-ES that remembers what its client has to report. The loss comes last, by `report`.

    Args:
      optimizer: `cma_es`, or that `with_perturbed_loss` (`optimizers/perturbed_loss.py`).

    Example:
      >>> from fedbbpt_jax.optimizers.cma_es import cma_es
      >>> client = fedbpt_client(cma_es(5, initial_step_size=2.0))
      >>> state, _ = client.tell(jax.random.key(0), client.init(jnp.zeros(3)), jnp.ones((5, 1)), jnp.ones((5, 1), bool))
      >>> report(state, losses=jnp.array([0.25, 0.75]), valid=jnp.array([True, True]))[1:]
      (Array(4., dtype=float32), Array(0.5, dtype=float32))
    """

    def tell(key: Array, state: FedBPTState, losses: Array, valid: Array) -> tuple[FedBPTState, EstimateInfo]:
        told, info = optimizer.tell(key, state.distribution, losses, valid)
        # A generation without answers moved nothing.
        square = jnp.where(info.num_directions > 0, state.distribution.step_size**2, 0.0)
        return FedBPTState(told, state.squared_step_sizes + square, state.loss), info

    return Optimizer(
        init=lambda params: _begin(optimizer.init(params)),
        ask=lambda key, state, k: optimizer.ask(key, state.distribution, k),
        tell=tell,
        solution=lambda state: optimizer.solution(state.distribution),
        num_candidates=optimizer.num_candidates,
    )


def report(state: FedBPTState, losses: Array, valid: Array) -> FedBPTState:
    """Returns the client's state with the mean of the losses `[B]` at its mean; NaN where none is valid.

    A client that does not report does not count: a round without any report leaves the server as it was.
    """
    return state._replace(loss=jnp.where(valid.any(), masked_mean(losses, valid), jnp.nan))


def report_ratio(state: FedBPTState, losses: Array, valid: Array) -> FedBPTState:
    """Returns the client's state with the ratio of losses `[2B]` at its mean, as `with_perturbed_loss` has it."""
    return report(state, *loss_ratio(losses, valid))


def fedbpt(
    num_clients: int,
    cohort_size: int,
    num_candidates: int,
    *,
    min_step_size: float = 1e-3,
    max_condition: float = 1e7,
    zero_rank: ZeroRank = best_half,
) -> Federation:
    """Returns the federation above, of clients that `fedbpt_client` optimizes.

    Weights say who took part and nothing else: losses are ranked, and a rank has no size. The server's state is the
    distribution; its step size is that of the clients' first generation. A round of nobody leaves everything as it was.
    Reports are put in the order of ids first, so that the result does not depend on where clients are; of those who
    take part no two have the same id.

    Args:
      num_clients: ids are 0 to num_clients - 1.
      cohort_size: the most clients that take part in a round, at most as many as there are.
      num_candidates: λ, of a client.
      min_step_size: of clients at the beginning of a round, in units of the parameters.
      max_condition: as for `cma_es`.
      zero_rank: who has a weight: `best_half`, or `every_rank` as in NVFlare, where clients differ much.

    Raises:
      ValueError: a size is not positive, or the cohort is larger than the federation.

    Example:
      >>> from fedbbpt_jax.optimizers.cma_es import cma_es
      >>> federation = fedbpt(num_clients=100, cohort_size=10, num_candidates=5)
      >>> federation.payload_bytes(fedbpt_client(cma_es(5, initial_step_size=1.0)).init(jnp.zeros(500)))
      (20080, 2008)
    """
    check_positive(num_candidates=num_candidates, min_step_size=min_step_size, cohort_size=cohort_size)
    if cohort_size > num_clients:
        raise ValueError(f"a cohort of {cohort_size} is larger than the federation of {num_clients} clients")
    step = replay(
        cohort_size, num_candidates, min_step_size=min_step_size, max_condition=max_condition, zero_rank=zero_rank
    )

    def aggregate(server: CMAState, ids: Array, clients: FedBPTState, weights: Array, total: Total) -> CMAState:
        return step(server, gathered(clients, ids, weights, total, num_clients, cohort_size))

    def broadcast(server: CMAState, ids: Array) -> FedBPTState:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(ids), *x.shape)), _begin(server))

    def payload_bytes(client: FedBPTState) -> tuple[int, int]:
        of_one = 4 * (client.distribution.scales.size + 2)
        return cohort_size * of_one, of_one

    return Federation(
        init=lambda client: client.distribution,
        broadcast=broadcast,
        aggregate=aggregate,
        outcomes=lambda server: broadcast(server, jnp.zeros(1, jnp.int32)),
        payload_bytes=payload_bytes,
    )


def with_sent_covariance(federation: Federation) -> Federation:
    """Returns the same federation where the server sends mean, step size and C, for whoever cannot replay.

    Example:
      >>> from fedbbpt_jax.optimizers.cma_es import cma_es
      >>> federation = with_sent_covariance(fedbpt(num_clients=100, cohort_size=10, num_candidates=5))
      >>> federation.payload_bytes(fedbpt_client(cma_es(5, initial_step_size=1.0)).init(jnp.zeros(500)))
      (1002004, 2008)
    """

    def payload_bytes(client: FedBPTState) -> tuple[int, int]:
        dim = client.distribution.scales.size
        return 4 * (dim * dim + dim + 1), federation.payload_bytes(client)[1]

    return federation._replace(payload_bytes=payload_bytes)


def replay(
    cohort_size: int,
    num_candidates: int,
    *,
    min_step_size: float = 1e-3,
    max_condition: float = 1e7,
    zero_rank: ZeroRank = best_half,
) -> Callable[[CMAState, Reports], CMAState]:
    """Returns the server's step, `(distribution, reports [S]) -> distribution`, which clients can do as well.

    It takes the reports of those who took part, in the order of their ids. With rows of NaN for losses behind them, so
    that they are `cohort_size` as on the server, the bits are the same too. Arguments are as for `fedbpt`.
    """

    def step(server: CMAState, reports: Reports) -> CMAState:
        answered = jnp.isfinite(reports.losses) & jnp.isfinite(reports.means).all(1)
        means = jnp.where(answered[:, None], reports.means, 0.0)
        squares = jnp.where(answered, reports.squared_step_sizes, 0.0)
        weights = recombination_weights(reports.losses, answered, zero_rank)
        step_size = server_step_size(reports.losses, squares, answered, num_candidates)
        scale = jnp.where(step_size > 0, step_size, 1.0)
        centre = ravel_pytree(server.params)[0]
        steps = jnp.where(answered[:, None], (means - centre) / scale, 0.0)  # [S, d]
        rates = default_rates(centre.size, cohort_size, zero_rank)
        with jax.default_matmul_precision("highest"):
            whitened_step = whitened(server, weights @ steps)
        told = recombined(server._replace(step_size=scale), rates, steps, weights, whitened_step)
        basis, scales = decomposed(told.covariance, max_condition)
        local = jnp.maximum(server.step_size * told.step_size / scale, min_step_size)
        told = told._replace(step_size=local, basis=basis, scales=scales)
        return jax.tree.map(lambda new, old: jnp.where(answered.any(), new, old), told, server)

    return step


def server_step_size(losses: Array, squared_step_sizes: Array, answered: Array, num_candidates: int) -> Array:
    r"""Returns $\sigma'$ of equation 6, 0 where nobody answered; of clients with equal losses, the first are best.

    Args:
      losses: `[S]`.
      squared_step_sizes: sums over a client's generations, `[S]`.
      answered: bool `[S]`.
      num_candidates: λ.

    Example:
      >>> losses, squares = jnp.array([0.3, 0.1, 0.9, 0.2]), jnp.array([8.0, 7.0, 5.0, 3.0])
      >>> server_step_size(losses, squares, jnp.ones(4, bool), num_candidates=10)  # 2 sqrt((7 + 3) / (4 * 10))
      Array(1., dtype=float32)
    """
    ranks = jnp.argsort(jnp.argsort(jnp.where(answered, losses, jnp.inf), stable=True))
    num_best = jnp.maximum(answered.sum() // 2, 1)
    of_best = jnp.where(answered & (ranks < num_best), squared_step_sizes, 0.0).sum()
    return 2 * jnp.sqrt(of_best / (2 * num_best * num_candidates))


def gathered(
    clients: FedBPTState, ids: Array, weights: Array, total: Total, num_clients: int, cohort_size: int
) -> Reports:
    """Returns the reports of all who took part, wherever they are, in the order of their ids, `[cohort_size]`.

    Only who came is counted among all clients; the reports are `[cohort_size, d]`, not `[num_clients, d]`.
    """
    took_part = weights > 0
    present = total(jnp.zeros(num_clients, jnp.int32).at[ids].add(took_part.astype(jnp.int32))[None])
    place = jnp.where(took_part, (jnp.cumsum(present) - 1)[ids], cohort_size)  # past the end: dropped

    def gather(x: Array) -> Array:
        """Returns the sum over all clients of `[C, ...]`, each in its place: one number and zeros, hence exact."""
        return total(jnp.zeros((cohort_size, *x.shape[1:])).at[place].add(x.astype(jnp.float32), mode="drop")[None])

    means = gather(jax.vmap(lambda params: ravel_pytree(params)[0])(clients.params))
    losses = jnp.where(jnp.arange(cohort_size) < present.sum(), gather(clients.loss), jnp.nan)
    return Reports(means, losses, gather(clients.squared_step_sizes))


def _begin(distribution: CMAState) -> FedBPTState:
    """Returns a client at the beginning of a round: paths start anew, and so do the generations they have seen."""
    nothing = jnp.zeros_like(distribution.step_path)
    fresh = distribution._replace(
        step_path=nothing, covariance_path=nothing, generation=jnp.zeros_like(distribution.generation)
    )
    return FedBPTState(fresh, jnp.zeros_like(distribution.step_size), jnp.full_like(distribution.step_size, jnp.nan))
