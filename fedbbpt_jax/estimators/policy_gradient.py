r"""Policy gradients for discrete prompts: n independent categorical positions over N words.

A candidate is a sample, word indices int32 `[n]`; the parameters define probabilities p `[n, N]`. The estimate is of
the gradient of the expected loss $J = E_{j \sim p}[L(j)]$ by a score v and a baseline b:

$$\hat g = \frac1K \sum_k (L_k - b_k)\, v(j_k)$$

**The scores of BDPL.** Its estimator is $\frac{1}{K-1} \sum_k (L_k - \bar L)\, v(j_k)$. Since
$L_k - \bar L = \frac{K-1}{K}(L_k - b_k)$ with the mean $b_k$ of the other losses, that is the leave-one-out baseline,
hence unbiased. And since $\sum_k (L_k - \bar L) = 0$, what all samples' scores have in common cancels. Public code has
three scores for probabilities; at the sampled word all say 1/p, elsewhere `zero` says 0, `negative` -1/p and
`normalized` -1/(Np). The last two are $-\frac1p + \frac2p 1[j]$ and $-\frac1{Np} + \frac{1 + 1/N}p 1[j]$, so that
`negative` = 2 x `zero` and `normalized` = (1 + 1/N) x `zero`, exactly. What differs is the numerics: a word that was
projected to p = 0 makes 0·∞ of all but `zero`. A constant added to all words of a position is no gradient on the
simplex, and the projection ignores it.

Source: Williams, 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning"
(REINFORCE); Diao et al., 2023, "Black-Box Prompt Learning for Pre-trained Language Models" (BDPL).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedbbpt_jax.estimators.spsa import check_positive, estimate_info, masked_mean
from fedbbpt_jax.types import Estimator

Baseline = Callable[[Array, Array, Array], Array]
"""`(losses [K], answered [K], squared norms of the scores [K]) -> baselines [K]`."""


class Policy(NamedTuple):
    """A distribution of words and its score; parameters are float32 `[n, N]`.

    Attributes:
      log_probabilities: `params -> [n, N]`, -inf where a word cannot come.
      score: `(params, ids [n]) -> [n, N]`.
    """

    log_probabilities: Callable[[Array], Array]
    score: Callable[[Array, Array], Array]


class PolicyState(NamedTuple):
    """Steps taken, int32."""

    step: Array


def policy_gradient(policy: Policy, num_samples: int, baseline: Baseline) -> Estimator:
    """Returns the estimator above, at K = num_samples evaluations.

    Unbiased with `leave_one_out` and `optimal_scalar`; with `mean` it is (K - 1)/K of that with `leave_one_out`. The
    scores `negative` and `normalized`, whose mean is not the same for all words, bear only those two baselines
    whose advantages sum to zero, `leave_one_out` and `mean`.

    Args:
      policy: the distribution and its score.
      num_samples: K, at least 2.
      baseline: of each sample's loss.

    Raises:
      ValueError: there are not two samples to compare.

    Example:
      >>> estimator = policy_gradient(logits(), num_samples=8, baseline=leave_one_out)
      >>> params = jnp.zeros((3, 5))
      >>> estimator.perturb(jax.random.key(0), estimator.init(params), params, 0).shape
      (3,)
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")

    def init(params: Array) -> PolicyState:
        del params
        return PolicyState(jnp.zeros((), jnp.int32))

    def perturb(key: Array, state: PolicyState, params: Array, k: Array) -> Array:
        del state
        return jax.random.categorical(jax.random.fold_in(key, k), policy.log_probabilities(params)).astype(jnp.int32)

    def estimate(key: Array, state: PolicyState, params: Array, losses: Array, valid: Array):
        def score(k: Array) -> Array:
            return policy.score(params, perturb(key, state, params, k))

        samples = jnp.arange(num_samples)
        answered = valid.any(axis=1)
        answered &= answered.sum() > 1  # one alone has nothing to be compared with
        means = masked_mean(losses, valid, axis=1)
        advantages = means - baseline(means, answered, jax.lax.map(lambda k: (score(k) ** 2).sum(), samples))
        weights = jnp.where(answered, advantages, 0.0) / jnp.maximum(answered.sum(), 1)
        zeros = jnp.zeros_like(params, jnp.float32)
        gradient, _ = jax.lax.scan(lambda g, k: (g + weights[k] * score(k), None), zeros, samples)
        return gradient, PolicyState(state.step + 1), estimate_info(gradient, answered, losses, valid)

    return Estimator(init, perturb, estimate, num_samples)


def bdpl(num_samples: int) -> Estimator:
    """Returns BDPL's variance-reduced policy gradient over probabilities, in the form that divides by no zero.

    Twice this is the published code's estimator with `negative` scores, for the same samples.

    Example:
      >>> bdpl(20).num_candidates
      20
    """
    return policy_gradient(probabilities(), num_samples, leave_one_out)


def mean(losses: Array, answered: Array, squared_scores: Array) -> Array:
    """Returns the mean loss of all samples."""
    del squared_scores
    return jnp.broadcast_to(masked_mean(losses, answered), losses.shape)


def leave_one_out(losses: Array, answered: Array, squared_scores: Array) -> Array:
    """Returns for each sample the mean loss of the others.

    Source: Kool et al., 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (RLOO).
    """
    return _others(losses, answered.astype(jnp.float32), jnp.ones_like(squared_scores))


