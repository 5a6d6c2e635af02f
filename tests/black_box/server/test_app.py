"""The server over its protocol: answers, refusals, limits, repeats, and that it gives nothing but scores."""

import asyncio
import gc
import json
import tracemalloc
from pathlib import Path

import httpx2
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import (
    BEARER,
    INFER,
    TOKEN,
    app_of,
    client_of,
    expected_scores,
    infer,
    linear,
    listening,
    message,
    scores_of,
    send,
    vectors,
)
from starlette.routing import Route

from fedbbpt_jax.black_box import server
from fedbbpt_jax.black_box.frozen import clip_classifier, query_only
from fedbbpt_jax.black_box.protocol import HEAD_LENGTH
from fedbbpt_jax.black_box.rows import in_rows
from fedbbpt_jax.black_box.server.app import check_address, create_app
from fedbbpt_jax.black_box.server.limits import Limits
from fedbbpt_jax.black_box.server.served_model import served_model
from fedbbpt_jax.models.loading import load_clip
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.types import Query

JSON = {"content-type": "application/json"}


@pytest.fixture
def app():
    return app_of()


def count_of(app, name):
    """Returns a number of /metrics."""
    lines = send(app, ("GET", "/metrics", None, None))[0].text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split()[0].split("{")[0] == name)


def all_routes(routes):
    """Yields every route of an application, those of included routers too."""
    for route in routes:
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        if inner is not None:
            yield from all_routes(inner)
        elif isinstance(route, Route):
            yield route


# Answers


def test_scores_of_every_prompt_on_every_example(app):
    tensors = vectors(3, 5)
    scores, head = scores_of(infer(app, tensors, id="7"))
    np.testing.assert_allclose(scores, expected_scores(**tensors), rtol=1e-6)
    assert (head["id"], head["model_name"], head["model_version"]) == ("7", "linear", "1")
    assert head["parameters"] == {"system_fingerprint": linear().fingerprint, "num_requests": 15}


def test_json_carries_the_same_numbers(app):
    tensors = vectors()
    binary, _ = scores_of(infer(app, tensors))
    entries = [{"name": name, "shape": x.shape, "datatype": "FP32", "data": x.tolist()} for name, x in tensors.items()]
    response = send(app, ("POST", INFER, json.dumps({"inputs": entries}), JSON))[0]
    assert response.headers["content-type"] == "application/json"
    np.testing.assert_array_equal(scores_of(response)[0], binary)


def test_a_prompt_of_each_example(app):
    tensors = vectors(6, 3)
    tensors["prompt"] = tensors["prompt"].reshape(2, 3, 4)
    scores, head = scores_of(infer(app, tensors))
    for k, b in np.ndindex(2, 3):
        one = {"prompt": tensors["prompt"][k, b : b + 1], "inputs": tensors["inputs"][b : b + 1]}
        np.testing.assert_array_equal(scores_of(infer(app, one))[0][0, 0], scores[k, b])
    assert head["parameters"]["num_requests"] == 6


def test_answers_are_those_of_the_box_in_rows_bitwise():
    classes = ("zero", "one", "two")
    box = query_only(clip_classifier(load_clip(MINI_CLIP), classes, ("the digit {}",)))
    x = np.zeros((1, 1, 32, 32, 3), np.float32)
    app = create_app(served_model("mini-clip", box, Query(x, x), classes, num_rows=8))
    rng = np.random.default_rng(0)
    tensors = {
        "prompt": rng.normal(0, 0.1, (3, 32, 32, 3)).astype("f"), "inputs": rng.random((5, 32, 32, 3)).astype("f")
    }  # fmt: skip
    local = in_rows(box, Query(x, x), 8)(Query(tensors["prompt"][None], tensors["inputs"][None]))

    async def many_at_once():
        async with client_of(app) as client:
            order = [rng.permutation(5)[: 1 + n % 5] for n in range(12)]
            bodies = [message({**tensors, "inputs": tensors["inputs"][rows]}) for rows in order]
            url = "/v2/models/mini-clip/infer"
            return order, await asyncio.gather(*(client.post(url, content=b, headers=h) for b, h in bodies))

    order, responses = asyncio.run(many_at_once())
    for rows, response in zip(order, responses, strict=True):
        np.testing.assert_array_equal(scores_of(response)[0], local.scores[0][:, rows])


