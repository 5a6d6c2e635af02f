"""Texts over the protocol V2: of any length up to the longest, with prompts of words or of none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import app_of, infer, message, scores_of, send

from fedbbpt_jax.black_box.server.served_model import served_model, served_rows, tensor_specs
from fedbbpt_jax.models.sentence_classifiers import EncodedText
from fedbbpt_jax.types import Query, Response

LENGTH, WORDS = 6, 3
INFER = "/v2/models/texts/infer"


def text_box(query):
    """Scores two classes by the sum of the attended ids, less or more what the prompt's words sum up to."""
    ids = jnp.where(query.inputs.attended, query.inputs.ids, 0).sum(-1)[:, None]  # [C, 1, B]
    words = query.prompt.sum(-1)[..., None]  # [C, K, 1]
    return Response(jnp.stack([ids - words, ids + words], -1).astype(jnp.float32), jnp.array(True))


def texts():
    inputs = EncodedText(np.zeros((1, 1, LENGTH), np.int32), np.zeros((1, 1, LENGTH), bool))
    box = jax.tree_util.Partial(text_box)
    model = served_model("texts", box, Query(np.zeros((1, 1, WORDS), np.int32), inputs), ("less", "more"), num_rows=4)
    return model._replace(bare=served_rows(box, Query(np.zeros((1, 1, 0), np.int32), inputs), 4))


def ask(app, prompt, length):
    ids = np.arange(2 * length, dtype=np.int32).reshape(2, length)
    tensors = {"prompt": np.asarray(prompt), "inputs.ids": ids, "inputs.attended": np.ones((2, length), bool)}
    body, headers = message(tensors)
    return ids, send(app, ("POST", INFER, body, headers))[0]


def test_prompts_with_and_without_words_are_told():
    assert tensor_specs(texts()) == [
        {"name": "prompt", "datatype": "INT32", "shape": [-1, WORDS]},
        {"name": "prompt", "datatype": "INT32", "shape": [-1, 0]},
        {"name": "inputs.ids", "datatype": "INT32", "shape": [-1, -1]},
        {"name": "inputs.attended", "datatype": "BOOL", "shape": [-1, -1]},
    ]
    (metadata,) = send(app_of(texts()), ("GET", "/v2/models/texts", None, {}))
    assert metadata.json()["parameters"]["max_length"] == LENGTH


@pytest.mark.parametrize("length", [1, 4, LENGTH])
def test_texts_are_as_long_as_they_are(length):
    app = app_of(texts())
    ids, response = ask(app, np.int32([[1, 2, 3], [0, 0, 1]]), length)
    sums, words = ids.sum(1), np.int32([6, 1])[:, None]
    np.testing.assert_array_equal(scores_of(response)[0], np.stack([sums - words, sums + words], -1))
    ids, response = ask(app, np.zeros((1, 0), np.int32), length)
    np.testing.assert_array_equal(scores_of(response)[0], np.stack([ids.sum(1)] * 2, -1)[None])


@pytest.mark.parametrize(
    ("prompt", "length"),
    [
        (np.zeros((1, WORDS), np.int32), LENGTH + 1),
        (np.zeros((1, 0), np.int32), LENGTH + 1),
        (np.zeros((1, WORDS + 1), np.int32), LENGTH),
        (np.zeros((1, 0), np.float32), LENGTH),
        (np.zeros((0, 0), np.int32), LENGTH),
        (np.zeros((1, 0, 2), np.int32), LENGTH),
        (np.zeros((1, WORDS), np.int32), 0),
        (np.zeros((1, 0), np.int32), 0),
    ],
    ids=["long", "long-bare", "words", "type", "no-prompt", "axes", "empty", "empty-bare"],
)
def test_other_texts_and_prompts_are_refused(prompt, length):
    _, response = ask(app_of(texts()), prompt, length)
    assert response.status_code == 400
    assert response.json()["error"]


def test_pictures_have_no_prompt_without_numbers():
    response = infer(app_of(), {"prompt": np.zeros((1, 0), np.float32), "inputs": np.zeros((1, 4), np.float32)})
    assert response.status_code == 400
