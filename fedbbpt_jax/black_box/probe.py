"""What a black box is like to ask: about 60 evaluations before a run, so that nothing of it comes as a surprise.

A query is never repeated as it is, which a server with a memory would answer from there: the same examples are asked
about in another order.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import numpy as np

from fedbbpt_jax.types import BlackBox, PyTree, Query

NUM_REPEATS, NUM_TOGETHER = 8, 8
CONCURRENCIES = (1, 2, 4, 8)
_FLOAT32, _FLOAT16, _BFLOAT16 = 2.0**-24, 2.0**-11, 2.0**-8


class Character(NamedTuple):
    """What was found.

    Attributes:
      noise: standard deviation of a score when the same is asked again.
      num_distinct: most different answers that one question had, of NUM_REPEATS.
      quantum: what scores are multiples of; of floating-point numbers, the step between those of their size.
      alone_or_together: largest difference of a score between a prompt that is asked alone and among others.
      order: largest difference of a score between prompts in one order and in the reverse.
      unusable: share of rows without a usable answer.
      seconds: median of a message of one prompt.
      concurrency: messages at once beyond which more in flight answer no faster, of CONCURRENCIES.
      num_evaluations: prompts tried on a minibatch.
      num_requests: prompts tried on an example.
    """

    noise: float
    num_distinct: int
    quantum: float
    alone_or_together: float
    order: float
    unusable: float
    seconds: float
    concurrency: int
    num_evaluations: int
    num_requests: int


def probe(box: BlackBox, prompts: np.ndarray, inputs: PyTree) -> Character:
    """Returns what a black box is like to ask; it is called on the host, as a served model is.

    Args:
      box: answers queries.
      prompts: NUM_TOGETHER different ones, `[K, ...]`, for any example.
      inputs: `[B, ...]`; NUM_REPEATS examples or more.

    Raises:
      ValueError: there are fewer prompts or examples than that.
    """
    num_examples = len(jax.tree.leaves(inputs)[0])
    if len(prompts) != NUM_TOGETHER or num_examples < NUM_REPEATS:
        found = f"{len(prompts)} and {num_examples}"
        raise ValueError(f"expected {NUM_TOGETHER} prompts and at least {NUM_REPEATS} examples, got {found}")
    seconds: list[float] = []

    def ask(some: np.ndarray, turn: int) -> np.ndarray:
        """Returns scores `[K, B, N]`, NaN if unusable; each turn the examples are asked about in another order."""
        started = time.perf_counter()
        response = box(Query(some[None], jax.tree.map(lambda x: np.roll(x, turn, 0)[None], inputs)))
        scores = np.where(np.asarray(response.valid)[..., None], np.asarray(response.scores), np.nan)[0]
        seconds.append(time.perf_counter() - started)
        return np.roll(scores, -turn, 1)

    repeats = np.concatenate([ask(prompts[:1], turn) for turn in range(NUM_REPEATS)])
    alone = np.concatenate([repeats[:1], *(ask(prompts[k : k + 1], 1) for k in range(1, NUM_TOGETHER))])
    median = float(np.median(seconds[1:]))  # without the first, which may compile
    together, reverse = ask(prompts, 0), ask(prompts[::-1], 0)[::-1]
    everything = np.concatenate([repeats, alone[1:], together, reverse])
    num_evaluations = len(everything) + sum(CONCURRENCIES)
    return Character(
        noise=float(np.nan_to_num(np.nanstd(repeats.astype(np.float64), 0, ddof=1)).max()),
        num_distinct=max(len(np.unique(answers)) for answers in repeats.reshape(NUM_REPEATS, -1).T),
        quantum=quantum(together[np.isfinite(together)]),
        alone_or_together=_largest(together - alone),
        order=_largest(together - reverse),
        unusable=float(np.isnan(everything).any(-1).mean()),
        seconds=median,
        concurrency=_concurrency(box, prompts, inputs),
        num_evaluations=num_evaluations,
        num_requests=num_evaluations * num_examples,
    )


def quantum(scores: np.ndarray) -> float:
    """Returns what scores are multiples of: a power of ten, or else the step of the floating-point type they come from.

    Example:
      >>> quantum(np.array([1.25, -0.5, 3.0], np.float32)), quantum(np.array([100.5, 3.015625]))
      (0.01, 0.392578125)
    """
    scores = scores.astype(np.float64)
    largest = np.abs(scores).max(initial=0.0)
    for step in 10.0 ** -np.arange(7):
        blur = largest * _FLOAT32 / step  # how well float32 can tell multiples
        if blur < 0.25 and np.abs(scores / step - np.round(scores / step)).max(initial=0.0) <= blur + 1e-6:
            return float(step)
    for relative in (_BFLOAT16, _FLOAT16):
        mantissa, _ = np.frexp(scores)
        if np.array_equal(mantissa / relative, np.round(mantissa / relative)):
            return float(largest * relative)
    return float(largest * _FLOAT32)


def _largest(differences: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(differences)).max(initial=0.0))


def _concurrency(box: BlackBox, prompts: np.ndarray, inputs: PyTree) -> int:
    """Returns the fewest messages at once that are answered nearly as fast as the best number of them."""
    questions = iter([(k, turn) for turn in range(2, NUM_REPEATS) for k in range(1, NUM_TOGETHER)])  # not asked before
    rates = {}
    for number in CONCURRENCIES:
        chosen = [next(questions) for _ in range(number)]
        rolled = [jax.tree.map(lambda x, t=turn: np.roll(x, t, 0), inputs) for _, turn in chosen]
        query = Query(np.stack([prompts[k : k + 1] for k, _ in chosen]), jax.tree.map(lambda *x: np.stack(x), *rolled))
        started = time.perf_counter()
        np.asarray(box(query).scores)
        rates[number] = number / (time.perf_counter() - started)
    return next(number for number, rate in rates.items() if rate >= 0.9 * max(rates.values()))
