"""The examples in docstrings run and print what they say; every public factory has one."""

import doctest
import importlib
import pkgutil

import pytest

import fedbbpt_jax

MODULES = sorted(m.name for m in pkgutil.walk_packages(fedbbpt_jax.__path__, "fedbbpt_jax."))
FACTORIES = {
    "black_box.faults": ["exact", "rounded", "bfloat16", "float16", "noisy"],
    "black_box.ledger.ledger": ["open_ledger"],
    "black_box.client.text_api": ["chat", "completions"],
    "black_box.rows": ["in_rows"],
    "estimators.catalogue": ["find_estimator"],
    "estimators.directions": [
        "rademacher",
        "gaussian",
        "sphere",
        "segmented_uniform",
        "segmented_uniform_projection",
        "coordinate",
        "sparse",
    ],
    "estimators.guided": ["guided_spsa"],
    "estimators.policy_gradient": [
        "policy_gradient",
        "bdpl",
        "probabilities",
        "probabilities_negative",
        "probabilities_normalized",
        "probabilities_constrained",
        "logits",
        "gumbel",
    ],
    "estimators.reduction": [
        "with_transformation",
        "with_control_variate",
        "with_anchor",
        "with_averaging",
        "with_shaped_losses",
        "clipped",
        "trimmed",
    ],
    "estimators.quadratic": ["quadratic_landscape"],
    "estimators.spsa": ["spsa", "one_sided_spsa", "residual_feedback"],
    "estimators.structured": ["orthogonal", "hadamard", "low_rank", "subspace", "lattice"],
    "estimators.variance": ["measure"],
    "federated.averaging": ["weighted_mean", "weighted_mean_of_params", "partly_shared", "isolated"],
    "federated.cma": ["fedbpt", "fedbpt_client", "with_sent_covariance"],
    "federated.server_optimizers": ["with_server_optimizer", "fedavgm", "fedadam", "fedyogi"],
    "federated.participation": [
        "uniform_cohort",
        "weighted_cohort",
        "with_equal_weights",
        "with_dropout",
        "with_availability",
    ],
    "optimizers.cma_es": ["cma_es"],
    "optimizers.descent": ["descent"],
    "optimizers.perturbed_loss": ["with_perturbed_loss"],
    "prompts.coordinator": ["coordinator"],
    "prompts.personal": ["personal"],
    "prompts.soft": ["intrinsic", "draw_projection", "projected"],
    "prompts.tokens": ["tokens", "on_simplex", "project_to_simplex"],
    "prompts.pixels": ["full_overlay", "low_resolution_overlay", "frame"],
    "data.client_shifts": ["shift_clients"],
    "data.contingency": ["apportion", "draw_without_replacement", "traded"],
    "data.buckets": ["plan_buckets"],
    "data.ngrams": ["pmi_ngrams"],
    "data.token_noise": ["corrupt_tokens"],
    "data.partition": [
        "find_partition",
        "iid",
        "dirichlet",
        "dirichlet_quantity",
        "pathological",
        "power_law",
        "by_column",
    ],
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    # Examples use the names that their module has, and JAX's by convention.
    names = {**vars(module), "jax": importlib.import_module("jax"), "jnp": importlib.import_module("jax.numpy")}
    outcome = doctest.testmod(module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0


@pytest.mark.parametrize(("module", "factory"), [(m, f) for m, factories in FACTORIES.items() for f in factories])
def test_factories_have_an_example(module, factory):
    found = getattr(importlib.import_module(f"fedbbpt_jax.{module}"), factory)
    assert doctest.DocTestFinder().find(found)[0].examples
