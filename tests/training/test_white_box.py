"""Prompts by autodiff through the model: one party's, and a federation's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear_box, vector_generator

from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.training.white_box import compile_federated_white_box, compile_white_box

BOX = jax.tree_util.Partial(linear_box)


def test_white_box_finds_the_minimum_that_scipy_finds(vectors, key):
    from scipy.optimize import minimize

    def loss(shift):
        moved = vectors.inputs.astype("d") + shift
        scores = moved + 0.3 * np.sin(moved)
        return np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(60), vectors.labels])

    best = minimize(loss, np.zeros(4)).fun
    generator = vector_generator(4)
    tune = compile_white_box(generator, cross_entropy, num_steps=400, learning_rate=0.1)
    params = tune(BOX, generator.init(key), vectors)
    assert loss(np.zeros(4)) > best + 0.3
    assert loss(np.asarray(params["shift"], "d")) == pytest.approx(best, abs=1e-3)


def federated(num_rounds, local_steps):
    sizes = {"num_rounds": num_rounds, "local_steps": local_steps, "learning_rate": 0.1}
    return compile_federated_white_box(vector_generator(4), cross_entropy, **sizes)


@pytest.mark.parametrize("num_clients", [1, 3])
def test_clients_that_hold_the_same_are_one_party(vectors, key, num_clients):
    start = vector_generator(4).init(key)
    alone = compile_white_box(vector_generator(4), cross_entropy, num_steps=6, learning_rate=0.1)(BOX, start, vectors)
    found = federated(2, 3)(BOX, start, vectors, jnp.ones((num_clients, 60), bool))
    np.testing.assert_allclose(found["shift"], alone["shift"], atol=1e-5)


def test_clients_weigh_what_they_hold(vectors, key):
    """The first step of Adam is the step size times a sign: of each client its own, and then their mean."""
    held = np.arange(60) < 12
    start = vector_generator(4).init(key)

    def step_of(own):
        part = jax.tree.map(lambda x: x[own], vectors)
        one_step = compile_white_box(vector_generator(4), cross_entropy, num_steps=1, learning_rate=0.1)
        return one_step(BOX, start, part)["shift"] - start["shift"]

    found = federated(1, 1)(BOX, start, vectors, jnp.stack([held, ~held]))["shift"] - start["shift"]
    np.testing.assert_allclose(found, 0.2 * step_of(held) + 0.8 * step_of(~held), atol=1e-5)
    assert not np.allclose(step_of(held), step_of(~held), atol=0.01)
