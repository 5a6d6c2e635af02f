"""Injected faults: each does what its name says, as often as asked, the same in any order of arrival."""

import asyncio
import json
from collections import Counter

import httpx2
import numpy as np
import pytest
from serving import INFER, app_of, client_of, infer, linear, listening, message, scores_of, send, vectors

from fedbbpt_jax.black_box.server.http_faults import FLIPPED, KINDS, Faults, plan, read_faults, spoil, with_faults
from fedbbpt_jax.errors import ResponseFormatError, TaskError

SOME = Faults(seed=3, rate_limited=0.2, server_error=0.2, nan=0.2, malformed=0.1, latency=0.001)


def certain(kind, **options):
    return with_faults(app_of(), Faults(**{kind: 1.0}, **options))


def computed(app):
    """Returns how many prompts on examples the server has computed."""
    lines = send(app, ("GET", "/metrics", None, None))[0].text.splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith("fedbbpt_requests_computed_total"))


def test_without_faults_answers_are_the_servers():
    assert infer(with_faults(app_of(), Faults())).content == infer(app_of()).content


def test_faults_are_as_frequent_as_asked():
    chances = {kind: 0.02 * (n + 1) / 2 for n, kind in enumerate(KINDS)}
    n = 5000
    found = Counter(plan(Faults(**chances), f"{i}".encode(), 0).kind for i in range(n))
    for kind, chance in chances.items():
        assert abs(found[kind] - n * chance) < 4 * (n * chance) ** 0.5
    assert abs(found[None] - n * (1 - sum(chances.values()))) < 4 * (n * 0.25) ** 0.5


def test_latency_is_lognormal():
    faults = Faults(latency=0.2, latency_sigma=0.7)
    logs = np.log([plan(faults, f"{i}".encode(), 0).latency for i in range(2000)])
    assert abs(np.mean(logs) - np.log(0.2)) < 4 * 0.7 / 2000**0.5
    assert abs(np.std(logs) - 0.7) < 0.05


def fates(order):
    """Returns what became of each of 30 requests and their repeats, sent at once in an order."""

    async def crowd():
        async with client_of(with_faults(app_of(), SOME)) as client:

            async def one(n):
                body, headers = message(vectors(seed=n))
                headers |= {"idempotency-key": f"{n}"}
                return [
                    (r.status_code, r.content)
                    for r in [await client.post(INFER, content=body, headers=headers) for _ in range(3)]
                ]

            found = await asyncio.gather(*(one(n) for n in order))
            return dict(zip(order, found, strict=True))

    return asyncio.run(crowd())


def test_what_happens_does_not_depend_on_the_order_of_arrival():
    found = fates(list(range(30)))
    assert found == fates(list(reversed(range(30))))
    assert {status for attempts in found.values() for status, _ in attempts} == {200, 429, 500, 502, 503}
    assert any(len({status for status, _ in attempts}) > 1 for attempts in found.values())  # each attempt anew


def test_a_request_without_a_key_is_told_by_its_body():
    app = with_faults(app_of(), SOME)
    body, headers = message()
    found = [r.status_code for r in send(app, *[("POST", INFER, body, headers)] * 8)]
    again = with_faults(app_of(), SOME)
    assert found == [r.status_code for r in send(again, *[("POST", INFER, body, headers)] * 8)]
    assert len(set(found)) > 1


def test_refusals_are_not_computed():
    app = certain("rate_limited", retry_after=1.5)
    refused = infer(app)
    assert (refused.status_code, refused.headers["retry-after-ms"], refused.headers["retry-after"]) == (
        429,
        "1500",
        "2",
    )
    failed = infer(certain("server_error"))
    assert failed.status_code in (500, 502, 503)
    assert failed.json()["error"]
    assert computed(app) == 0


@pytest.mark.parametrize("kind", ["timeout", "reset"])
def test_a_lost_answer_was_computed(kind):
    app = certain(kind, hang_seconds=0.01)
    with pytest.raises(ConnectionResetError):
        infer(app)
    assert computed(app) == 6


def test_a_lost_answer_comes_again_and_is_counted_once():
    """The first attempt is reset, the second is not: the answer is the stored one."""
    seed = next(s for s in range(100) if [plan(Faults(s, reset=0.5), b"a", n).kind for n in (0, 1)] == ["reset", None])
    app = with_faults(app_of(), Faults(seed, reset=0.5))
    key = {"idempotency-key": "a"}
    with pytest.raises(ConnectionResetError):
        infer(app, headers=key)
    assert scores_of(infer(app, headers=key))[0].shape == (2, 3, 4)
    assert computed(app) == 6


