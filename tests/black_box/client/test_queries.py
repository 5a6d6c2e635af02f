"""Queries as messages, and answers as responses."""

import numpy as np
import pytest
from fake_server import METADATA
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.black_box.client.answers import SCORES, pack_scores
from fedbbpt_jax.black_box.client.queries import (
    Form,
    Tensor,
    canonical,
    form_from_json,
    join_answers,
    query_axes,
    read_form,
    split_query,
)
from fedbbpt_jax.errors import QueryFailedError, ResponseFormatError
from fedbbpt_jax.types import Query

TEXT = Form(
    (
        Tensor("prompt", "INT32", (-1, -1)),
        Tensor("prompt", "FP32", (-1, -1, 8)),
        Tensor("inputs.ids", "INT32", (-1, -1)),
        Tensor("inputs.attended", "BOOL", (-1, -1)),
    ),
    2,
    SCORES,
    None,
)


def text_query(prompt, c=2, b=3):
    return Query(prompt, {"ids": np.zeros((c, b, 5), "i4"), "attended": np.ones((c, b, 5), bool)})


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.none() | st.integers(3, 30), st.booleans())
def test_what_is_split_is_joined_again(c, k, b, max_rows, per_example):
    """Also where the prompt depends on the example: each score names its client, candidate and example."""
    form = Form((Tensor("prompt", "FP32", (-1, 1)), Tensor("inputs", "FP32", (-1, 1))), 2, SCORES, max_rows)
    clients, candidates, examples = np.meshgrid(*map(np.arange, (c, k, b)), indexing="ij")
    names = np.float32(100 * clients + 10 * candidates + examples)
    prompt = (names if per_example else names[:, :, 0])[..., None]
    parts = split_query(Query(prompt, names[:, 0, :, None]), form)
    payloads = []
    for part in parts:
        assert max_rows is None or part.num_requests <= max_rows
        asked, inputs = part.tensors["prompt"], part.tensors["inputs"]
        asked = asked if per_example else asked[:, None]
        scores = np.broadcast_to(asked + 0 * inputs[None], (*part.shape[:2], 1))
        payloads.append(pack_scores(np.concatenate([scores, scores * 0 + inputs[None]], -1)))
    response, counts = join_answers((c, k, b), parts, payloads, form)
    expected = names if per_example else np.broadcast_to(names[:, :, :1], names.shape)
    np.testing.assert_array_equal(response.scores[..., 0], expected)
    np.testing.assert_array_equal(response.scores[..., 1], np.broadcast_to(names[:, :1], names.shape))
    assert response.valid.all()
    assert not counts


def test_an_answer_that_did_not_come_is_not_valid():
    form = form_from_json(
        Form((Tensor("prompt", "FP32", (-1, 1)), Tensor("inputs", "FP32", (-1, 1))), 2, SCORES, 4).as_json()
    )
    query = Query(np.ones((1, 2, 1), "f"), np.ones((1, 5, 1), "f"))
    parts = split_query(query, form)
    payloads = [pack_scores(np.ones(part.shape, "f")) for part in parts]
    payloads[1] = b""
    response, counts = join_answers(query_axes(query), parts, payloads, form)
    assert response.valid[0].tolist() == [[True, True, False, False, True]] * 2
    assert counts == {"unanswered": 4}
    with pytest.raises(ResponseFormatError, match="expected scores of shape"):
        join_answers(query_axes(query), parts, payloads[::-1], form)


@pytest.mark.parametrize(
    ("prompt", "shape"),
    [
        (np.zeros((2, 4, 6), "i4"), (4, 6)),
        (np.zeros((2, 4, 6, 8), "f"), (4, 6, 8)),
        (np.zeros((2, 4, 3, 6, 8), "f"), (4, 3, 6, 8)),
    ],
)
def test_a_model_can_take_several_kinds_of_prompts(prompt, shape):
    parts = split_query(text_query(prompt), TEXT)
    assert len(parts) == 2
    assert parts[0].tensors["prompt"].shape == shape
    assert parts[0].tensors["inputs.ids"].shape == (3, 5)


@pytest.mark.parametrize("prompt", [np.zeros((2, 4, 6, 7), "f"), np.zeros((2, 4, 6), "i8"), np.zeros((2, 4), "i4")])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="the model takes prompt"):
        split_query(text_query(prompt), TEXT)


def test_equal_tensors_have_equal_bytes():
    parts = [split_query(text_query(np.full((2, 4, 6), n, "i4")), TEXT) for n in (0, 0, 1)]
    assert canonical(parts[0][0]) == canonical(parts[1][1]) != canonical(parts[2][0])


def test_a_form_survives_json():
    assert form_from_json(TEXT.as_json()) == TEXT


@pytest.mark.parametrize(
    ("told", "asked", "limit"),
    [(None, None, None), (64, None, 64), (None, 8, 8), (64, 8, 8), (8, 64, 8), ("many", 8, 8)],
)
def test_the_smaller_limit_counts(told, asked, limit):
    assert read_form(METADATA | {"parameters": {"max_rows": told}}, 4, SCORES, asked).max_rows == limit


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": [{"name": "prompt", "datatype": "FP32", "shape": ["many"]}]},
        {"inputs": [{"name": "prompt"}]},
        {"inputs": "prompt"},
        {"outputs": None},
        {"outputs": [{"name": "scores", "datatype": "FP64", "shape": [-1, -1, 4]}]},
        {"outputs": [{"name": "scores", "datatype": "FP32", "shape": []}]},
    ],
)
def test_a_description_that_is_none_is_refused(changes):
    with pytest.raises(QueryFailedError):
        read_form(METADATA | changes, 4, SCORES, None)
