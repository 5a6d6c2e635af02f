"""Soft prompts to servers of language models that take embeddings; no network."""

import base64
import io
import json

import httpx2 as httpx
import numpy as np
import pytest
from fake_server import FakeTime

from fedbbpt_jax.black_box.client.connection import Terms
from fedbbpt_jax.black_box.client.embedding_api import among_embeddings, input_embeds, prompt_embeds
from fedbbpt_jax.black_box.ledger.costs import Cost
from fedbbpt_jax.black_box.ledger.ledger import open_ledger
from fedbbpt_jax.black_box.remote_texts import connect_texts, replayed_texts
from fedbbpt_jax.models.sentence_classifiers import EncodedText
from fedbbpt_jax.types import Query

C, K, B, P, T, E, V = 2, 3, 2, 4, 5, 8, 12
LABELS = [7, 9]
LABEL_WORDS = ("bad", "good")


@pytest.fixture
def ledger():
    return open_ledger(None, "run")


def query_of(prompt):
    rng = np.random.default_rng(1)
    attended = np.arange(T) < np.array([[5, 3], [4, 2]])[..., None]  # [C, B, T]
    return Query(prompt, EncodedText(rng.integers(0, V, (C, B, T)).astype(np.int32), attended))


def soft_prompts():
    return np.random.default_rng(0).normal(size=(C, K, P, E)).astype(np.float32)


def connected(handle, api, ledger, words):
    async def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "words"}]})
        return httpx.Response(200, json=handle(request.url.path, json.loads(request.content)))

    terms = Terms(transport=httpx.MockTransport(answer), clock=FakeTime().clock)
    render = among_embeddings(words)
    return connect_texts("http://box.test", api, ledger, render=render, label_words=LABEL_WORDS, terms=terms)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_embeddings_as_lists_of_numbers(ledger):
    """SGLang's way: what the server gets is, bit for bit, the prompt behind the first token of a text."""
    rng = np.random.default_rng(2)
    words, head = rng.normal(size=(V, E)).astype(np.float32), rng.normal(size=(E, V))
    query, asked = query_of(soft_prompts()), []

    def scores_of(embedded):
        return log_softmax(np.asarray(embedded, np.float64).mean(0) @ head)

    def handle(path, body):
        assert path == "/generate"
        assert "text" not in body
        asked.extend(body["input_embeds"])
        found = [scores_of(x) for x in body["input_embeds"]]
        told = [[[row[number], number, None] for number in body["token_ids_logprob"]] for row in found]
        counts = [{"prompt_tokens": len(x), "completion_tokens": 1} for x in body["input_embeds"]]
        return [{"meta_info": {"output_token_ids_logprobs": [t], **c}} for t, c in zip(told, counts, strict=True)]

    api = input_embeds("words", LABELS, most_texts=2 * K)
    with connected(handle, api, ledger, words) as box:
        scores, valid = box(query)
        assert valid.all()
        again, _ = box(query)
    np.testing.assert_array_equal(again, scores)
    assert len(asked) == C * K * B  # what is answered is not asked again
    ids, attended = query.inputs
    for c, k, b in np.ndindex(C, K, B):
        embedded = words[ids[c, b][attended[c, b]]]
        whole = np.concatenate([embedded[:1], query.prompt[c, k], embedded[1:]])
        assert any(np.array_equal(np.float32(x), whole) for x in asked if len(x) == len(whole))
        np.testing.assert_allclose(scores[c, k, b], scores_of(whole)[LABELS], rtol=1e-5)
    num_tokens = K * int(attended.sum() + C * B * (P + 1))
    assert ledger.balance().answered == Cost(C * K * B, num_tokens)
    replayed = replayed_texts(ledger, api, render=among_embeddings(words), label_words=LABEL_WORDS)
    np.testing.assert_array_equal(replayed(query).scores, scores)


@pytest.mark.parity
def test_embeddings_as_tensors(ledger):
    """vLLM's way, of a decoder of transformers: a prompt of a word's embeddings does what the words would have done."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": E, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **sizes)).eval()
    words = model.model.embed_tokens.weight.detach().numpy()
    names = {number: f" w{number}" for number in range(V)} | dict(zip(LABELS, LABEL_WORDS, strict=True))

    def encode(x):
        buffer = io.BytesIO()
        torch.save(torch.from_numpy(x), buffer)
        return base64.b64encode(buffer.getvalue()).decode()

    def handle(path, body):
        assert path == "/v1/completions"
        assert "prompt" not in body
        choices, num_tokens = [], 0
        for index, text in enumerate(body["prompt_embeds"]):
            embedded = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
            assert embedded.dtype == torch.float32
            with torch.no_grad():
                logits = model(inputs_embeds=embedded[None]).logits[0, -1]
            tops = {names[n]: float(x) for n, x in enumerate(torch.log_softmax(logits, -1)) if n in LABELS}
            choices.append({"index": index, "logprobs": {"top_logprobs": [tops]}})
            num_tokens += len(embedded) + 1
        return {"model": "words", "choices": choices, "usage": {"total_tokens": num_tokens}}

    spoken = np.random.default_rng(3).integers(0, V, (C, K, P))
    query = query_of(words[spoken])
    with connected(handle, prompt_embeds("words", encode), ledger, words) as box:
        scores, valid = box(query)
    assert valid.all()
    ids, attended = query.inputs
    for c, k, b in np.ndindex(C, K, B):
        text = ids[c, b][attended[c, b]]
        whole = torch.from_numpy(np.concatenate([text[:1], spoken[c, k], text[1:]]).astype(np.int64))
        with torch.no_grad():
            expected = torch.log_softmax(model(whole[None]).logits[0, -1], -1).numpy()[LABELS]
        np.testing.assert_allclose(scores[c, k, b], expected, rtol=1e-5)
