"""The wall, and the classifier behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedbbpt_jax.black_box.frozen import clip_classifier, query_only
from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.models.loading import load_clip
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.types import Query


@pytest.fixture(scope="module")
def task():
    return load_task("sensor")


@pytest.fixture(scope="module")
def classifier(task):
    return clip_classifier(load_clip(MINI_CLIP), task.class_texts)


def query_of(task, prompt, num_clients=2, num_examples=3):
    inputs = jnp.asarray(task.test.inputs[: num_clients * num_examples]).reshape(num_clients, num_examples, 32, 32, 3)
    return Query(prompt, inputs)


def test_answers_equal_the_model_on_prompted_and_clipped_pixels(classifier, task, key):
    prompt = jax.random.normal(key, (2, 4, 32, 32, 3))
    query = query_of(task, prompt)
    response = query_only(classifier)(query)
    assert response.scores.shape == (2, 4, 3, 10)
    assert response.scores.dtype == jnp.float32
    assert response.valid.all()
    model = nnx.merge(classifier.graphdef, classifier.params)
    for c, k, b in [(0, 0, 0), (1, 3, 2), (0, 2, 1)]:
        pixels = np.clip(np.asarray(query.inputs[c, b]) + np.asarray(prompt[c, k]), 0, 1)
        np.testing.assert_allclose(response.scores[c, k, b], model(pixels[None])[0], rtol=1e-4, atol=1e-4)


def test_a_prompt_may_depend_on_the_example(classifier, task, key):
    prompt = 0.1 * jax.random.normal(key, (2, 4, 3, 32, 32, 3))
    together = classifier(query_of(task, prompt)).scores
    alone = classifier(Query(prompt[1:, 2:3, 0], query_of(task, prompt).inputs[1:, :1])).scores
    np.testing.assert_allclose(together[1, 2, 0], alone[0, 0, 0], rtol=1e-4, atol=1e-4)


def test_answers_do_not_depend_on_batch_mates(classifier, task):
    prompt = jnp.zeros((2, 1, 32, 32, 3))
    together = classifier(query_of(task, prompt)).scores
    alone = classifier(Query(prompt[:1], query_of(task, prompt).inputs[:1, :1])).scores
    np.testing.assert_allclose(together[0, 0, 0], alone[0, 0, 0], rtol=1e-4, atol=1e-4)


def test_a_score_that_is_not_finite_is_not_valid(classifier, task):
    prompt = jnp.zeros((2, 2, 32, 32, 3)).at[0, 1].set(jnp.nan)
    valid = classifier(query_of(task, prompt)).valid
    assert not valid[0, 1].any()
    assert valid.sum() == 9


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.jacrev], ids=["grad", "jacfwd", "jacrev"])
def test_has_no_gradient(classifier, task, transform):
    box = query_only(classifier)

    def loss(prompt):
        return box(query_of(task, prompt)).scores.sum()

    with pytest.raises(TypeError, match="queries only"):
        transform(loss)(jnp.zeros((2, 1, 32, 32, 3)))
    with pytest.raises(TypeError, match="queries only"):
        jax.jit(transform(loss))(jnp.zeros((2, 1, 32, 32, 3)))


def test_public_surface_gives_nothing_but_answers(classifier):
    box = query_only(classifier)
    assert [name for name in dir(box) if not name.startswith("_")] == []
    assert repr(box) == "QueryOnly()"


def test_a_query_has_room_for_a_prompt_and_inputs_only():
    """No labels, no parameters, no keys."""
    assert Query._fields == ("prompt", "inputs")


def test_weights_enter_a_compiled_program_as_arguments(classifier, task):
    """As constants they would be written into its text: 147,000 of the 180,000 weights would make over 1 MB."""
    box = query_only(classifier)
    query = query_of(task, jnp.zeros((2, 1, 32, 32, 3)))
    lowered = jax.jit(lambda box, query: box(query)).lower(box, query)
    assert len(lowered.as_text()) < 200_000
    assert len(jax.tree.leaves(box)) > 40
