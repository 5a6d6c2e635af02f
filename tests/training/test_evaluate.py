import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear_box, vector_generator

from fedbbpt_jax.models.sentence_classifiers import EncodedText
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.training.evaluate import compile_evaluation, in_buckets, together
from fedbbpt_jax.types import Examples, PromptGenerator, Response

BOX = jax.tree_util.Partial(linear_box)


@pytest.mark.parametrize("chunk_size", [7, 60, 100])
def test_accuracy_and_loss_equal_numpy_for_every_chunk(vectors, chunk_size):
    """60 examples in chunks that divide them, do not, and exceed them; two models are averaged."""
    shifts = np.array([[0.0, 0, 0, 0], [-3, 1, 2, -1]], np.float32)
    evaluate = compile_evaluation(vector_generator(4), cross_entropy, chunk_size=chunk_size)
    found = evaluate(BOX, {"shift": jnp.asarray(shifts)}, vectors)

    losses, accuracies = [], []
    for shift in shifts:
        scores = (vectors.inputs + shift) + 0.3 * np.sin(vectors.inputs + shift)
        losses.append(np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(60), vectors.labels]))
        accuracies.append(np.mean(scores.argmax(1) == vectors.labels))
    assert found.accuracy == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.num_requests == 120


def test_prompts_may_depend_on_the_example(vectors):
    """A generator that is shown the label's one-hot and passes it on is always right."""
    told = vectors._replace(features=10 * np.eye(4, dtype=np.float32)[vectors.labels])
    generator = PromptGenerator(lambda key: jnp.zeros(()), lambda params, features: params * features)

    def box(query):
        return linear_box(query._replace(prompt=query.prompt[:, :, 0], inputs=query.inputs[:, :1]))

    evaluate = compile_evaluation(generator, cross_entropy, chunk_size=1)
    assert evaluate(jax.tree_util.Partial(box), jnp.ones(1), told).accuracy == 1
    assert evaluate(jax.tree_util.Partial(box), jnp.zeros(1), told).accuracy < 0.6


def test_texts_of_similar_length_together_give_the_same(vectors):
    """Of 60 texts of 1 to 30 tokens, padded to 32: the parts hold less padding, and every text once."""
    lengths = np.arange(60) % 30 + 1
    attended = np.arange(32) < lengths[:, None]
    ids = np.where(attended, np.random.default_rng(0).integers(1, 9, (60, 32)), 0).astype(np.int32)
    texts = Examples(EncodedText(ids, attended), np.zeros((60, 0), np.float32), vectors.labels)

    def box(query):
        means = (query.inputs.ids * query.inputs.attended).sum(-1) / query.inputs.attended.sum(-1)  # [C, B]
        scores = jnp.sin(means[:, None, :, None] * (1 + jnp.arange(4.0))) + query.prompt[:, :, None]
        return Response(scores, jnp.isfinite(scores).all(-1))

    evaluate = compile_evaluation(vector_generator(4), cross_entropy, chunk_size=7)
    params = {"shift": jnp.array([[0.0, 0, 0, 0], [0.3, 0, -0.2, 0]])}
    whole = evaluate(jax.tree_util.Partial(box), params, texts)
    parts = in_buckets(texts)
    assert sum(part.inputs.ids.size for part in parts) < 0.7 * ids.size
    found = together([evaluate(jax.tree_util.Partial(box), params, part) for part in parts])
    np.testing.assert_array_equal(found.confusion, whole.confusion)
    assert found.loss == pytest.approx(float(whole.loss), abs=1e-6)
    assert (found.num_requests, found.accuracy) == (whole.num_requests, whole.accuracy)


def test_vectors_are_one_part(vectors):
    (part,) = in_buckets(vectors)
    assert part is vectors
