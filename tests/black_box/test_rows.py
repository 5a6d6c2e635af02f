"""An answer does not depend on what else is asked: bitwise, for random orders, companies and sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_frozen import make, make_query, random_network
from transformers import BertConfig

from fedbbpt_jax.black_box.frozen import clip_classifier, query_only
from fedbbpt_jax.black_box.rows import cut_query, in_rows, parts_of, row_program
from fedbbpt_jax.black_box.sentences import label_classifier
from fedbbpt_jax.models.bert import BertEncoder
from fedbbpt_jax.models.loading import PretrainedText, load_clip
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.types import Query, Response

NUM_ROWS = 5
KINDS = ("mini-clip", "image", "words", "embeddings", "labels")


def first(query, block=1):
    """Returns the query of one row, as shapes and types."""
    return Query(
        np.zeros_like(query.prompt[:1, :1]), jax.tree.map(lambda x: np.zeros_like(x[:1, :block]), query.inputs)
    )


class Words:
    """A tokenizer of class texts, a letter a token."""

    def __call__(self, texts, **_):
        ids = np.array([[1, *(ord(c) % 40 + 3 for c in text), 2] for text in texts], np.int32)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@functools.cache
def asked(kind):
    """Returns a box, a query of it and one row of that."""
    rng = np.random.default_rng(1)
    if kind == "mini-clip":
        box = clip_classifier(load_clip(MINI_CLIP), ("zero", "one", "two"), ("the digit {}",))
        prompts = rng.normal(0, 0.2, (2, 3, 32, 32, 3)).astype(np.float32)
        query = Query(prompts, rng.random((2, 4, 32, 32, 3)).astype(np.float32))
    elif kind == "labels":
        config = BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=20,
        )  # fmt: skip
        box = label_classifier(PretrainedText(*random_network(BertEncoder, config), Words()), ("ab", "cd", "xy"))
        query = Query(*(rng.normal(size=(2, 3, *own)).astype(np.float32) for own in ((3, 32), (32,))))
    else:
        box, query = make(kind if kind == "image" else "texts"), make_query(kind)
    return query_only(box), query, first(query, 2 if kind == "labels" else 1)


@functools.cache
def asker(kind):
    box, _, like = asked(kind)
    return in_rows(box, like, NUM_ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_box(kind):
    box, query, _ = asked(kind)
    expected, found = jax.jit(lambda b, q: b(q))(box, query), asker(kind)(query)
    np.testing.assert_allclose(found.scores, expected.scores, atol=5e-5)
    assert found.scores.dtype == np.float32
    assert np.asarray(found.valid).all()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_company_or_place_bitwise(kind):
    """Every order of clients, prompts and examples, and every one alone, gives each row the same bits."""
    _, query, like = asked(kind)
    together = np.asarray(asker(kind)(query).scores)
    rng, block = np.random.default_rng(0), jax.tree.leaves(like.inputs)[0].shape[1]
    (num_clients, num_candidates), batch = together.shape[:2], together.shape[2]
    for _ in range(10):
        c, k = rng.permutation(num_clients), rng.permutation(num_candidates)[: rng.integers(1, num_candidates + 1)]
        b = rng.permutation(batch)[: rng.integers(1, batch + 1)] if block == 1 else np.arange(batch)
        inputs = jax.tree.map(lambda x, c=c, b=b: x[c][:, b], query.inputs)
        found = asker(kind)(Query(query.prompt[c][:, k], inputs)).scores
        np.testing.assert_array_equal(found, together[c][:, k][:, :, b])
    for c, k, b in np.ndindex(num_clients, num_candidates, 1 if block > 1 else batch):
        some = slice(None) if block > 1 else slice(b, b + 1)
        alone = Query(
            query.prompt[c : c + 1, k : k + 1], jax.tree.map(lambda x, c=c, s=some: x[c : c + 1, s], query.inputs)
        )
        np.testing.assert_array_equal(asker(kind)(alone).scores[0, 0], together[c, k, some])


@pytest.mark.parametrize("kind", ["image", "words", "embeddings"])
def test_a_prompt_of_each_example(kind):
    per_example = make_query(kind, per_example=True)
    found = asker(kind)(per_example).scores
    for c, k, b in [(0, 0, 0), (1, 2, 3), (1, 0, 2)]:
        inputs = jax.tree.map(lambda x, c=c, b=b: x[c : c + 1, b : b + 1], per_example.inputs)
        alone = asker(kind)(Query(per_example.prompt[c : c + 1, k : k + 1, b], inputs))
        np.testing.assert_array_equal(alone.scores[0, 0, 0], found[c, k, b])


def test_shorter_texts_get_the_same_bits():
    _, query, _ = asked("words")
    used = slice(0, 7)  # of the third text, no more is attended to
    longer, shorter = (
        Query(query.prompt, jax.tree.map(lambda x, n=n: x[:, 2:3, n], query.inputs)) for n in (slice(None), used)
    )
    np.testing.assert_allclose(asker("words")(shorter).scores, asker("words")(longer).scores, atol=5e-5)


def test_rows_of_any_number_are_one_program():
    traced = []

    def box(query):
        traced.append(query.prompt.shape)
        return Response(query.prompt[:, :, None] + query.inputs[:, None], jnp.array(True))

    one = Query(np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 2), np.float32))
    ask = in_rows(jax.tree_util.Partial(box), one, 3)
    before = len(traced)
    for num_candidates, batch in [(1, 1), (2, 3), (7, 2)]:
        query = Query(np.ones((2, num_candidates, 2), np.float32), np.ones((2, batch, 2), np.float32))
        assert (ask(query).scores == 2).all()
    assert len(traced) - before == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q._replace(prompt=q.prompt.astype(np.float64)), "prompt: expected float32"),
        (lambda q: q._replace(prompt=q.prompt[..., :2]), r"prompt: expected float32 of shape \[16, 16, 3\]"),
        (lambda q: q._replace(prompt=q.prompt[:1]), "not of the 2 clients"),
        (lambda q: q._replace(inputs=q.inputs[:, :0]), "inputs: expected at least one"),
        (lambda q: q._replace(inputs=q.inputs[0]), "inputs: expected"),
    ],
)
def test_other_shapes_and_types_are_refused(change, message):
    _, query, _ = asked("image")
    with pytest.raises(ValueError, match=message):
        asker("image")(change(query))


@pytest.mark.parametrize("at_once", [2, 6])
def test_several_rows_at_once(at_once):
    """As on an accelerator; how many rows there are need not be a multiple."""
    box, query, like = asked("image")
    compute = row_program(box, like, 6, at_once)
    parts = list(parts_of(cut_query(query, like), 6))
    found = np.concatenate([compute(*part)[: part[2]] for part in parts])
    np.testing.assert_allclose(
        found.reshape(asker("image")(query).scores.shape), asker("image")(query).scores, atol=5e-5
    )
    prompts, inputs, _ = parts[0]
    np.testing.assert_array_equal(compute(prompts, inputs, 3)[:3], found[:3])
    with pytest.raises(ValueError, match="at_once must divide 6 rows, got 4"):
        row_program(box, like, 6, 4)


def test_there_must_be_rows():
    box, _, like = asked("image")
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        in_rows(box, like, 0)