def test_what_is_served_is_told(app):
    about, model, ready, live = (
        response.json()
        for response in send(
            app,
            *(("GET", url, None, None) for url in ("/v2", "/v2/models/linear", "/v2/health/ready", "/v2/health/live")),
        )
    )
    assert about["extensions"] == ["binary_tensor_data"]
    assert model["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [-1, -1, 4]}]
    assert model["parameters"]["system_fingerprint"] == linear().fingerprint
    assert (ready, live) == ({"ready": True}, {"live": True})


# Who may ask


def test_every_route_needs_the_token():
    app = app_of(token=TOKEN)
    routes = list(all_routes(app.routes))
    paths = {route.path for route in routes}
    assert {INFER.replace("linear", "{name}"), "/metrics", "/v2/health/live", "/openapi.json"} <= paths
    for route in routes:
        url = route.path.replace("{name}", "linear").replace("{model_version}", "1")
        for method in route.methods:
            wrong = [{}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"authorization": "Bearer "}]
            for response in send(app, *((method, url, b"", headers) for headers in wrong)):
                assert response.status_code == 401, url
                assert response.headers["www-authenticate"] == "Bearer"
            (right,) = send(app, (method, url, b"", BEARER))
            assert right.status_code != 401, url
    assert send(app, ("GET", "/nowhere", None, {}))[0].status_code == 401


def test_a_refused_request_is_not_computed_and_names_no_token():
    app = app_of(token=TOKEN)
    response = infer(app)
    assert response.status_code == 401
    assert TOKEN not in response.text
    assert infer(app, headers=dict(BEARER)).status_code == 200
    assert infer(app, headers={"authorization": f"bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize("token", ["", "two words", "ä", "a\r\nb"])
def test_a_token_fits_in_a_header(token):
    with pytest.raises(ValueError, match="token"):
        app_of(token=token)


def test_others_are_served_with_a_token_only():
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_address(host, None)
    check_address("0.0.0.0", TOKEN)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(ValueError, match="FEDBBPT_TOKEN"):
            check_address(host, None)


# Refusals


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (without(vectors(), "prompt"), "expected a tensor 'prompt'"),
        (vectors() | {"more": np.ones(2, "f")}, "expected no tensors but inputs, prompt"),
        (vectors() | {"prompt": np.ones((2, 3), "f")}, "prompt: expected float32 of shape [4]"),
        (vectors() | {"prompt": np.ones((2, 4), np.int32)}, "got int32"),
        (vectors() | {"prompt": np.float32([[1, 2, 3, np.nan]])}, "not finite"),
        (vectors() | {"inputs": np.float32([[1, 2, 3, np.inf]])}, "not finite"),
        (vectors() | {"inputs": np.ones((0, 4), "f")}, "is empty"),
        (vectors() | {"prompt": np.float32(1)}, "is empty"),
        (vectors() | {"prompt": np.ones((2, 2, 4), "f")}, "not of the 1 clients and 3 examples"),
    ],
)
def test_a_wrong_question_is_refused(app, tensors, text):
    response = infer(app, tensors)
    assert response.status_code == 400
    assert text in response.json()["error"]


@pytest.mark.parametrize(
    "head",
    [
        {"id": 7},
        {"id": "x" * 300},
        {"outputs": [{"name": "logits"}]},
        {"outputs": 7},
        {"outputs": [{"name": "scores"}, {"name": "scores"}]},
        {"outputs": [{"name": "scores", "parameters": {"classification": 3}}]},
        {"outputs": [{"name": "scores", "parameters": {"shared_memory_region": "all"}}]},
    ],
)
def test_other_outputs_are_refused(app, head):
    assert infer(app, **head).status_code == 400


