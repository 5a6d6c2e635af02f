"""`fedbbpt serve`: what it serves is the box of a run, and it refuses what must not be served."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx2
import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig

from fedbbpt_jax import cli
from fedbbpt_jax.black_box.frozen import query_only
from fedbbpt_jax.black_box.protocol import HEAD_LENGTH, decode, encode, named_leaves
from fedbbpt_jax.black_box.rows import in_rows
from fedbbpt_jax.black_box.server.app import create_app
from fedbbpt_jax.commands import serve
from fedbbpt_jax.commands.serve import Serve, load_served_model, row_like, served_experiment
from fedbbpt_jax.data.text_encoding import encode_sentences
from fedbbpt_jax.models.bert import BERT_DIALECT, BertEncoder
from fedbbpt_jax.models.checkpoint import write_model
from fedbbpt_jax.models.roberta import ROBERTA_DIALECT, RobertaForMaskedLM
from fedbbpt_jax.models.sentence_classifiers import embed_sentences
from fedbbpt_jax.training.experiment import TextOptions
from fedbbpt_jax.training.load import load_classifier, load_experiment_task
from fedbbpt_jax.training.load_texts import text_model
from fedbbpt_jax.types import Query

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
PROMPT, COMMAND = 3, "import sys; from fedbbpt_jax.cli import main; sys.exit(main())"


def send(app, path, body, headers=None):
    async def post():
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            content = body if isinstance(body, bytes) else json.dumps(body)
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(post())


def ask(app, name, query):
    """Returns the scores of a query of one client, over HTTP, and the head of the answer."""
    tensors = named_leaves("prompt", query.prompt[0]) | named_leaves(
        "inputs", jax.tree.map(lambda x: x[0], query.inputs)
    )
    body, length = encode("inputs", tensors, {"parameters": {"binary_data_output": True}})
    response = send(app, f"/v2/models/{name}/infer", body, {HEAD_LENGTH: str(length)})
    assert response.status_code == 200, response.text
    found, head = decode("outputs", response.content, int(response.headers[HEAD_LENGTH]))
    return found["scores"], head


def in_process(command, query):
    """Returns what the box of a run answers in the rows of the served one."""
    e = served_experiment(command)
    task = load_experiment_task(e)
    box = query_only(load_classifier(e, task))
    return in_rows(box, row_like(e, task), command.num_rows)(query).scores[0]


def test_the_box_of_a_run_is_served_bitwise():
    command = Serve(task="sensor", num_rows=4)
    model = load_served_model(command)
    task = load_experiment_task(served_experiment(command))
    prompt = np.random.default_rng(0).normal(0, 0.1, (1, 2, 32, 32, 3)).astype(np.float32)
    query = Query(prompt, np.asarray(task.train.inputs[None, :3]))
    scores, head = ask(create_app(model), "mini-clip", query)
    np.testing.assert_array_equal(scores, in_process(command, query))
    assert model.class_names == task.class_names
    assert head["parameters"]["num_requests"] == 6


# Texts


def write_tokenizer(folder):
    """Writes a tokenizer of whole words, with RoBERTa's special tokens."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{n}" for n in range(40)), "It", "was", "good", "bad", "."]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in names.items()})
    fast.save_pretrained(folder)


