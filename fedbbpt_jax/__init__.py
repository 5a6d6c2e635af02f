"""Federated black-box prompt tuning and zeroth-order gradient estimators, in JAX.

An optimizer asks (candidate parameters), something else evaluates them (prompts, queries, losses), it is told the
losses. A federated round is a pipeline of pure stages with one hole, the evaluation. See the README.
"""

from fedbbpt_jax.black_box.frozen import clip_classifier, masked_lm_classifier, query_only
from fedbbpt_jax.black_box.sentences import label_classifier, sentence_classifier
from fedbbpt_jax.data.client_shifts import shift_clients
from fedbbpt_jax.data.ngrams import candidate_tokens, pmi_ngrams
from fedbbpt_jax.data.partition import (
    by_column,
    dirichlet,
    dirichlet_quantity,
    find_partition,
    iid,
    pathological,
    power_law,
)
from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.data.text_encoding import encode_masked, encode_sentences, encode_task
from fedbbpt_jax.data.text_tasks import load_text_task
from fedbbpt_jax.data.token_noise import with_replaced_words
from fedbbpt_jax.estimators.catalogue import ESTIMATORS, find_estimator
from fedbbpt_jax.estimators.directions import (
    Directions,
    coordinate,
    gaussian,
    rademacher,
    segmented_uniform,
    segmented_uniform_projection,
    sparse,
    sphere,
)
from fedbbpt_jax.estimators.guided import guided_spsa
from fedbbpt_jax.estimators.policy_gradient import bdpl, policy_gradient
from fedbbpt_jax.estimators.quadratic import quadratic_landscape
from fedbbpt_jax.estimators.reduction import (
    with_anchor,
    with_averaging,
    with_control_variate,
    with_shaped_losses,
    with_transformation,
)
from fedbbpt_jax.estimators.spsa import one_sided_spsa, residual_feedback, spsa
from fedbbpt_jax.estimators.structured import hadamard, lattice, low_rank, orthogonal, subspace
from fedbbpt_jax.estimators.variance import (
    Landscape,
    Measurement,
    best_perturbation_size,
    draw_trials,
    measure,
    measure_sizes,
)
from fedbbpt_jax.federated.averaging import (
    is_optimizer_state,
    is_personal,
    isolated,
    partly_shared,
    weighted_mean,
    weighted_mean_of_params,
)
from fedbbpt_jax.federated.cma import fedbpt, fedbpt_client
from fedbbpt_jax.federated.cohort import ClientData, draw_cohort, pack
from fedbbpt_jax.federated.host import host_rounds
from fedbbpt_jax.federated.mesh import make_mesh, place_clients, replicate
from fedbbpt_jax.federated.participation import (
    Participation,
    uniform_cohort,
    weighted_cohort,
    with_availability,
    with_dropout,
    with_equal_weights,
)
from fedbbpt_jax.federated.placement import compile_rounds, shard_rounds, sweep_rounds
from fedbbpt_jax.federated.round import RoundInfo, federated_round
from fedbbpt_jax.federated.server_optimizers import fedadam, fedavgm, fedyogi, with_server_optimizer
from fedbbpt_jax.federated.streaming import stream_rounds
from fedbbpt_jax.models.features import vit_features
from fedbbpt_jax.models.loading import load_bert, load_clip, load_roberta, load_vit
from fedbbpt_jax.models.sentence_classifiers import embed_sentences
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.optimizers.cma_es import cma_es
from fedbbpt_jax.optimizers.descent import descent, spsa_gc_perturbation_size, spsa_gc_transformation
from fedbbpt_jax.optimizers.evosax_adapter import from_evosax
from fedbbpt_jax.optimizers.layer_by_layer import layer_by_layer
from fedbbpt_jax.optimizers.perturbed_loss import with_perturbed_loss
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.prompts.coordinator import coordinator
from fedbbpt_jax.prompts.module import from_module
from fedbbpt_jax.prompts.personal import personal
from fedbbpt_jax.prompts.pixels import frame, full_overlay, low_resolution_overlay
from fedbbpt_jax.prompts.soft import draw_projection, intrinsic, projected
from fedbbpt_jax.prompts.tokens import on_simplex, project_to_simplex, tokens
from fedbbpt_jax.training.evaluate import compile_evaluation
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.run import run
from fedbbpt_jax.types import (
    BlackBox,
    Cohort,
    EstimateInfo,
    Estimator,
    Examples,
    Federation,
    Method,
    Objective,
    Optimizer,
    PromptGenerator,
    Query,
    Response,
    Task,
)