def test_errors_have_the_form_of_their_route(app):
    responses = send(
        app,
        ("GET", "/v2/models/other", None, None),
        ("GET", "/v2/models/linear/versions/2", None, None),
        ("GET", "/nowhere", None, None),
        ("DELETE", INFER, None, None),
    )
    assert [r.status_code for r in responses] == [404, 404, 404, 405]
    assert responses[0].json() == {"error": "there is no model other, but linear"}
    assert set(responses[2].json()["error"]) == {"message", "type", "param", "code"}


def test_a_failure_tells_nothing_of_its_inside():
    def fails(*_):
        raise RuntimeError("/home/somebody/weights")

    app = app_of(linear()._replace(rows=linear().rows._replace(compute=fails)))
    body, headers = message()
    (response,) = send(app, ("POST", INFER, body, headers), raise_app_exceptions=False)
    assert response.status_code == 500
    assert response.json() == {"error": "the server failed"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("rebound.example:8000", 403),
        ("127.0.0.1.example", 403),
        ("", 403),
    ],
)
def test_a_page_of_the_browser_is_not_answered_without_a_token(host, status):
    """Its own name can be made to lead here, and stands in its requests."""
    assert send(app_of(), ("GET", "/v2", None, {"host": host}))[0].status_code == status
    assert send(app_of(token=TOKEN), ("GET", "/v2", None, {"host": host} | BEARER))[0].status_code == 200


def test_requests_have_an_id(app):
    given, own, bad = send(
        app,
        ("GET", "/v2", None, {"x-request-id": "run-7.3"}),
        ("GET", "/v2", None, None),
        ("GET", "/v2", None, {"x-request-id": "a b<script>"}),
    )
    assert given.headers["x-request-id"] == "run-7.3"
    assert len(own.headers["x-request-id"]) == len(bad.headers["x-request-id"]) == 32


# Limits


async def in_pieces(body, size=1000):
    for start in range(0, len(body), size):
        yield body[start : start + size]


def test_a_body_is_bounded_however_it_is_sent():
    app = app_of(limits=Limits(body_bytes=5000))
    tensors = vectors(2, 400)
    assert infer(app, tensors).status_code == 413
    body, headers = message(tensors)
    (chunked,) = send(app, ("POST", INFER, in_pieces(body), headers))
    assert chunked.status_code == 413
    assert infer(app).status_code == 200
    (packed,) = send(app, ("POST", INFER, b"x", {"content-encoding": "gzip"}))
    assert packed.status_code == 415


def test_all_bodies_together_are_bounded():
    app = app_of(limits=Limits(total_bytes=5000))
    response = infer(app, vectors(2, 400))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert infer(app).status_code == 200  # what was refused is not in the way any more


def test_json_is_bounded():
    app = app_of(limits=Limits(json_bytes=1000))
    (response,) = send(app, ("POST", INFER, b'{"inputs": [' + b" " * 1000, JSON))
    assert response.status_code == 413
    assert infer(app, vectors(2, 100)).status_code == 200


def test_rows_are_bounded():
    app = app_of(limits=Limits(rows=6))
    assert infer(app, vectors(2, 3)).status_code == 200
    assert infer(app, vectors(1, 7)).status_code == 413
    assert infer(app, vectors(100_000, 100_000)).status_code == 413  # rows of which would fill the memory
    assert count_of(app, "fedbbpt_requests_computed_total") == 6


def test_requests_at_one_time_are_bounded():
    """What does not fit in the queue is sent away with 429, beyond the requests with 503, and nothing is lost."""
    app = app_of(limits=Limits(waiting_rows=8, requests=20))

    async def crowd():
        async with client_of(app) as client:
            body, headers = message()
            return await asyncio.gather(*(client.post(INFER, content=body, headers=headers) for _ in range(40)))

    responses = asyncio.run(crowd())
    statuses = [r.status_code for r in responses]
    assert set(statuses) == {200, 429, 503}
    assert all(int(r.headers["retry-after"]) >= 1 for r in responses if r.status_code != 200)
    assert count_of(app, "fedbbpt_requests_computed_total") == 6 * statuses.count(200)


def test_a_slow_body_is_given_up():
    async def never():
        yield b"{"
        await asyncio.sleep(5)

    (response,) = send(app_of(limits=Limits(body_seconds=0.05)), ("POST", INFER, never(), JSON))
    assert response.status_code == 408