def write_random(folder, network, config, dialect):
    """Writes a random checkpoint and its tokenizer."""
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.split(network(config, rngs=nnx.Rngs(0)))[1]))
    rng = np.random.default_rng(0)

    def draw(path, x):
        return (path[-1].key == "scale") + 0.2 * rng.standard_normal(x.shape, np.float32)

    write_model(folder, jax.tree_util.tree_map_with_path(draw, params), config, dialect, "float32")
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Returns a file of texts, a random RoBERTa and a random BERT."""
    folder = tmp_path_factory.mktemp("served")
    lines = [f"w{n % 40} w{n % 7}{' w3' * (n % 5)} w{n // 40},{('bad', 'good')[n % 2]}\n" for n in range(160)]
    (folder / "notes.csv").write_text("text,label\n" + "".join(lines))
    sizes = {"vocab_size": 50, "max_position_embeddings": 60, "pad_token_id": 1, "type_vocab_size": 1}
    roberta = RobertaConfig(**SMALL, **sizes, bos_token_id=0, eos_token_id=2)
    bert = BertConfig(**SMALL, **sizes)
    return {
        "data": str(folder / "notes.csv"),
        "roberta": write_random(folder / "roberta", RobertaForMaskedLM, roberta, ROBERTA_DIALECT),
        "bert": write_random(folder / "bert", BertEncoder, bert, BERT_DIALECT),
    }


KINDS = {
    "masked-soft": ("roberta", {"generator": "soft", "templates": ("{0} It was [MASK] .",)}),
    "masked-tokens": ("roberta", {"generator": "tokens", "templates": ("{0} It was [MASK] .",)}),
    "sentences": ("bert", {"text": TextOptions(prompt_side="sentence", prompt_length=PROMPT)}),
    "labels": ("bert", {"text": TextOptions(prompt_length=PROMPT)}),
}


def text_command(texts, kind):
    model, options = KINDS[kind]
    words = options.get("text", TextOptions(prompt_length=PROMPT))
    return Serve(texts[model], data=texts["data"], num_rows=4, **{**options, "text": words})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_boxes_of_texts_are_served_bitwise(texts, kind):
    """Inputs of a part of the data, shorter than the longest text too; and the same texts over OpenAI's routes."""
    command = text_command(texts, kind)
    model = load_served_model(command)
    task = load_experiment_task(served_experiment(command))
    inputs = jax.tree.map(lambda x: np.asarray(x)[None, :5], task.train.inputs)
    shape, rng = (1, 3, *model.rows.like.prompt.shape[2:]), np.random.default_rng(0)
    if kind == "masked-tokens":
        query = Query(rng.integers(5, 45, shape).astype(np.int32), inputs)
    else:
        query = Query(rng.normal(size=shape).astype(np.float32), inputs)
    app = create_app(model)
    scores, head = ask(app, model.name, query)
    np.testing.assert_array_equal(scores, in_process(command, query))
    assert head["parameters"]["num_requests"] == 15
    prompts = ["w1 w2 w3", "w4", "w9 w9 w9 w9"]
    asked = [{"model": model.name, "prompt": prompt, "logprobs": 2} for prompt in (prompts, prompts[1])]
    responses = [send(app, "/v1/completions", one) for one in asked]
    assert [r.status_code for r in responses] == [200, 200], responses[0].text
    together, alone = (r.json()["choices"] for r in responses)
    assert together[1]["logprobs"] == alone[0]["logprobs"]
    assert np.isfinite(alone[0]["logprobs"]["token_logprobs"]).all()
    embedded = send(app, "/v1/embeddings", {"model": model.name, "input": prompts})
    if command.model == texts["roberta"]:
        assert embedded.status_code == 404
    else:
        vectors = np.array([one["embedding"] for one in embedded.json()["data"]])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        bert = text_model(command.model, None)
        known = embed_sentences(bert, encode_sentences([(prompt,) for prompt in prompts], bert.tokenizer, 16))
        np.testing.assert_allclose(vectors, known, atol=1e-5)


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "FEDBBPT_TOKEN"),
        (["--faults", "absent.toml"], "cannot read the faults in absent.toml"),
        (["--port", "99999"], "cannot listen on"),
        (["--task", "unheard-of"], "unheard-of"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDBBPT_TOKEN", raising=False)
    port = [] if "--port" in arguments else ["--port", "0"]
    code = cli.main(["serve", "mini-clip", *port, *arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_taken_address_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_without_the_servers_packages_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == "fedbbpt: a server needs more packages: pip install 'fedbbpt_jax[serve]'\n"


@pytest.mark.slow
def test_the_package_needs_no_server():
    """Importing the library and its command line imports nothing of the extra."""
    code = "import sys, fedbbpt_jax.cli; assert not {'fastapi', 'uvicorn', 'prometheus_client'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_end(number):
    environment = os.environ | {"FEDBBPT_TOKEN": "secret"}
    arguments = [sys.executable, "-c", COMMAND, "serve", "mini-clip", "--port", "0", "--fault.decimals", "3"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"serving (http://\S+),", line)
        assert address, line
        refused = httpx2.get(address[1])
        told = httpx2.get(address[1], headers={"authorization": "Bearer secret"})
        process.send_signal(number)
        rest = process.stderr.read()
    assert (refused.status_code, told.status_code, process.returncode, rest) == (401, 200, 0, "")
    assert "secret" not in line
