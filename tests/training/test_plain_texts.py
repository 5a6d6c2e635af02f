"""A served language model that is asked in plain text: a run, its replay, its forecast and its budgets."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fedbbpt_jax import cli
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.training.plain_texts import asked

WORDS = {"good": ["fine", "lovely", "great"], "bad": ["awful", "dull", "poor"]}
SIZES = "--num-clients 2 --num-directions 4 --local-steps 2 --batch-size 4 --num-rounds 2 --eval-every 1 --shots 8"
OPTIONS = [*SIZES.split(), "--estimator", "policy-gradient-logits", "--prompt-length", "2", "--model", "lm", "--quiet"]


class LanguageModel(BaseHTTPRequestHandler):
    """Goes on with "good" where there are more good words than bad ones, and is surer after the word "film"."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": "lm"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_chat = self.path == "/v1/chat/completions"
        texts = [body["messages"][0]["content"]] if is_chat else body["prompt"]
        self.server.asked += texts
        choices = [self.choice(i, text, body) for i, text in enumerate(texts)]
        tokens = sum(len(text.split()) + 1 for text in texts)
        with self.server.lock:
            self.server.tokens += tokens
        self.reply({"model": "lm-1", "choices": choices, "usage": {"total_tokens": tokens}})

    def choice(self, index, text, body):
        words = text.split()
        lead = sum(w in WORDS["good"] for w in words) - sum(w in WORDS["bad"] for w in words)
        good = 1 / (1 + math.exp(-lead * (1 + 2 * ("film" in words))))
        if "messages" in body and "logprobs" not in body:
            return {"index": index, "message": {"content": "Good!" if good > 0.5 else "It was bad."}}
        tops = {" good": math.log(0.9 * good), " bad": math.log(0.9 * (1 - good)), ".": math.log(0.1)}
        if "messages" in body:
            listed = [{"token": token, "logprob": value} for token, value in tops.items()]
            return {"index": index, "logprobs": {"content": [{"top_logprobs": listed}]}}
        return {"index": index, "logprobs": {"top_logprobs": [tops]}}

    def reply(self, body):
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), LanguageModel)
    found.asked, found.tokens, found.lock, found.daemon_threads = [], 0, threading.Lock(), True
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def reviews(tmp_path):
    """A table of one's own: 80 texts of two classes."""
    rows = [f"the film number {i} was {WORDS[label][i % 3]},{label}" for i in range(40) for label in ("bad", "good")]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return tmp_path / "reviews.csv"


def arguments(server, reviews, *more):
    url = f"http://127.0.0.1:{server.server_address[1]}"
    template = ["--templates", "{0} It was [MASK]"]
    return ["run", "--data", str(reviews), "--url", url, *template, *OPTIONS, *more]


@pytest.mark.slow
@pytest.mark.parametrize("api", ["completions", "chat", "written"])
def test_a_run_and_its_replay(server, reviews, tmp_path, api):
    folder = tmp_path / "run"
    assert cli.main(arguments(server, reviews, "--api", api, "--output-dir", str(folder))) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_requests"] == summary["num_valid"] == 2 * 2 * 2 * 4 * 4
    assert summary["zero_shot_accuracy"] == 1.0
    assert summary["billed_tokens"] == server.tokens
    prompt = (folder / "prompt.txt").read_text().strip()
    assert prompt
    assert any(text.startswith(prompt) and text.endswith("It was") for text in server.asked)
    num_asked = len(server.asked)
    assert num_asked <= summary["num_requests"] + summary["num_eval_requests"]
    assert cli.main(["replay", str(folder), "--quiet"]) == 0
    assert len(server.asked) == num_asked


@pytest.mark.slow
def test_a_probe(server, reviews, capsys):
    options = arguments(server, reviews, "--api", "chat")[1:]
    address = options.pop(options.index("--url") + 1)
    options.remove("--url")
    options.remove("--quiet")
    assert cli.main(["probe", address, *options, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["num_tops"], found["noise"], found["num_distinct"], found["unusable"]) == (3, 0, 1, 0)
    assert found["alone_or_together"] == found["order"] == 0
    assert found["perturbation_size"] is None
    assert "tells of 3 first tokens" in err
    run = arguments(server, reviews, "--api", "chat", "--perturbation-size", "auto")
    assert cli.main(run) == 2
    assert "not for words" in capsys.readouterr().err


@pytest.mark.slow
def test_budgets_of_tokens_and_money(server, reviews, tmp_path, capsys):
    prices = tmp_path / "prices.toml"
    prices.write_text("[lm]\nper_request = 0.5\nper_million_tokens = 2\n")
    run = arguments(server, reviews, "--api", "completions", "--prices", str(prices))
    assert cli.main([*run, "--dry-run", "--json", "-"]) == 0
    cost = json.loads(capsys.readouterr().out)["forecast"]
    assert not server.asked
    num_requests = cost["num_requests"] + cost["num_eval_requests"]
    assert cost["money"] == pytest.approx(0.5 * num_requests + 2e-6 * cost["tokens"])
    assert cost["tokens"] == pytest.approx(10 * num_requests, rel=0.3)
    limits = {"--max-tokens": "4000", "--max-money": f"{0.25 * num_requests}"}
    for name, value in limits.items():
        assert cli.main([*run, name, value, "--output-dir", str(tmp_path / name)]) == 3
        assert f"the budget of {float(value):.12g}" in capsys.readouterr().err
        assert 0 < len(server.asked) < num_requests
        assert server.tokens <= 4000 or name != "--max-tokens"
        assert 0.5 * len(server.asked) <= 0.25 * num_requests or name != "--max-money"
        server.asked, server.tokens = [], 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--api", "chat", "--templates", "[MASK] News: {0}"], "--templates must end in [MASK]"),
        (["--api", "chat", "--estimator", "spsa"], "sends words"),
        (["--api", "chat", "--max-money", "3"], "--max-money needs --prices"),
        (["--api", "chat", "--prices", "absent.toml"], "no prices in absent.toml"),
        (["--api", "chat", "--max-tokens", "0"], "--max-tokens must be positive"),
    ],
)
def test_what_does_not_go_together(server, reviews, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments(server, reviews, *more, "--output-dir", str(tmp_path / "run"))) == 2
    assert message in capsys.readouterr().err
    assert not server.asked
    assert not (tmp_path / "run").exists()


def test_a_text_is_asked_up_to_the_label_word():
    assert asked("{0}[SEP]Is it {1}? [MASK].", ("a", "b {0}")) == "a\nIs it b {0}?"
    for template in ("{0}", "{0}? [MASK], {1}", ""):
        with pytest.raises(TaskError, match="must end in"):
            asked(template, ("a", "b"))