# Repeats


def test_a_repeated_request_is_answered_again_and_counted_once(app):
    body, headers = message()
    first, again, other = send(
        app,
        *(("POST", INFER, body, headers | {"idempotency-key": key}) for key in ("a", "a", "b")),
    )
    assert first.content == again.content == other.content
    assert count_of(app, "fedbbpt_requests_computed_total") == 12
    assert count_of(app, "fedbbpt_requests_answered_total") == 18


def test_a_key_belongs_to_one_request(app):
    body, headers = message()
    other, its_headers = message(vectors(seed=1))
    key = {"idempotency-key": "a"}
    first, reused = send(app, ("POST", INFER, body, headers | key), ("POST", INFER, other, its_headers | key))
    assert (first.status_code, reused.status_code) == (200, 422)
    assert infer(app, headers={"idempotency-key": "x" * 256}).status_code == 400


def test_repeats_at_the_same_time_wait_for_the_first(app):
    async def crowd():
        async with client_of(app) as client:
            body, headers = message()
            headers |= {"idempotency-key": "a"}
            return await asyncio.gather(*(client.post(INFER, content=body, headers=headers) for _ in range(30)))

    assert len({r.content for r in asyncio.run(crowd())}) == 1
    assert count_of(app, "fedbbpt_requests_computed_total") == 6


def test_a_refusal_is_not_remembered():
    """A request that found the queue full is answered when it comes again with its key."""
    app = app_of(limits=Limits(waiting_rows=1))

    async def crowd():
        async with client_of(app) as client:
            body, headers = message()
            keyed = [headers | {"idempotency-key": str(n)} for n in range(5)]
            first = await asyncio.gather(*(client.post(INFER, content=body, headers=h) for h in keyed))
            return first, [await client.post(INFER, content=body, headers=h) for h in keyed]

    first, again = asyncio.run(crowd())
    assert {r.status_code for r in first} == {200, 429}
    assert {r.status_code for r in again} == {200}
    assert count_of(app, "fedbbpt_requests_computed_total") == 30


def test_kept_answers_are_bounded():
    app = app_of(limits=Limits(answers=3))
    body, headers = message()
    keys = ("a", "b", "c", "d", "d", "a")  # the oldest is forgotten, and computed again
    send(app, *(("POST", INFER, body, headers | {"idempotency-key": key}) for key in keys))
    assert count_of(app, "fedbbpt_requests_computed_total") == 5 * 6


# Anything at all


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=400) | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["inputs", "outputs", "id", "name", "shape", "datatype", "data", "parameters", "x"]), inner
        ),
    ).map(lambda tree: json.dumps({"inputs": tree}).encode()),
    length=st.none() | st.integers(-5, 500).map(str) | st.sampled_from(["x", "1e3", "9" * 30, "²"]),
)  # fmt: skip
def test_any_body_is_refused_and_nothing_breaks(app, body, length):
    headers = {} if length is None else {HEAD_LENGTH: length.encode()}
    (response,) = send(app, ("POST", INFER, body, headers))
    assert response.status_code == 400
    assert response.json()["error"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_message_is_refused_or_answered(app, data):
    body, headers = message()
    damaged = bytearray(body)
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=3)):
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(body)))
    (response,) = send(app, ("POST", INFER, bytes(damaged[: max(cut, 1)]), headers))
    assert response.status_code in (200, 400, 404, 413)


def test_deep_and_large_numbers_of_json_are_refused(app):
    bodies = [b'{"inputs":' + b"[" * 200_000, b'{"inputs": [%s]}' % (b"9" * 5000), b'{"inputs": NaN}', b"\xff\xfe"]
    bodies.append(json.dumps({"inputs": [{"name": "prompt", "shape": [2**40, 2**40], "datatype": "FP32"}]}).encode())
    for response in send(app, *(("POST", INFER, body, JSON) for body in bodies)):
        assert response.status_code == 400


def test_memory_does_not_grow_with_requests(app):
    body, headers = message()

    def held():
        gc.collect()
        return len(gc.get_objects())

    send(app, *[("POST", INFER, body, headers)] * 20)
    before = held()
    send(app, *[("POST", INFER, body, headers), ("POST", INFER, b"{}", JSON), ("GET", "/nowhere", None, None)] * 50)
    assert held() - before < 500


