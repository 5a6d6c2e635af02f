"""A classifier behind OpenAI's routes, asked by their own client: the same numbers as over the native protocol."""

import base64
import functools
import io
import json

import jax
import numpy as np
import openai
import pytest
from conftest import linear_box
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import BEARER, TOKEN, app_of, linear, listening, message, scores_of, send

from fedbbpt_jax.black_box.frozen import clip_classifier, query_only
from fedbbpt_jax.black_box.server.http_faults import Faults, with_faults
from fedbbpt_jax.black_box.server.served_model import ServedText, served_model, served_rows
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.models.loading import load_clip
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.types import Query, Response

CLASSES = ("zero", "one", "two", "three")
CHAT, PROMPTS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@functools.cache
def pictures():
    box = query_only(clip_classifier(load_clip(MINI_CLIP), CLASSES, ("the digit {}",)))
    x = np.zeros((1, 1, 32, 32, 3), np.float32)
    return served_model("mini-clip", box, Query(x, x), CLASSES, num_rows=4)


def letters(texts):
    """Returns four numbers of each text, and how many words it has."""
    if any("too long" in text for text in texts):
        raise TaskError("the text is too long")
    vectors = [[text.count(letter) for letter in "abcd"] for text in texts]
    return np.float32(vectors), np.array([len(text.split()) for text in texts])


@functools.cache
def words():
    """Returns a model of texts, whose scores are how often the letters a to d come."""
    like = Query(np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 4), np.float32))
    rows = served_rows(jax.tree_util.Partial(linear_box), like, 4)
    doubled = jax.tree_util.Partial(lambda q: Response(2 * q.inputs[:, None], q.inputs[:, None, :, 0] > -1))
    return linear()._replace(text=ServedText(rows, letters, served_rows(doubled, like, 4)))