@pytest.mark.parametrize("kind", ["malformed", "truncated"])
def test_garbage_is_no_answer(kind):
    for seed in range(8):
        response = infer(with_faults(app_of(), Faults(seed, **{kind: 1.0})))
        with pytest.raises(ResponseFormatError):
            scores_of(response)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("nan", (2, 3, 4)), ("dropped_label", (2, 3, 3)), ("reordered", (3, 2, 4)), ("short", (2, 2, 4))],
)
def test_scores_are_spoilt(kind, shape):
    scores, head = scores_of(infer(certain(kind)))
    assert scores.shape == shape
    assert np.isnan(scores).sum() == (kind == "nan")
    assert head["parameters"]["num_requests"] == 6


def test_scores_are_rounded_typed_and_noisy():
    clean, _ = scores_of(infer(app_of()))
    rounded, _ = scores_of(infer(with_faults(app_of(), Faults(decimals=2))))
    np.testing.assert_allclose(rounded, np.round(clean, 2), atol=1e-6)
    half, _ = scores_of(infer(with_faults(app_of(), Faults(dtype="float16"))))
    np.testing.assert_array_equal(half, clean.astype(np.float16).astype(np.float32))
    brain, _ = scores_of(infer(with_faults(app_of(), Faults(dtype="bfloat16"))))
    assert 0 < np.abs(brain / clean - 1).max() <= 2**-8
    large = np.zeros((10, 100, 4), np.float32)
    noise = spoil(Faults(noise=0.1), plan(Faults(), b"", 0), large)
    assert abs(noise.std() - 0.1) < 4 * 0.1 / (2 * noise.size) ** 0.5


def test_json_can_hold_what_is_no_number():
    entries = [{"name": n, "shape": x.shape, "datatype": "FP32", "data": x.tolist()} for n, x in vectors().items()]
    (response,) = send(certain("nan"), ("POST", INFER, json.dumps({"inputs": entries}), None))
    with pytest.raises(ResponseFormatError, match="NaN"):
        scores_of(response)


def test_the_fingerprint_flips():
    app = with_faults(app_of(), Faults(flip_after=2))
    prints = [scores_of(infer(app))[1]["parameters"]["system_fingerprint"] for _ in range(4)]
    assert prints == [linear().fingerprint] * 2 + [FLIPPED] * 2


def test_each_fault_is_told():
    told = []
    app = with_faults(app_of(), SOME, told.append)
    for n in range(20):
        infer(app, vectors(seed=n))
    expected = Counter(told)
    assert set(expected) <= {"rate_limited", "server_error", "nan", "malformed"}
    assert sum(expected.values()) > 5


def test_faults_come_from_a_file(tmp_path):
    (tmp_path / "faults.json").write_text('{"rate_limited": 0.1, "seed": 4}')
    (tmp_path / "faults.toml").write_text("rate_limited = 0.1\nseed = 4\n")
    assert read_faults(tmp_path / "faults.json") == read_faults(tmp_path / "faults.toml") == Faults(4, rate_limited=0.1)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rate": 0.1}', '{"nan": 2}', '{"nan": "often"}', '{"nan": 0.6, "short": 0.6}']
)
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "faults.json").write_text(text)
    with pytest.raises(TaskError, match="cannot read the faults"):
        read_faults(tmp_path / "faults.json")


@pytest.mark.parametrize(
    "wrong", [{"nan": -0.1}, {"nan": 1.1}, {"noise": -1.0}, {"latency": float("inf")}, {"dtype": "int8"}]
)
def test_impossible_faults_are_refused(wrong):
    with pytest.raises(ValueError, match="the fault"):
        Faults(**wrong)


@pytest.mark.parametrize("kind", ["timeout", "reset", "truncated"])
def test_connections_are_closed_on_a_socket(kind, caplog):
    body, headers = message()
    app = with_faults(app_of(), Faults(1, **{kind: 1.0}, hang_seconds=0.05))
    with listening(app) as address, httpx2.Client() as client, pytest.raises(httpx2.TransportError):
        client.post(f"http://{address}{INFER}", content=body, headers=headers)
    assert not caplog.records


def test_a_client_that_leaves_ends_the_hanging(caplog):
    body, headers = message()
    with listening(with_faults(app_of(), Faults(timeout=1.0))) as address, httpx2.Client(timeout=0.3) as client:
        with pytest.raises(httpx2.ReadTimeout):
            client.post(f"http://{address}{INFER}", content=body, headers=headers)
        assert client.get(f"http://{address}/v2/health/live").json() == {"live": True}
    assert not caplog.records
