"""Label words from servers of language models; no network."""

import json
import math
import zlib

import httpx2 as httpx
import numpy as np
import pytest
from fake_server import FakeTime, status

from fedbbpt_jax.black_box.client.connection import Terms
from fedbbpt_jax.black_box.client.text_api import NOT_WRITTEN, chat, completions, sglang, written, written_scores
from fedbbpt_jax.black_box.ledger.costs import Balance, Budget, Cost
from fedbbpt_jax.black_box.ledger.ledger import open_ledger, replay_ledger
from fedbbpt_jax.black_box.remote_texts import connect_texts, replayed_texts
from fedbbpt_jax.errors import BudgetExceededError, JournalError, ModelDriftError, QueryFailedError
from fedbbpt_jax.types import Query

C, K, B = 2, 3, 4
WORDS = (" bad", " good")
QUERY = Query(np.arange(C * K * 2).reshape(C, K, 2), np.arange(C * B).reshape(C, B, 1) + 100)
APIS = {"chat": chat("words"), "completions": completions("words")}


def render(prompt, inputs):
    return f"{prompt.tolist()} {inputs.tolist()} It was"


def probability(text):
    """Returns how good a text is, of its bytes alone."""
    return 0.1 + 0.8 * (zlib.crc32(text.encode()) % 1000) / 1000


class Words:
    """A server of two label words and a third; `change` spoils the body of its answers, in turn."""

    def __init__(self):
        self.changes, self.posts, self.fingerprint = [], [], "fp1"

    async def handle(self, request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "words"}, {"id": "other"}]})
        asked = json.loads(request.content)
        self.posts.append(asked)
        is_chat = request.url.path.startswith("/v1/chat")
        texts = [asked["messages"][0]["content"]] if is_chat else asked["prompt"]
        choices = [self.choice(i, text, is_chat) for i, text in enumerate(texts)]
        usage = {"total_tokens": 7 * len(texts)}
        body = {"model": "words-1", "choices": choices[::-1], "usage": usage, "system_fingerprint": self.fingerprint}
        change = self.changes.pop(0) if self.changes else None
        changed = change(body) if change else None
        return changed if isinstance(changed, httpx.Response) else httpx.Response(200, content=json.dumps(body))

    def choice(self, index, text, is_chat):
        good = math.log(probability(text) / 2)
        tops = {"good": good, " good": good, " bad": math.log(1 - probability(text) - 0.05), ".": math.log(0.05)}
        if is_chat:
            listed = [{"token": token, "logprob": value, "bytes": None} for token, value in tops.items()]
            return {"index": index, "finish_reason": "length", "logprobs": {"content": [{"top_logprobs": listed}]}}
        return {"index": index, "finish_reason": "length", "logprobs": {"top_logprobs": [tops]}}


@pytest.fixture
def server():
    return Words()


@pytest.fixture
def ledger():
    return open_ledger(None, "run")


def open_box(server, ledger, api, **options):
    terms = Terms(transport=httpx.MockTransport(server.handle), clock=FakeTime().clock, **options)
    return connect_texts("http://box.test", api, ledger, render=render, label_words=WORDS, terms=terms)


def expected():
    good = np.array([[[probability(render(p, x)) for x in QUERY.inputs[c]] for p in QUERY.prompt[c]] for c in range(C)])
    return np.log(np.stack([0.95 - good, good], -1))


@pytest.mark.parametrize(("api", "num_messages"), [("chat", C * K * B), ("completions", C)])
def test_scores_are_log_probabilities_of_the_label_words(server, ledger, api, num_messages):
    with open_box(server, ledger, APIS[api]) as box:
        scores, valid = box(QUERY)
        again = box(QUERY)
    np.testing.assert_allclose(scores, expected(), atol=1e-6)
    np.testing.assert_array_equal(scores, again.scores)
    assert valid.shape == (C, K, B)
    assert valid.all()
    assert len(server.posts) == num_messages
    assert ledger.balance() == Balance(answered=Cost(C * K * B, 7 * C * K * B))  # as the server says


@pytest.mark.parametrize(("most_texts", "sizes"), [(6, [6, 6] * C), (5, [3] * 4 * C), (2, [1] * 12 * C)])
def test_candidates_of_an_example_stay_together_where_they_fit(server, ledger, most_texts, sizes):
    with open_box(server, ledger, completions("words", most_texts=most_texts)) as box:
        np.testing.assert_allclose(box(QUERY).scores, expected(), atol=1e-6)
    assert [len(asked["prompt"]) for asked in server.posts] == sizes