def optimal_scalar(losses: Array, answered: Array, squared_scores: Array) -> Array:
    r"""Returns for each sample $E[L\|v\|^2] / E[\|v\|^2]$ of the others, the scalar baseline of least variance.

    Source: Greensmith et al., 2004, "Variance Reduction Techniques for Gradient Estimates in Reinforcement Learning".
    """
    return _others(losses, answered.astype(jnp.float32), squared_scores)


def probabilities() -> Policy:
    """Returns the policy whose parameters are p, rows of the simplex, with score 1/p at the sampled word (`zero`).

    Example:
      >>> probabilities().score(jnp.array([[0.25, 0.75]]), jnp.array([1]))
      Array([[0.       , 1.3333334]], dtype=float32)
    """
    return Policy(jnp.log, lambda p, ids: _sampled(p, ids) / p.at[jnp.arange(len(p)), ids].get()[:, None])


def probabilities_negative() -> Policy:
    """Returns the policy over p with score ±1/p, + at the sampled word; infinite where a p is 0.

    Example:
      >>> probabilities_negative().score(jnp.array([[0.25, 0.75]]), jnp.array([1]))
      Array([[-4.       ,  1.3333334]], dtype=float32)
    """
    return Policy(jnp.log, lambda p, ids: (2 * _sampled(p, ids) - 1) / p)


def probabilities_normalized() -> Policy:
    """Returns the policy over p with score 1/p at the sampled word and -1/(Np) elsewhere; infinite where a p is 0.

    Example:
      >>> probabilities_normalized().score(jnp.array([[0.25, 0.75]]), jnp.array([1]))
      Array([[-2.       ,  1.3333334]], dtype=float32)
    """

    def score(p: Array, ids: Array) -> Array:
        hit = _sampled(p, ids)
        return (hit - (1 - hit) / p.shape[-1]) / p

    return Policy(jnp.log, score)


def probabilities_constrained() -> Policy:
    """Returns the policy over p with score 1/p_j at the sampled word j and -1/p_j elsewhere, as the paper writes it.

    The derivative of log p_j where p_j is 1 less the others. On the simplex its mean is twice the gradient.

    Example:
      >>> probabilities_constrained().score(jnp.array([[0.25, 0.75]]), jnp.array([1]))
      Array([[-1.3333334,  1.3333334]], dtype=float32)
    """

    def score(p: Array, ids: Array) -> Array:
        return (2 * _sampled(p, ids) - 1) / p[jnp.arange(len(p)), ids][:, None]

    return Policy(jnp.log, score)


def logits() -> Policy:
    """Returns the policy whose parameters are the logits of p: any real numbers, score 1[j] - p.

    Example:
      >>> logits().score(jnp.zeros((1, 2)), jnp.array([1]))
      Array([[-0.5,  0.5]], dtype=float32)
    """
    return Policy(jax.nn.log_softmax, lambda x, ids: _sampled(x, ids) - jax.nn.softmax(x))


def gumbel(temperature: float) -> Policy:
    r"""Returns FedOne's policy: positive parameters α with $p = \mathrm{softmax}(\log α / τ)$, score (1[j] - p)/(ατ).

    Sampling by adding Gumbel noise to log α / τ and taking the largest is sampling from p.

    Source: Wang et al., 2025, "FedOne: Query-Efficient Federated Learning for Black-box Discrete Prompt Learning"
    (Gumbel-softmax variant), from the published code.

    Args:
      temperature: τ.

    Raises:
      ValueError: the temperature is not positive.

    Example:
      >>> gumbel(0.5).score(jnp.ones((1, 2)), jnp.array([1]))
      Array([[-1.,  1.]], dtype=float32)
    """
    check_positive(temperature=temperature)

    def log_probabilities(alpha: Array) -> Array:
        return jax.nn.log_softmax(jnp.log(alpha) / temperature)

    def score(alpha: Array, ids: Array) -> Array:
        return (_sampled(alpha, ids) - jnp.exp(log_probabilities(alpha))) / (alpha * temperature)

    return Policy(log_probabilities, score)


def expected_loss(policy: Policy, params: Array, loss: Callable[[Array], Array]) -> Array:
    """Returns J by enumerating all N^n prompts: the ground truth for tiny vocabularies. `jax.grad` gives its
    gradient where no probability is 0.

    Args:
      policy: the distribution.
      params: `[n, N]`.
      loss: of a prompt, `ids [n] -> scalar`.
    """
    num_positions, num_words = params.shape
    prompts = jnp.array(list(product(range(num_words), repeat=num_positions)), jnp.int32)  # [N^n, n]
    chances = jnp.exp(policy.log_probabilities(params))
    chance = jax.vmap(lambda ids: chances[jnp.arange(num_positions), ids].prod())(prompts)
    return (chance * jax.vmap(loss)(prompts)).sum()


def _sampled(like: Array, ids: Array) -> Array:
    """Returns 1 at the sampled words and 0 elsewhere, float32 `[n, N]`."""
    return jax.nn.one_hot(ids, like.shape[-1], dtype=jnp.float32)


def _others(losses: Array, answered: Array, weights: Array) -> Array:
    """Returns for each sample the weighted mean loss of the other answered ones, its own loss where there is none."""
    # Row by row without one's own: a sum less one's own cancels where that is nearly all of it.
    weights = jnp.where(jnp.eye(len(losses), dtype=bool), 0.0, answered * weights)  # [K, K]
    rest = weights.sum(1)
    return jnp.where(rest > 0, (weights * losses).sum(1) / jnp.where(rest > 0, rest, 1.0), losses)