def test_memory_is_bounded_however_many_ask_at_once():
    """Forty bodies of a quarter of a megabyte: what does not fit is sent away before it is read to its end."""
    app = app_of(limits=Limits(total_bytes=1 << 20, rows=10**5))
    body, headers = message(vectors(1, 16_384))

    async def crowd():
        async with client_of(app) as client:
            some = (client.post(INFER, content=in_pieces(body, 1 << 15), headers=headers) for _ in range(40))
            return [r.status_code for r in await asyncio.gather(*some)]

    tracemalloc.start()
    statuses = asyncio.run(crowd())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(statuses) == {200, 429, 503} or set(statuses) == {200, 503}
    assert peak < 16 << 20
    assert infer(app).status_code == 200


# The wall


def test_no_route_gives_weights_away():
    """The bytes of no weight are in any answer, of any route."""
    classes = ("zero", "one", "two")
    box = clip_classifier(load_clip(MINI_CLIP), classes, ("the digit {}",))
    x = np.zeros((1, 1, 32, 32, 3), np.float32)
    app = create_app(served_model("mini-clip", query_only(box), Query(x, x), classes))
    body, headers = message({"prompt": x[0], "inputs": x[0]})
    paths = {route.path for route in all_routes(app.routes)}
    urls = [path.replace("{name}", "mini-clip").replace("{model_version}", "1") for path in sorted(paths)]
    responses = send(
        app, ("POST", "/v2/models/mini-clip/infer", body, headers), *(("GET", url, None, {}) for url in urls)
    )
    assert responses[0].status_code == 200
    for leaf in jax.tree.leaves(box):
        values = np.asarray(leaf).ravel()[:4]
        secret = values.astype("<f4").tobytes()
        for response in responses:
            assert values.size < 4 or not values.any() or secret not in response.content
    _, head = scores_of(responses[0])
    assert set(head) == {"model_name", "model_version", "parameters", "outputs"}


def test_no_code_of_the_server_fetches_an_address():
    """The server's modules import no client of HTTP."""
    files = list(Path(server.__file__).parent.glob("*.py"))
    assert len(files) > 8
    for file in files:
        text = file.read_text()
        assert not any(word in text for word in ("httpx", "urllib", "requests.get", "aiohttp", "urlopen"))


# Over a real socket


def test_tritonclient_asks():
    tritonclient = pytest.importorskip("tritonclient.http")
    tensors = vectors()
    with listening(app_of(token=TOKEN)) as address:
        client = tritonclient.InferenceServerClient(address)
        assert client.is_server_live(headers=dict(BEARER))
        assert client.is_model_ready("linear", headers=dict(BEARER))
        assert client.get_model_metadata("linear", headers=dict(BEARER))["platform"] == "jax"
        inputs = []
        for name, x in tensors.items():
            inputs.append(tritonclient.InferInput(name, list(x.shape), "FP32"))
            inputs[-1].set_data_from_numpy(x)
        for binary in (True, False):
            wanted = [tritonclient.InferRequestedOutput("scores", binary_data=binary)]
            result = client.infer("linear", inputs, outputs=wanted, request_id="9", headers=dict(BEARER))
            np.testing.assert_allclose(result.as_numpy("scores"), expected_scores(**tensors), rtol=1e-6)
            assert result.get_response()["id"] == "9"
        with pytest.raises(tritonclient.InferenceServerException, match="there is no model other"):
            client.get_model_metadata("other", headers=dict(BEARER))
        client.close()


def test_a_body_without_a_length_is_bounded_on_a_socket():
    body, headers = message(vectors(2, 4000))
    with listening(app_of(limits=Limits(body_bytes=5000))) as address, httpx2.Client() as client:
        chunked = client.post(f"http://{address}{INFER}", content=iter([body[:4000]] * 20), headers=headers)
        assert chunked.status_code == 413
        body, headers = message()
        assert client.post(f"http://{address}{INFER}", content=body, headers=headers).status_code == 200