@pytest.mark.parametrize("api", APIS)
def test_a_run_is_replayed_without_a_server(server, tmp_path, api):
    with open_ledger(tmp_path / "j", "run") as ledger, open_box(server, ledger, APIS[api]) as box:
        first = box(QUERY)
    num_posts = len(server.posts)
    with replay_ledger(tmp_path / "j") as ledger:
        box = replayed_texts(ledger, APIS[api], render=render, label_words=WORDS)
        for a, b in zip(first, box(QUERY), strict=True):
            np.testing.assert_array_equal(a, b)
        with pytest.raises(JournalError, match="not the same run"):
            box(QUERY._replace(prompt=QUERY.prompt + 1))
        with pytest.raises(JournalError, match="the ledger is of"):
            replayed_texts(ledger, APIS[api], render=render, label_words=("no", "yes"))
    assert len(server.posts) == num_posts
    assert b"It was" not in (tmp_path / "j").read_bytes()


def top(body):
    return body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda body: top(body)[2].update(token=" poor"), "missing"),
        (lambda body: top(body)[2].update(logprob=-9999.0), "missing"),
        (lambda body: top(body)[2].update(logprob=math.nan), "nan"),
        (lambda body: top(body)[2].update(logprob=-math.inf), "infinite"),
        (lambda body: top(body)[2].update(logprob=1e300), "infinite"),
        (lambda body: top(body)[2].update(logprob=0.5), "too high"),
        (lambda body: body["choices"][0].update(finish_reason="content_filter", logprobs=None), "missing"),
    ],
)
def test_a_row_without_all_its_label_words_is_not_used(server, ledger, change, kind):
    server.changes = [change]
    with open_box(server, ledger, APIS["chat"]) as box:
        scores, valid = box(QUERY)
        assert box.counts == {"attempts": C * K * B, kind: 1}
    assert (~valid).sum() == 1
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores[valid], expected()[np.asarray(valid)], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda body: body["choices"].clear(), "choices"),
        (lambda body: body.pop("choices"), "choices"),
        (lambda body: body["choices"][0].update(index=1), "choices"),
        (lambda body: body["choices"][0].update(index=[]), "choices"),
        (lambda body: body["choices"].append(body["choices"][0]), "choices"),
        (lambda body: body["choices"][0].update(logprobs=None), "logprobs"),
        (lambda body: body["choices"][0].pop("logprobs"), "logprobs"),
        (lambda body: top(body)[0].update(logprob="low"), "logprobs"),
        (lambda body: top(body)[0].update(logprob=None), "logprobs"),
        (lambda body: httpx.Response(200, content=b'{"choices": ['), "body"),
        (lambda body: httpx.Response(200, content=b"[]"), "choices"),
    ],
)
def test_what_is_no_answer_is_asked_for_again(server, ledger, change, kind):
    server.changes = [None, change]
    with open_box(server, ledger, APIS["chat"]) as box:
        assert box(QUERY).valid.all()
        assert box.counts == {"attempts": C * K * B + 1, kind: 1}
    assert ledger.balance().in_doubt.num_requests == 1  # such servers charge again


@pytest.mark.parametrize("code", ["context_length_exceeded", "content_filter"])
def test_a_text_that_is_refused_costs_nothing_and_the_others_go_on(server, ledger, code):
    server.changes = [lambda body: status(400, code=code, message="no")(None)]
    with open_box(server, ledger, APIS["chat"]) as box:
        assert (~box(QUERY).valid).sum() == 1
        assert box.counts == {"attempts": C * K * B, code: 1, "unanswered": 1}
    assert ledger.balance().charged.num_requests == C * K * B - 1


@pytest.mark.parametrize("change", [lambda c: c.update(logprobs=None), lambda c: c.pop("logprobs")])
def test_a_server_that_silently_leaves_log_probabilities_out_is_not_asked_twice(server, ledger, change):
    server.changes = [lambda body: [change(choice) for choice in body["choices"]] and None] * 100
    with (
        open_box(server, ledger, APIS["chat"]) as box,
        pytest.raises(QueryFailedError, match="ask what the server wri"),
    ):
        box(QUERY)
    assert len(server.posts) <= 8  # those that were on their way
    assert not ledger.balance().answered.num_requests


def test_a_model_without_log_probabilities_is_refused_at_once(server, ledger):
    words = "logprobs are not supported with reasoning models"
    server.changes = [lambda body: status(400, code="unsupported_parameter", message=words)(None)] * 100
    with open_box(server, ledger, APIS["chat"]) as box, pytest.raises(QueryFailedError, match=words):
        box(QUERY)
    assert len(server.posts) <= 8


