r"""A black box is asked before a run: what it is like, and which perturbation size suits its answers.

The error of a two-sided slope has two parts, that of the answers and that of curvature,

$$\\frac{\\sigma^2}{2 c^2} + \\left(\\frac{c^2}{6} f'''\\right)^2,$$

with σ the deviation of the mean loss of a minibatch, from noise and rounding together, and $f'''$ the third
derivative along a direction, which slopes of two sizes tell apart. Their sum is least at $c = (3 σ / |f'''|)^{1/3}$.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbbpt_jax.black_box.probe import NUM_REPEATS, NUM_TOGETHER, Character, probe
from fedbbpt_jax.estimators.directions import rademacher
from fedbbpt_jax.estimators.theory import best_two_sided_size
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.load import prompt_sizes
from fedbbpt_jax.training.prepare import Setup, prepare
from fedbbpt_jax.training.served import asking
from fedbbpt_jax.types import BlackBox, Examples, Method, Params, Query

NUM_DIRECTIONS, SIZES, NUM_DRAWS = 4, (0.05, 0.1), 64
SMALLEST, LARGEST = 1e-3, 0.3


class Probed(NamedTuple):
    """What was found.

    Attributes:
      character: of the box.
      loss_deviation: σ, of the mean loss of a minibatch of the experiment, nats.
      num_requests: that it all took.
      third_derivative: root mean square along a direction, nats per parameter unit cubed; None for words.
      perturbation_size: c, in parameter units, between SMALLEST and LARGEST; None for words.
      num_tops: the fewest first tokens that a language model told of; None where it is asked otherwise.
    """

    character: Character
    loss_deviation: float
    num_requests: int
    third_derivative: float | None = None
    perturbation_size: float | None = None
    num_tops: int | None = None


def probe_setup(setup: Setup) -> Probed:
    """Returns what the black box of an experiment is like, and the perturbation size that suits it.

    Asked at the start of the prompt generator, or with words drawn at random, about training examples of all clients.

    Raises:
      ValueError: there are fewer than 8 training examples, or prompts differ between examples.
      QueryFailedError: the box does not answer.
    """
    e, method = setup.experiment, setup.programs.method
    if e.generator == "coordinator":
        raise ValueError("a probe moves one prompt for all examples, got --generator coordinator")
    examples = jax.tree.map(lambda x: np.asarray(x[:NUM_REPEATS]), setup.task.train)
    start, key = method.generator.init(jax.random.key(e.seed)), jax.random.key(e.seed)
    # In this process the box is compiled; a served model cannot be.
    box = jax.jit(lambda query: setup.box(query)) if setup.ledger is None else setup.box
    if e.generator == "tokens":
        words = np.array(prompt_sizes(e, setup.task).vocabulary, np.int32)
        prompts = np.random.default_rng(e.seed).choice(words, (NUM_TOGETHER, e.text.prompt_length))
        character = probe(box, prompts, examples.inputs)
        sigma = _loss_deviation(method, box, prompts[:1], examples, character, e.batch_size)
        num_requests = character.num_requests + len(examples.labels)
        return Probed(character, sigma, num_requests, num_tops=getattr(box, "num_tops", None))
    generate = jax.jit(jax.vmap(method.generator.generate, (0, None)))

    def prompts_of(points: Params) -> np.ndarray:
        return np.asarray(generate(points, examples.features))

    points = jax.vmap(lambda k: _moved(start, jax.random.fold_in(key, k), SIZES[0]))(jnp.arange(NUM_TOGETHER))
    character = probe(box, prompts_of(points), examples.inputs)
    sigma = _loss_deviation(method, box, prompts_of(points)[:1], examples, character, e.batch_size)
    third = _third_derivative(method, box, prompts_of, start, key, examples)
    size = best_two_sided_size(sigma**2 / 2, max(third / 6, 1e-9) ** 2)
    slopes = 2 * len(SIZES) * NUM_DIRECTIONS + 1
    num_requests = character.num_requests + slopes * len(examples.labels)
    return Probed(character, sigma, num_requests, third, float(np.clip(size, SMALLEST, LARGEST)))


def _moved(start: Params, key: Any, size: Any) -> Params:
    return jax.tree.map(lambda x, y: x + size * y, start, rademacher().sample(key, 0, start))


def _mean_losses(method: Method, scores: Any, labels: Any) -> np.ndarray:
    """Returns mean losses `[K]` of scores `[K, B, N]`, rows without an answer left out."""
    losses = np.asarray(method.objective(jnp.asarray(scores), jnp.broadcast_to(jnp.asarray(labels), scores.shape[:2])))
    return np.nanmean(losses, 1)


def _ask(box: BlackBox, prompts: np.ndarray, examples: Examples) -> np.ndarray:
    response = box(Query(prompts[None], jax.tree.map(lambda x: x[None], examples.inputs)))
    return np.where(np.asarray(response.valid)[..., None], np.asarray(response.scores), np.nan)[0]


def _loss_deviation(
    method: Method, box: BlackBox, prompt: np.ndarray, examples: Examples, character: Character, batch_size: int
) -> float:
    """Returns the deviation of a minibatch's mean loss, by drawing noise and rounding errors anew."""
    scores, rng = _ask(box, prompt, examples), np.random.default_rng(0)
    shape = (NUM_DRAWS, *scores.shape[1:])
    noisy = scores + character.noise * rng.standard_normal(shape) + character.quantum * rng.uniform(-0.5, 0.5, shape)
    of_eight = _mean_losses(method, noisy.astype(np.float32), examples.labels).std(ddof=1)
    exact = float(np.finfo(np.float32).eps) * float(np.abs(_mean_losses(method, scores, examples.labels)).max())
    return max(float(of_eight) * (len(examples.labels) / batch_size) ** 0.5, exact)


def _third_derivative(
    method: Method, box: BlackBox, prompts_of: Any, start: Params, key: Any, examples: Examples
) -> float:
    """Returns the root mean square of third derivatives along directions, from slopes of two sizes."""
    slopes = np.zeros((len(SIZES), NUM_DIRECTIONS))
    for i, size in enumerate(SIZES):
        ks = jnp.arange(NUM_DIRECTIONS) + NUM_TOGETHER
        points = [jax.vmap(lambda k, c=c: _moved(start, jax.random.fold_in(key, k), c))(ks) for c in (size, -size)]
        above, below = (
            _mean_losses(method, _ask(box, prompts_of(point), examples), examples.labels) for point in points
        )
        slopes[i] = (above - below) / (2 * size)
    small, large = SIZES
    return float(np.sqrt(np.mean((6 * (slopes[1] - slopes[0]) / (large**2 - small**2)) ** 2)))


def probed(experiment: Experiment) -> Probed:
    """Returns what `probe_setup` finds of an experiment's black box, in this process or served.

    Raises:
      ValueError, TaskError, CheckpointError: the experiment cannot be run as described.
      QueryFailedError: the box does not answer.
    """
    with asking(experiment, None) as served:
        return probe_setup(prepare(experiment, served))