def noise(seed=0, size=32):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def data_uri(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, lossless=True) if kind == "webp" else Image.fromarray(pixels).save(
        file, kind
    )
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def with_picture(url, **more):
    parts = [{"type": "text", "text": "Which digit?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "mini-clip", "messages": [{"role": "user", "content": parts}], **more}


def with_text(text, **more):
    return {"model": "linear", "messages": [{"role": "user", "content": text}], **more}


def post(app, path, content, headers=None):
    return send(app, ("POST", path, json.dumps(content), headers))[0]


def log_softmax(scores):
    scores = np.float64(scores)
    return scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()


@pytest.fixture(scope="module")
def address():
    with listening(app_of(pictures(), token=TOKEN)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


# By OpenAI's own client


def test_a_picture_in_a_chat_gets_the_scores_of_the_native_protocol(client):
    pixels = noise()
    asked = with_picture(data_uri(pixels), logprobs=True, top_logprobs=20)
    answer = client.chat.completions.create(**asked)
    tensors = {"prompt": np.zeros((1, 32, 32, 3), "f"), "inputs": np.float32(pixels[None]) / np.float32(255)}
    body, headers = message(tensors)
    native, _ = scores_of(send(app_of(pictures()), ("POST", "/v2/models/mini-clip/infer", body, headers))[0])
    expected = log_softmax(native[0, 0])
    (token,) = answer.choices[0].logprobs.content
    found = {top.token: top.logprob for top in token.top_logprobs}
    np.testing.assert_allclose([found[name] for name in CLASSES], expected, rtol=1e-6)
    assert answer.choices[0].message.content == token.token == CLASSES[int(np.argmax(expected))]
    assert [top.logprob for top in token.top_logprobs] == sorted(found.values(), reverse=True)
    assert bytes(token.bytes).decode() == token.token
    assert answer.system_fingerprint == pictures().fingerprint
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (1, 1, 2)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["mini-clip"]
    assert client.models.retrieve("mini-clip").owned_by == "fedbbpt"


def test_errors_are_those_of_the_client(client, address):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**with_picture("https://example.org/cat.png"))
    assert "no address is fetched" in refused.value.body["message"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**with_picture(data_uri(noise())) | {"model": "gpt-7"})
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(**with_picture(data_uri(noise())), logit_bias={"5": 1})
    assert unsupported.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="mini-clip", input="a text")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="mini-clip", prompt="a text")
    with (
        openai.OpenAI(base_url=f"http://{address}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_texts_embeddings_and_faults_by_the_client():
    with (
        listening(app_of(words())) as address,
        openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.completions.create(model="linear", prompt=["b b", "a a a"], logprobs=4, max_tokens=1)
        assert [choice.text for choice in answer.choices] == ["b", "a"]
        assert set(answer.choices[0].logprobs.top_logprobs[0]) == set("abcd")
        assert answer.usage.prompt_tokens == 5
        vectors = client.embeddings.create(model="linear", input=["a", "a d"])
        assert [one.embedding for one in vectors.data] == [[2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 2.0]]
    with (
        listening(with_faults(app_of(words()), Faults(rate_limited=1.0))) as address,
        openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(model="linear", prompt="a")


# Texts


def test_a_chat_of_texts():
    answer = post(app_of(words()), CHAT, with_text("c a c c", logprobs=True, top_logprobs=2)).json()
    expected = log_softmax([x + 0.3 * np.sin(x) for x in (1, 0, 3, 0)])
    (token,) = answer["choices"][0]["logprobs"]["content"]
    assert [top["token"] for top in token["top_logprobs"]] == ["c", "a"]
    np.testing.assert_allclose([top["logprob"] for top in token["top_logprobs"]], expected[[2, 0]], rtol=1e-6)
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}


def test_answers_without_logprobs_have_none():
    app = app_of(words())
    assert post(app, CHAT, with_text("a")).json()["choices"][0]["logprobs"] is None
    assert post(app, PROMPTS, {"model": "linear", "prompt": "a"}).json()["choices"][0]["logprobs"] is None


def test_answers_do_not_depend_on_what_is_asked_beside_them():
    app, texts = app_of(words()), ["a b", "c", "d d d", "a a", "b"]
    together = post(app, PROMPTS, {"model": "linear", "prompt": texts, "logprobs": 4}).json()["choices"]
    for n, text in enumerate(texts):
        (alone,) = post(app, PROMPTS, {"model": "linear", "prompt": text, "logprobs": 4}).json()["choices"]
        assert together[n] == alone | {"index": n}


def test_parts_of_a_chat_are_one_text():
    parts = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b b"}, {"type": "text", "text": "b"}]},
    ]
    answer = post(app_of(words()), CHAT, {"model": "linear", "messages": parts}).json()
    assert answer["choices"][0]["message"]["content"] == "b"
    assert answer["usage"]["prompt_tokens"] == 4


def test_embeddings_come_in_base64():
    answer = post(app_of(words()), EMBEDDINGS, {"model": "linear", "input": "a b", "encoding_format": "base64"})
    found = np.frombuffer(base64.b64decode(answer.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(found, [2, 2, 0, 0])


def test_a_repeated_chat_is_counted_once():
    app, key = app_of(words()), {"idempotency-key": "a"}
    first, again = (post(app, CHAT, with_text("a"), key) for _ in range(2))
    assert first.content == again.content
    lines = send(app, ("GET", "/metrics", None, None))[0].text.splitlines()
    assert "fedbbpt_requests_computed_total 1.0" in lines
    assert post(app, CHAT, with_text("b"), key).status_code == 422


# Refusals


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_lossless_pictures_are_taken(kind):
    assert post(app_of(pictures()), CHAT, with_picture(data_uri(noise(), kind))).status_code == 200


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "file:///etc/passwd",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,????",
        "data:image/png;base64,AAAA",
        data_uri(noise(size=16)),
        data_uri(noise())[:-400],
        "data:image/svg+xml;base64,AAAA",
    ],
)
def test_other_pictures_are_refused(url):
    response = post(app_of(pictures()), CHAT, with_picture(url))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_image"


def test_a_picture_that_would_be_huge_is_refused():
    head = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(head, "png")
    url = "data:image/png;base64," + base64.b64encode(head.getvalue()).decode()
    assert post(app_of(pictures()), CHAT, with_picture(url)).status_code == 400


def test_a_chat_has_one_picture_or_none():
    for parts in ([], [{"type": "image_url", "image_url": {"url": data_uri(noise())}}] * 2):
        asked = {"model": "mini-clip", "messages": [{"role": "user", "content": parts}]}
        assert post(app_of(pictures()), CHAT, asked).status_code == 400
    asked = with_picture(data_uri(noise())) | {"model": "linear"}
    assert post(app_of(words()), CHAT, asked).status_code == 400


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"tools": []}, "unsupported_parameter"),
        ({"logit_bias": {"1": 2}}, "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter"),
        ({"temperature": 0.7}, "unsupported_value"),
        ({"n": 2}, "unsupported_value"),
        ({"stream": True}, "unsupported_value"),
        ({"top_logprobs": 2}, "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value"),
        ({"logprobs": 3}, "invalid_value"),
        ({"messages": []}, "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": "too long"}]}, "invalid_value"),
        ({"model": None}, "model_not_found"),
    ],
)
def test_what_is_not_offered_is_refused(change, code):
    response = post(app_of(words()), CHAT, with_text("a") | change)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize("prompt", [None, "", [], [1, 2], [["a"]], ["a", ""], {"a": 1}])
