r"""The laboratory: what an estimator's error is made of, measured against the true gradient.

A trial draws a client, a minibatch of it and a key, and makes one estimate. Its error is split along the chain of what
was replaced by what, each part with the same directions:

$$\hat g - g = \underbrace{(\hat g - \hat g_{\mathrm{exact}})}_{\text{API}}
+ \underbrace{(\hat g_{\mathrm{exact}} - \hat g_{\mathrm{linear}})}_{\text{smoothing}}
+ \underbrace{(\hat g_{\mathrm{linear}} - g_b)}_{\text{directions}}
+ \underbrace{(g_b - g_c)}_{\text{minibatch}} + \underbrace{(g_c - g)}_{\text{clients}}$$

g is the gradient over all data, $g_c$ of one client, $g_b$ of one minibatch, all by autodiff. $\hat g_{linear}$ is the
estimate from the linearised loss, so that the directions' part is what theory speaks of, on any model;
$\hat g_{exact}$ is from exact answers and adds curvature, which falls with the perturbation size; $\hat g$ is from what
the API answers and adds rounding and noise, which grow as it falls. All errors are relative to ‖g‖².
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from fedbbpt_jax.types import Estimator, Params, PyTree

BLOCK = 256  # candidates that are evaluated by one call of one program, whatever the estimator
# Perturbations and estimates are little work beside the evaluations, and are compiled anew for every estimator.
compile_quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Landscape(NamedTuple):
    """A loss at a point, as clients see it and as it is.

    Attributes:
      params: the point.
      draw: `key -> (client, rows [B])`, a client by weight and a minibatch of it.
      losses: `(candidates [n, ...], draws [n, ...], key) -> (exact [n, B], answered [n, B])`, compiled.
      gradients: `(params, draws [n, ...]) -> gradients [n, ...]` of the minibatches, compiled.
      client_gradients: `params -> gradients [clients, ...]`, each over all of a client's data.
      weights: of the clients, `[clients]`, of sum 1.
    """

    params: Params
    draw: Callable[[Array], tuple[Array, Array]]
    losses: Callable[[Params, PyTree, Array], tuple[Array, Array]]
    gradients: Callable[[Params, PyTree], Params]
    client_gradients: Callable[[Params], Params]
    weights: Array


class Mean(NamedTuple):
    """A mean over trials and its standard error."""

    value: float
    error: float


class Measurement(NamedTuple):
    """What one estimator did over N trials; squared errors are relative to ‖g‖².

    Attributes:
      num_evaluations: K, of one estimate.
      mse: E‖ĝ - g‖².
      bias: ‖E ĝ - g‖², without the upward error of a squared mean; may come out slightly negative.
      variance: mse - bias.
      cosine: between ĝ and g.
      snr: 1 / variance, the signal-to-noise ratio of one estimate.
      unit_error_evaluations: K·mse, the evaluations whose mean estimate would be as far from g as 0 is.
      directions, smoothing, api, minibatch, clients: E of the squared norm of each part above.
      perturbation: E of the squared norm of API and smoothing together, what a perturbation size is chosen for.
    """

    num_evaluations: int
    mse: Mean
    bias: Mean
    variance: Mean
    cosine: Mean
    snr: Mean
    unit_error_evaluations: Mean
    directions: Mean
    smoothing: Mean
    api: Mean
    minibatch: Mean
    clients: Mean
    perturbation: Mean


class Trials(NamedTuple):
    """What estimators are compared on: the same clients, minibatches and keys for all. Arrays `[N, ...]`."""

    draws: PyTree
    keys: Array
    of_batch: np.ndarray  # [N, d]
    of_client: np.ndarray  # [N, d]
    of_all: np.ndarray  # [d]


def draw_trials(landscape: Landscape, key: Array, num_trials: int) -> Trials:
    """Returns N trials with their true gradients."""
    draw_key, estimate_key = jax.random.split(key)
    draws = jax.jit(jax.vmap(landscape.draw))(jax.random.split(draw_key, num_trials))
    of_batch = _flat(landscape.gradients(landscape.params, draws))
    of_clients = _flat(landscape.client_gradients(landscape.params))
    of_all = np.asarray(landscape.weights, np.float64) @ of_clients
    keys = jax.random.split(estimate_key, num_trials)
    return Trials(draws, keys, of_batch, of_clients[np.asarray(draws[0])], of_all)


def measure(landscape: Landscape, estimator: Estimator, trials: Trials, *, num_warmup: int = 0) -> Measurement:
    """Returns what an estimator does at a landscape's point.

    Args:
      landscape: the loss.
      estimator: any; its perturbation and estimate are compiled, the model is not compiled again.
      trials: made by `draw_trials` of the same landscape.
      num_warmup: estimates made at the same point before the one that is measured, for estimators that remember.

    Example:
      >>> from fedbbpt_jax import quadratic_landscape, rademacher, spsa
      >>> landscape = quadratic_landscape(8)
      >>> trials = draw_trials(landscape, jax.random.key(0), 100)
      >>> measured = measure(landscape, spsa(rademacher(), 4, 0.1), trials)
      >>> measured.num_evaluations, measured.smoothing.value < 1e-6
      (8, True)
    """
    return measure_sizes(landscape, lambda size: estimator, [1.0], trials, num_warmup=num_warmup)[0]


def measure_sizes(
    landscape: Landscape,
    build: Callable[[Array], Estimator],
    sizes: Sequence[float],
    trials: Trials,
    *,
    num_warmup: int = 0,
) -> list[Measurement]:
    """Returns what an estimator does at each of several perturbation sizes, compiled once for all of them.

    Args:
      landscape: the loss.
      build: `perturbation size -> estimator`.
      sizes: to try.
      trials: as for `measure`.
      num_warmup: as for `measure`.
    """
    play = _compiled(landscape, build, len(trials.keys))
    num_evaluations = build(jnp.ones(())).num_candidates
    start = jax.jit(jax.vmap(lambda _: build(jnp.ones(())).init(landscape.params)))(trials.keys)
    measured = []
    for size in sizes:
        states = start
        for step in reversed(range(num_warmup + 1)):  # the last is at the trials as they are
            keys = jax.vmap(jax.random.fold_in, (0, None))(trials.keys, step)
            draws = jax.tree.map(lambda x, shift=step: jnp.roll(x, shift, axis=0), trials.draws)
            states, estimates = play(jnp.float32(size), keys, states, draws, np.roll(trials.of_batch, step, axis=0))
        measured.append(summarise(num_evaluations, trials, *estimates))
    return measured


def summarise(
    num_evaluations: int, trials: Trials, answered: np.ndarray, exact: np.ndarray, linear: np.ndarray
) -> Measurement:
    """Returns the measurement from the three estimates of each trial, `[N, d]`."""
    truth = trials.of_all
    scale = float(truth @ truth)
    mse = _mean(_squares(answered - truth) / scale)
    bias = _squared_mean((answered - trials.of_batch) / np.sqrt(scale))
    variance = Mean(mse.value - bias.value, float(np.hypot(mse.error, bias.error)))
    norms = np.linalg.norm(answered, axis=1)
    cosine = _mean(answered @ truth / np.maximum(norms * np.sqrt(scale), 1e-30))
    return Measurement(
        num_evaluations,
        mse,
        bias,
        variance,
        cosine,
        snr=Mean(1 / max(variance.value, 1e-30), variance.error / max(variance.value, 1e-30) ** 2),
        unit_error_evaluations=Mean(num_evaluations * mse.value, num_evaluations * mse.error),
        directions=_mean(_squares(linear - trials.of_batch) / scale),
        smoothing=_mean(_squares(exact - linear) / scale),
        api=_mean(_squares(answered - exact) / scale),
        minibatch=_mean(_squares(trials.of_batch - trials.of_client) / scale),
        clients=_mean(_squares(trials.of_client - truth) / scale),
        perturbation=_mean(_squares(answered - linear) / scale),
    )


def best_perturbation_size(sizes: np.ndarray, errors: np.ndarray) -> float:
    r"""Returns the size of least perturbation error, from errors measured at some sizes.

    Fits $N c^{-2} + S_1 c^2 + S_2 c^4$ with positive weights: API noise, and the curvature seen by one-sided and
    two-sided differences. Where $S_2$ rules, $c^* = (N / 2 S_2)^{1/6}$, and N is the noise's variance: the cube-root
    law in its standard deviation.

    Args:
      sizes: c, `[n]`, increasing, at least 3.
      errors: of `Measurement.perturbation`, `[n]`.
    """
    from scipy.optimize import nnls

    at = int(np.argmin(errors))
    # Far below the best size the answers to both sides are the same number and the law ends; far above, the fourth
    # power does. The fit is to the neighbours of the best measured size, weighted for equal relative errors.
    near = slice(max(at - 2, 0), at + 3)
    c, e = np.asarray(sizes, np.float64)[near], np.maximum(np.asarray(errors, np.float64)[near], 1e-30)
    weights, _ = nnls(np.stack([c**-2, c**2, c**4], axis=1) / e[:, None], np.ones(len(c)))
    fine = np.geomspace(c[0], c[-1], 1001)
    return float(fine[np.argmin(np.stack([fine**-2, fine**2, fine**4], axis=1) @ weights)])


def _compiled(landscape: Landscape, build: Callable[[Array], Estimator], num_trials: int) -> Callable:
    """Returns `(size, keys [N], states, draws, gradients [N, d]) -> (states, estimates [3, N, d])`.

    Candidates are made, evaluated and told group by group. A group fills blocks of `BLOCK` candidates, so that every
    estimator uses the same compiled losses.
    """
    params = landscape.params
    num_candidates = build(jnp.ones(())).num_candidates
    group = max(1, min(BLOCK // num_candidates, num_trials))
    total = group * num_candidates
    padded = np.minimum(np.arange(-(-total // BLOCK) * BLOCK), total - 1).reshape(-1, BLOCK)  # [blocks, BLOCK]

    @compile_quickly
    def make(size: Array, rows: Array, keys: Array, states: PyTree, draws: PyTree) -> tuple[Params, PyTree]:
        def one(row: Array) -> Params:
            k, key, state = jnp.arange(num_candidates), keys[row], jax.tree.map(lambda x: x[row], states)
            return jax.vmap(lambda k: build(size).perturb(key, state, params, k))(k)

        candidates = jax.vmap(one)(rows)  # [group, K, ...]
        blocks = jax.tree.map(lambda x: x.reshape(total, *x.shape[2:])[padded], candidates)
        return blocks, jax.tree.map(lambda x: x[rows[padded // num_candidates]], draws)

    @compile_quickly
    def tell(size: Array, rows: Array, keys: Array, states: PyTree, blocks: Params, gradients: Array, answers: PyTree):
        def one(row, candidates, told):
            state = jax.tree.map(lambda x: x[row], states)
            steps = jax.vmap(lambda c: ravel_pytree(c)[0])(candidates) - ravel_pytree(params)[0]  # [K, d]
            linear = jnp.broadcast_to((steps @ gradients[row])[:, None], told.shape[1:])
            told = jnp.concatenate([told, linear[None]])  # [3, K, B]
            estimate = lambda x: build(size).estimate(keys[row], state, params, x, jnp.isfinite(x))  # noqa: E731
            gradient, after, _ = jax.vmap(estimate)(told)
            return jax.tree.map(lambda x: x[0], after), jax.vmap(lambda g: ravel_pytree(g)[0])(gradient)

        def ungrouped(x: Array) -> Array:
            return x.reshape(-1, *x.shape[2:])[:total].reshape(group, num_candidates, *x.shape[2:])

        candidates = jax.tree.map(ungrouped, blocks)
        exact, answered = map(ungrouped, answers)
        with jax.default_matmul_precision("highest"):
            return jax.vmap(one)(rows, candidates, jnp.stack([answered, exact], axis=1))

    def play(size: Array, keys: Array, states: PyTree, draws: PyTree, gradients: np.ndarray):
        gradients32, parts = jnp.asarray(gradients, jnp.float32), []
        for first in range(0, num_trials, group):
            rows = np.minimum(np.arange(first, first + group), num_trials - 1)
            blocks, block_draws = make(size, rows, keys, states, draws)
            answers = []
            for i in range(len(padded)):
                some, of = jax.tree.map(lambda x, i=i: x[i], (blocks, block_draws))
                answers.append(landscape.losses(some, of, jax.random.fold_in(keys[first], i)))
            stacked = tuple(jnp.stack(x) for x in zip(*answers, strict=True))
            parts.append(tell(size, rows, keys, states, blocks, gradients32, stacked))
        states, estimates = jax.tree.map(lambda *x: jnp.concatenate(x)[:num_trials], *parts)
        return states, np.asarray(estimates, np.float64).transpose(1, 0, 2)

    return play


def _flat(tree: Params) -> np.ndarray:
    return np.asarray(jax.vmap(lambda x: ravel_pytree(x)[0])(tree), np.float64)


def _squares(vectors: np.ndarray) -> np.ndarray:
    return (vectors**2).sum(axis=1)


def _mean(values: np.ndarray) -> Mean:
    return Mean(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def _squared_mean(vectors: np.ndarray) -> Mean:
    """Returns ‖E x‖² of N vectors without bias (all pairs of different trials), with its jackknife error."""
    n, total, own = len(vectors), vectors.sum(axis=0), _squares(vectors)
    value = (total @ total - own.sum()) / (n * (n - 1))
    left = total - vectors  # [N, d], the sum without each trial
    without = (_squares(left) - (own.sum() - own)) / ((n - 1) * (n - 2))
    return Mean(float(value), float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())))
