"""The nouns of the project. Everything else makes one of these or connects them.

Axes: C clients · K candidates per client and step · T local steps · B examples · N classes · d flat parameters ·
R rounds. An optimizer never calls the black box: it *asks* for candidates, something else *evaluates* them, and it is
*told* their losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jax import Array

PyTree = Any
Metric = Literal["accuracy", "f1", "macro-f1", "matthews"]
Params = PyTree
Schedule = Callable[[Array], Array]
ScalarOrSchedule = float | Array | Schedule


class Query(NamedTuple):
    """All that crosses the boundary: no labels, no parameters, no keys.

    Attributes:
      prompt: `[C, K, ...]`, or `[C, K, B, ...]` where it depends on the input.
      inputs: `[C, B, ...]`, shared by the K candidates of a client (common random numbers).
    """

    prompt: PyTree
    inputs: PyTree


class Response(NamedTuple):
    """What a black box answers.

    Attributes:
      scores: class scores or log-probabilities, float32 `[C, K, B, N]`.
      valid: bool `[C, K, B]`, False where no usable answer came.
    """

    scores: Array
    valid: Array


class BlackBox(Protocol):
    """Answers queries. In-process boxes are pytrees whose weights are leaves, so that they enter `jit` as arguments."""

    def __call__(self, query: Query, /) -> Response:
        """Returns the response to a query."""
        ...


class Objective(Protocol):
    """Per-example loss, float32 `[...]`, of scores `[..., N]` and labels int32 `[...]`. Labels stay with the client."""

    def __call__(self, scores: Array, labels: Array, /) -> Array:
        """Returns the loss of each example."""
        ...


class Examples(NamedTuple):
    """Data of one client, one batch or one split; any leading axes.

    Attributes:
      inputs: what the black box is sent beside the prompt, `[..., B, ...]`.
      features: what a prompt generator sees of the inputs, computed once, `[..., B, F]`.
      labels: int32 `[..., B]`.
    """

    inputs: PyTree
    features: Any
    labels: Any


class Task(NamedTuple):
    """Few-shot data of one seed, and the words that name its classes.

    Attributes:
      name: as in the table of tasks, or of the folder that the data came from.
      class_names: N short names, in the order of the labels.
      templates: texts with one `{}` each, where a class name goes; for pictures only.
      train: the shots, to be split among clients.
      validation: for choices; disjoint from `train`.
      test: for one report at the end; the same for every seed.
      clean_test_inputs: the test images `[n, H, W, 3]` without the shift, where one was applied; for pictures only.
      train_clients: whose each example of `train` is, names or numbers `[n]`, where the data say so and were asked.
      metric: what is reported, a name of `training/metrics.py`.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples
    clean_test_inputs: np.ndarray | None = None
    train_clients: np.ndarray | None = None
    metric: Metric = "accuracy"

    @property
    def image_size(self) -> int:
        """H = W, pixels; 0 where inputs are no pictures."""
        return self.train.inputs.shape[1] if getattr(self.train.inputs, "ndim", 0) == 4 else 0

    @property
    def feature_size(self) -> int:
        """F, the width of what a prompt generator sees of an input."""
        return self.train.features.shape[-1]


class Cohort(NamedTuple):
    """Who takes part in a round and on what.

    Attributes:
      ids: int32 `[C]`; keys are derived from ids, never from positions.
      weights: float32 `[C]`; 0 is padding, which asks nothing and counts for nothing.
      rows: of the clients' examples, int32 `[C, T, B]`; whoever evaluates takes the examples themselves, so that those
        of a whole round are never in memory at once.
    """

    ids: Array
    weights: Array
    rows: Array


class PromptGenerator(NamedTuple):
    """Parameters (and features of the inputs) to prompt.

    Attributes:
      init: `key -> params`.
      generate: `(params, features [B, F]) -> prompt`, `[...]` or `[B, ...]`.
    """

    init: Callable[[Array], Params]
    generate: Callable[[Params, Array], PyTree]


class EstimateInfo(NamedTuple):
    """What a researcher wants to see of one estimate; scalars.

    Attributes:
      loss: mean of the valid losses, nats.
      gradient_norm: Euclidean norm of the estimate.
      num_directions: directions that had at least one complete answer.
    """

    loss: Array
    gradient_norm: Array
    num_directions: Array


class Estimator(NamedTuple):
    """Losses at perturbed points to a descent direction. Asking is lazy: candidate k is a function of key, state and k.

    Attributes:
      init: `params -> state`.
      perturb: `(key, state, params, k) -> candidate params`.
      estimate: `(key, state, params, losses [K, B], valid [K, B]) -> (gradient, state, EstimateInfo)`.
      num_candidates: K.
    """

    init: Callable[[Params], PyTree]
    perturb: Callable[[Array, PyTree, Params, Array], Params]
    estimate: Callable[[Array, PyTree, Params, Array, Array], tuple[Params, PyTree, EstimateInfo]]
    num_candidates: int


class Optimizer(NamedTuple):
    """The client's optimizer.

    Attributes:
      init: `params -> state`.
      ask: `(key, state, k) -> candidate params`.
      tell: `(key, state, losses [K, B], valid [K, B]) -> (state, EstimateInfo)`.
      solution: `state -> params`.
      num_candidates: K.
    """

    init: Callable[[Params], PyTree]
    ask: Callable[[Array, PyTree, Array], Params]
    tell: Callable[[Array, PyTree, Array, Array], tuple[PyTree, EstimateInfo]]
    solution: Callable[[PyTree], Params]
    num_candidates: int


Total = Callable[[Array], Array]
"""Sums `[C, ...]` over all clients: over the leading axis on one device, and across devices where there are more."""


class Federation(NamedTuple):
    """How client states come together. A client state is an optimizer's state.

    Attributes:
      init: `client state -> server state`.
      broadcast: `(server state, ids [C]) -> client states [C, ...]`.
      aggregate: `(server state, ids [C], client states [C, ...], weights [C], total) -> server state`.
      outcomes: `server state -> client states [M, ...]`, the M models to evaluate (one, unless clients stay apart).
      payload_bytes: `client state -> (downlink, uplink)`, bytes per client and round.
      report: `(client state, losses [B], valid [B]) -> client state`, told at the end of a round what each client's
        solution costs on its last minibatch; None where nobody wants to know, and nothing is asked.
    """

    init: Callable[[PyTree], PyTree]
    broadcast: Callable[[PyTree, Array], PyTree]
    aggregate: Callable[[PyTree, Array, PyTree, Array, Total], PyTree]
    outcomes: Callable[[PyTree], PyTree]
    payload_bytes: Callable[[PyTree], tuple[int, int]]
    report: Callable[[PyTree, Array, Array], PyTree] | None = None


def as_it_is(key: Array, examples: Examples) -> Examples:
    """Returns a minibatch as it is."""
    del key
    return examples


class Method(NamedTuple):
    """The choices that make a federated black-box prompt tuning method.

    Attributes:
      generator: parameters to prompts.
      objective: scores and labels to losses.
      optimizer: of each client.
      federation: how clients come together.
      view: `(key, minibatch [B]) -> [B']`, what is asked about in its place, such as itself and a spoilt copy; all
        candidates of a step are asked about the same.
    """

    generator: PromptGenerator
    objective: Objective
    optimizer: Optimizer
    federation: Federation
    view: Callable[[Array, Examples], Examples] = as_it_is