def test_a_model_that_changes_stops_the_run(server, ledger):
    with open_box(server, ledger, APIS["completions"]) as box:
        box(QUERY)
        server.fingerprint = "fp2"
        with pytest.raises(ModelDriftError, match="was 'words-1 fp1' and is now 'words-1 fp2'"):
            box(QUERY._replace(prompt=QUERY.prompt + 1))


def test_tokens_are_reserved_as_an_upper_bound(server):
    ledger = open_ledger(None, "run", Budget(num_tokens=50))
    with open_box(server, ledger, APIS["completions"]) as box, pytest.raises(BudgetExceededError, match="tokens"):
        box(QUERY)
    assert not server.posts


def test_the_server_must_have_the_model(server, ledger):
    with pytest.raises(QueryFailedError, match="has no model 'mine'; it has words, other"):
        open_box(server, ledger, chat("mine"))


@pytest.mark.parametrize("words", [("good",), ("good", " good"), ("", "good")])
def test_label_words_are_different(ledger, words):
    with pytest.raises(ValueError, match="at least two different words"):
        replayed_texts(ledger, APIS["chat"], render=render, label_words=words)


def test_what_a_model_writes_is_its_answer(ledger):
    """A server that tells no log-probabilities at all; the text of each question says what is written."""
    says = {0: "Good.", 1: "It is bad, not good.", 2: "a goodbye", 3: None}

    async def handle(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "words"}]})
        asked = json.loads(request.content)
        assert "logprobs" not in asked
        example = int(asked["messages"][0]["content"].split("[")[2].split("]")[0]) % 100
        message = {"role": "assistant", "content": says[example]}
        return httpx.Response(200, json={"model": "w", "choices": [{"index": 0, "message": message}]})

    terms = Terms(transport=httpx.MockTransport(handle), clock=FakeTime().clock)
    query = Query(QUERY.prompt[:1], QUERY.inputs[:1])
    with connect_texts("http://box.test", written("words"), ledger, render=render, label_words=WORDS, terms=terms) as b:
        scores, valid = b(query)
        assert b.counts["missing"] == 2 * K
    np.testing.assert_array_equal(valid[0], [[True, True, False, False]] * K)
    np.testing.assert_allclose(scores[0, 0], [[NOT_WRITTEN, 0], [0, NOT_WRITTEN], [0, 0], [0, 0]], atol=1e-6)


def test_the_word_that_comes_first_counts():
    assert written_scores("Not terrible, great", [" great", " terrible"]) == [NOT_WRITTEN, 0.0]
    assert written_scores("NEW YORK", ["york", "new york"]) == [NOT_WRITTEN, 0.0]
    assert written_scores("", ["a", "b"]) == written_scores("ab", ["a", "b"]) == [-9999.0, -9999.0]


def answer_of_sglang(body):
    entries = [[math.log(probability(text)), 9, None] for text in body["text"]]
    others = [[math.log(0.95 - probability(text)), 7, " bad"] for text in body["text"]]
    counts = {"prompt_tokens": 6, "completion_tokens": 1}
    return [
        {"text": "x", "meta_info": {"output_token_ids_logprobs": [list(pair)], **counts}}
        for pair in zip(entries, others, strict=True)
    ]


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda found: None, None),
        (lambda found: found[0]["meta_info"]["output_token_ids_logprobs"][0].pop(), "missing"),
        (lambda found: found.pop(), "choices"),
        (lambda found: found[1]["meta_info"].pop("output_token_ids_logprobs"), "logprobs"),
        (lambda found: found[1].pop("meta_info"), "logprobs"),
    ],
)
def test_sglang_tells_any_token(ledger, spoil, kind):
    posts = []

    async def handle(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "words"}]})
        assert request.url.path == "/generate"
        posts.append(json.loads(request.content))
        assert posts[-1]["token_ids_logprob"] == [7, 9]
        found = answer_of_sglang(posts[-1])
        if len(posts) == 2:
            spoil(found)
        return httpx.Response(200, json=found)

    terms = Terms(transport=httpx.MockTransport(handle), clock=FakeTime().clock)
    api = sglang("words", [7, 9])
    with connect_texts("http://box.test", api, ledger, render=render, label_words=WORDS, terms=terms) as box:
        scores, valid = box(QUERY)
        assert box.counts.get(kind, 1) == 1
    assert (~valid).sum() == (kind == "missing")
    np.testing.assert_allclose(scores[valid], expected()[np.asarray(valid)], atol=1e-6)
    assert len(posts) == C + (kind in ("choices", "logprobs"))
    assert ledger.balance().answered == Cost(C * K * B, 7 * C * K * B)
