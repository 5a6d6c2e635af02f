"""The parts of a method, made from the names that an experiment gives them."""

from __future__ import annotations

from typing import NamedTuple

import optax

from fedbbpt_jax.data.token_noise import with_replaced_words
from fedbbpt_jax.estimators.catalogue import find_estimator
from fedbbpt_jax.estimators.directions import segmented_uniform
from fedbbpt_jax.estimators.policy_gradient import bdpl, gumbel, leave_one_out, logits, policy_gradient
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.federated.averaging import (
    is_optimizer_state,
    is_personal,
    isolated,
    partly_shared,
    weighted_mean,
    weighted_mean_of_params,
)
from fedbbpt_jax.federated.cma import fedbpt, fedbpt_client, report, report_ratio
from fedbbpt_jax.federated.participation import (
    Participation,
    read_availability,
    uniform_cohort,
    weighted_cohort,
    with_availability,
    with_dropout,
    with_equal_weights,
)
from fedbbpt_jax.federated.server_optimizers import SERVER_OPTIMIZERS, with_server_optimizer
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.optimizers.cma_es import cma_es
from fedbbpt_jax.optimizers.descent import descent, spsa_gc_perturbation_size, spsa_gc_transformation
from fedbbpt_jax.optimizers.layer_by_layer import layer_by_layer
from fedbbpt_jax.optimizers.perturbed_loss import with_perturbed_loss
from fedbbpt_jax.prompts.coordinator import BLACKVIP_CHANNELS, SMALL_CHANNELS, coordinator
from fedbbpt_jax.prompts.personal import personal
from fedbbpt_jax.prompts.pixels import frame, full_overlay, low_resolution_overlay
from fedbbpt_jax.prompts.soft import intrinsic
from fedbbpt_jax.prompts.tokens import at_least, on_simplex, tokens
from fedbbpt_jax.training.experiment import EVOLUTION, SPSA_GC, ResolvedExperiment
from fedbbpt_jax.types import Estimator, Federation, Method, Optimizer, PromptGenerator


class PromptSizes(NamedTuple):
    """What a prompt has to fit.

    Attributes:
      image_size: H = W of pictures, pixels.
      feature_size: F, the width of what a generator sees of an input.
      vocabulary: token ids, of which a discrete prompt is made.
      num_tokens: of the model, where words are replaced.
      special_tokens: those among them that are not.
      num_layers: L, of the model, where each has a prompt.
    """

    image_size: int
    feature_size: int
    vocabulary: tuple[int, ...] = ()
    num_tokens: int = 0
    special_tokens: tuple[int, ...] = ()
    num_layers: int = 0


def build_method(experiment: ResolvedExperiment, sizes: PromptSizes) -> Method:
    """Returns the method that a resolved experiment describes, for a task of these sizes."""
    generator = build_generator(experiment, sizes)
    if experiment.federation == "personal":
        generator = personal(generator)
    optimizer = build_optimizer(experiment)
    method = Method(generator, cross_entropy, optimizer, build_federation(experiment, optimizer))
    if not experiment.text.replaced:
        return method
    return method._replace(view=with_replaced_words(experiment.text.replaced, sizes.num_tokens, sizes.special_tokens))


def build_generator(experiment: ResolvedExperiment, sizes: PromptSizes) -> PromptGenerator:
    """Returns the prompt generator for a task of these sizes."""
    size = sizes.image_size
    match experiment.generator:
        case "low-resolution":
            return low_resolution_overlay(size, resolution=8)
        case "full":
            return full_overlay(size)
        case "frame":
            return frame(size, width=max(1, round(size * 30 / 224)))  # BlackVIP's 30 of 224 pixels
        case "coordinator":
            return coordinator(size, sizes.feature_size, SMALL_CHANNELS if size < 224 else BLACKVIP_CHANNELS)
        case "soft":
            return intrinsic(experiment.text.intrinsic_dim)
        case "deep":
            return intrinsic(sizes.num_layers, experiment.text.intrinsic_dim)
        case "tokens":
            start = {"policy-gradient": None, "policy-gradient-logits": 0.0, "policy-gradient-gumbel": 1.0}
            return tokens(sizes.vocabulary, experiment.text.prompt_length, start[experiment.estimator])
        case other:
            raise ValueError(f"no generator is called {other!r}")


def build_optimizer(experiment: ResolvedExperiment) -> Optimizer:
    """Returns the client's optimizer of a resolved experiment."""
    e = experiment
    if e.optimizer in EVOLUTION:
        strategy = cma_es(e.num_directions, e.perturbation_size)
        strategy = with_perturbed_loss(strategy) if e.text.replaced else strategy
        if e.generator == "deep":
            return layer_by_layer(strategy)
        return fedbpt_client(strategy) if e.optimizer == "fedbpt" else strategy
    if e.estimator == SPSA_GC:
        return descent(build_estimator(e), spsa_gc_transformation(e.lr))
    rate = optax.cosine_decay_schedule(e.lr, e.num_rounds * e.local_steps, alpha=0.3)
    tx = optax.adam(rate, b2=0.99) if e.optimizer == "adam" else optax.sgd(rate)
    bounds = {"policy-gradient": on_simplex(), "policy-gradient-gumbel": at_least(1e-3)}
    return descent(build_estimator(e), optax.chain(tx, bounds[e.estimator]) if e.estimator in bounds else tx)


def build_federation(experiment: ResolvedExperiment, optimizer: Optimizer) -> Federation:
    """Returns how the states of clients with this optimizer come together."""
    e = experiment
    if e.optimizer == "fedbpt":
        federation = fedbpt(e.num_clients, e.cohort, e.num_directions)
        return federation._replace(report=report_ratio if e.text.replaced else report)
    match e.federation, e.client_state:
        case "isolated", _:
            return isolated(e.num_clients)
        case "personal", _:
            federation = partly_shared(e.num_clients, is_personal)
        case _, "averaged":
            federation = weighted_mean()
        case _, "reset":
            federation = weighted_mean_of_params(optimizer)
        case _, "kept":
            federation = partly_shared(e.num_clients, is_optimizer_state)
    if e.server_optimizer == "none":
        return federation
    return with_server_optimizer(federation, SERVER_OPTIMIZERS[e.server_optimizer](e.server_lr))


def build_participation(experiment: ResolvedExperiment) -> Participation:
    """Returns who takes part in a round."""
    e = experiment
    participation = uniform_cohort(e.cohort) if e.sampling == "uniform" else weighted_cohort(e.cohort)
    if e.weighting == "equal":
        participation = with_equal_weights(participation)
    if e.availability is not None:
        participation = with_availability(participation, read_availability(e.availability, e.num_clients))
    return with_dropout(participation, e.dropout) if e.dropout else participation


def build_estimator(experiment: ResolvedExperiment) -> Estimator:
    """Returns the gradient estimator of a resolved experiment."""
    e = experiment
    match e.estimator:
        case "policy-gradient":
            return bdpl(e.num_directions)
        case "policy-gradient-logits":
            return policy_gradient(logits(), e.num_directions, leave_one_out)
        case "policy-gradient-gumbel":
            return policy_gradient(gumbel(1.0), e.num_directions, leave_one_out)
    if e.estimator == SPSA_GC:
        return spsa(segmented_uniform(), e.num_directions, spsa_gc_perturbation_size(e.perturbation_size))
    return find_estimator(e.estimator).build(e.num_directions, e.perturbation_size)