def test_prompts_are_texts(prompt):
    assert post(app_of(words()), PROMPTS, {"model": "linear", "prompt": prompt}).status_code == 400


def test_what_changes_nothing_is_taken():
    harmless = {"temperature": 0, "n": 1, "seed": 5, "max_tokens": 1, "stream": False, "user": "me", "top_p": 1}
    assert post(app_of(words()), CHAT, with_text("a", **harmless)).status_code == 200


JSON_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("linear"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "image_url", "url", "x"]), inner, max_size=4
    ),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from([CHAT, PROMPTS, EMBEDDINGS]),
    tree=st.fixed_dictionaries(
        {"model": st.just("linear")},
        optional=dict.fromkeys(("messages", "prompt", "input", "logprobs", "top_logprobs", "n", "x"), JSON_TREES),
    )
    | JSON_TREES,
)
def test_any_json_is_refused_or_answered(path, tree):
    assert post(app_of(words()), path, tree).status_code in (200, 400, 404)


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=200), path=st.sampled_from([CHAT, PROMPTS, EMBEDDINGS]))
def test_any_bytes_are_refused(path, body):
    assert send(app_of(words()), ("POST", path, body, None))[0].status_code in (400, 404)


# Faults


def test_faults_reach_openai_answers():
    def asked(**faults):
        app = with_faults(app_of(words()), Faults(**faults))
        return post(app, PROMPTS, {"model": "linear", "prompt": ["a", "b", "c"], "logprobs": 4})

    assert len(asked(short=1.0).json()["choices"]) == 2
    assert [choice["index"] for choice in asked(reordered=1.0).json()["choices"]] == [2, 1, 0]
    assert all("d" not in c["logprobs"]["top_logprobs"][0] for c in asked(dropped_label=1.0).json()["choices"])
    assert "NaN" in asked(nan=1.0).text
    rounded = asked(decimals=1).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    assert all(abs(10 * x - round(10 * x)) < 1e-5 for x in rounded.values())
    assert asked(flip_after=0).json()["system_fingerprint"] != linear().fingerprint


def test_headers_carry_the_token():
    app = app_of(words(), token=TOKEN)
    assert post(app, CHAT, with_text("a")).json()["error"]["type"] == "authentication_error"
    assert post(app, CHAT, with_text("a"), BEARER).status_code == 200
