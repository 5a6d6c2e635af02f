"""The command line on texts: a random RoBERTa and a random BERT from folders, with the real tokenizers and texts."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from serving import listening
from transformers import BertConfig, RobertaConfig

from fedbbpt_jax import cli
from fedbbpt_jax.black_box.server.app import create_app
from fedbbpt_jax.commands.serve import Serve, load_served_model
from fedbbpt_jax.models.bert import BERT_DIALECT, BertEncoder
from fedbbpt_jax.models.checkpoint import write_model
from fedbbpt_jax.models.roberta import ROBERTA_DIALECT, RobertaForMaskedLM
from fedbbpt_jax.training.experiment import TextOptions

DATA = Path(os.environ.get("FEDBBPT_DATA", "absent"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="FEDBBPT_DATA names no folder")
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
CLIENTS, STEPS, BATCH, SAMPLES = 2, 3, 2, 4
SIZES = ["--num-clients", "2", "--local-steps", "3", "--batch-size", "2", "--num-directions", "4", "--partition", "iid"]
FEW = [*SIZES, "--test-limit", "8", "--shots", "2", "--num-rounds", "2", "--chunk-size", "4", "--quiet"]


def write_random(folder, network, config, dialect, tokenizer):
    folder.mkdir()
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.split(network(config, rngs=nnx.Rngs(0)))[1]))
    rng = np.random.default_rng(0)

    def draw(path, x):
        return (path[-1].key == "scale") + 0.2 * rng.standard_normal(x.shape, np.float32)

    write_model(folder, jax.tree_util.tree_map_with_path(draw, params), config, dialect, "float16")
    for file in ("vocab.json", "merges.txt", "vocab.txt"):
        if (DATA / "tokenizers" / tokenizer / file).is_file():
            shutil.copy(DATA / "tokenizers" / tokenizer / file, folder)
    return str(folder)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    config = RobertaConfig(**SMALL, vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1)
    return write_random(
        tmp_path_factory.mktemp("models") / "roberta", RobertaForMaskedLM, config, ROBERTA_DIALECT, "roberta"
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    config = BertConfig(**SMALL)
    return write_random(tmp_path_factory.mktemp("models") / "bert", BertEncoder, config, BERT_DIALECT, "bert")


def run(tmp_path, *arguments):
    folder = tmp_path / "out"
    tmp_path.mkdir(exist_ok=True)
    assert cli.main(["run", *arguments, *FEW, "--output-dir", str(folder)]) == 0
    return folder, json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_policy_gradient_on_a_masked_language_model(tmp_path, roberta):
    """BDPL: 4 samples of 3 words; a policy and two moments travel each way; the words are told as text."""
    options = ["--prompt-length", "3", "--num-words", "7", "--estimator", "policy-gradient"]
    folder, summary = run(tmp_path, "sst2", "--model", roberta, *options)
    assert summary["num_requests"] == summary["num_valid"] == 2 * CLIENTS * STEPS * SAMPLES * BATCH
    assert summary["num_evaluations"] == 2 * CLIENTS * STEPS * SAMPLES
    assert summary["uplink_bytes"] == summary["downlink_bytes"] == 2 * CLIENTS * 3 * (3 * 7 * 4)
    tensors = load_file(folder / "prompt.safetensors")
    np.testing.assert_allclose(tensors["params"].sum(-1), 1, atol=1e-5)
    assert tensors["prompt"].shape == (3,)
    assert (folder / "prompt.txt").read_text().strip()
    assert not (folder / "prompt.png").exists()


@pytest.mark.slow
def test_fedbpt_on_a_masked_language_model(tmp_path, roberta):
    """Losses relative to those of spoilt copies; d + 2 numbers up, those of the whole cohort down."""
    options = ["--optimizer", "fedbpt", "--replaced", "0.5", "--prompt-length", "50", "--intrinsic-dim", "500"]
    folder, summary = run(tmp_path, "agnews", "--model", roberta, *options)
    assert summary["num_requests"] == summary["num_valid"] == 2 * CLIENTS * (STEPS * SAMPLES + 1) * BATCH * 2
    assert summary["num_evaluations"] == 2 * CLIENTS * (STEPS * SAMPLES + 1) * 2
    assert summary["uplink_bytes"] == 2 * CLIENTS * 502 * 4
    assert summary["downlink_bytes"] == 2 * CLIENTS * CLIENTS * 502 * 4
    prompt = load_file(folder / "prompt.safetensors")["prompt"]
    assert prompt.shape == (500,)
    assert np.abs(prompt).max() > 0


@pytest.mark.slow
def test_cma_es_on_an_encoder_of_sentences(tmp_path, bert):
    """FedAvg-BBT: the means travel, each client keeps its covariance; the papers' metric of the task is reported."""
    options = ["--optimizer", "cma-es", "--prompt-side", "sentence", "--intrinsic-dim", "10"]
    _, summary = run(tmp_path, "cola", "--model", bert, *options)
    assert summary["num_requests"] == 2 * CLIENTS * STEPS * SAMPLES * BATCH
    assert summary["uplink_bytes"] == summary["downlink_bytes"] == 2 * CLIENTS * 10 * 4
    assert -1 <= summary["test_matthews"] <= 1


@pytest.mark.slow
def test_a_prompt_in_each_layer(tmp_path, roberta):
    """BBTv2: six steps of two layers in turn; parameters of all layers travel, the layers' searches stay."""
    options = ["--generator", "deep", "--optimizer", "cma-es", "--prompt-length", "4", "--intrinsic-dim", "10"]
    folder, summary = run(tmp_path, "sst2", "--model", roberta, *options)
    assert summary["num_requests"] == 2 * CLIENTS * STEPS * SAMPLES * BATCH
    assert summary["uplink_bytes"] == summary["downlink_bytes"] == 2 * CLIENTS * 2 * 10 * 4
    prompt = load_file(folder / "prompt.safetensors")["prompt"]
    assert prompt.shape == (2, 10)
    assert (np.abs(prompt).max(1) > 0).all()


@pytest.mark.slow
def test_a_table_of_ones_own(tmp_path, bert):
    """A csv without named parts: they are drawn; its labels name the classes."""
    words = ["fine", "lovely", "great", "bad", "poor", "awful"]
    rows = [
        f"a {a} and {b} {c} film,{'good' if i < 3 else 'bad'}"
        for i, a in enumerate(words)
        for b in words
        for c in words
    ]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    _, summary = run(tmp_path, "--data", str(tmp_path / "mine.csv"), "--model", bert, "--intrinsic-dim", "10")
    assert summary["task"].startswith("mine")
    assert summary["num_requests"] == 2 * CLIENTS * STEPS * 2 * SAMPLES * BATCH  # both sides of 4 directions


SERVED = {
    "fedbpt": ("agnews", ["--optimizer", "fedbpt", "--replaced", "0.5", "--intrinsic-dim", "10"], {}),
    "words": ("sst2", ["--estimator", "policy-gradient", "--num-words", "7"], {"generator": "tokens"}),
    "sentences": ("cola", ["--prompt-side", "sentence", "--intrinsic-dim", "10"], {"prompt_side": "sentence"}),
    "class-texts": ("agnews", ["--intrinsic-dim", "10"], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SERVED)
def test_a_served_model_of_texts(tmp_path, request, case):
    """Prompts travel as word embeddings or token ids, texts as ids, no longer than they are; twice bit for bit."""
    task, options, of_server = SERVED[case]
    model = request.getfixturevalue("roberta" if case in ("fedbpt", "words") else "bert")
    arguments = [task, "--model", model, *options, "--prompt-length", "4"]
    app = create_app(load_served_model(serve(model, task, **of_server)))
    _, here = run(tmp_path / "here", *arguments)
    with listening(app) as address:
        found = [run(tmp_path / name, *arguments, "--url", f"http://{address}") for name in ("first", "second")]
    (folder, summary), (other, _) = found
    assert first_row(folder)["loss"] == pytest.approx(first_row(tmp_path / "here" / "out")["loss"], abs=1e-6)
    for name in ("num_requests", "num_valid", "uplink_bytes", "downlink_bytes", "num_eval_requests"):
        assert summary[name] == here[name]
    assert summary["zero_shot_accuracy"] == here["zero_shot_accuracy"]
    assert (folder / "prompt.safetensors").read_bytes() == (other / "prompt.safetensors").read_bytes()
    assert first_row(folder)["loss"] == first_row(other)["loss"]


def serve(model, task, generator="soft", prompt_side="label", max_length=None):
    text = TextOptions(prompt_length=4, prompt_side=prompt_side)
    return Serve(model, task, generator=generator, text=text, max_length=max_length)


def first_row(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
def test_a_served_model_wants_its_own_prompts(tmp_path, bert, capsys):
    with listening(create_app(load_served_model(serve(bert, "agnews")))) as address:
        arguments = ["agnews", "--model", bert, "--prompt-length", "5", "--url", f"http://{address}"]
        assert cli.main(["run", *arguments, *FEW, "--output-dir", str(tmp_path / "out")]) == 2
    assert "prompt (FP32 [-1, 4, 16])" in capsys.readouterr().err


@pytest.mark.slow
def test_a_served_model_tells_how_long_texts_are(tmp_path, bert, capsys):
    """Before the first query; a server that takes longer ones is asked as any other."""
    short, long = (serve(bert, "cola", prompt_side="sentence", max_length=length) for length in (8, 48))
    arguments = ["cola", "--model", bert, "--prompt-side", "sentence", "--prompt-length", "4", "--intrinsic-dim", "10"]
    with listening(create_app(load_served_model(short))) as address:
        code = cli.main(["run", *arguments, *FEW, "--url", f"http://{address}", "--output-dir", str(tmp_path / "out")])
    assert code != 0
    assert "the server takes 8: serve it with --max-length" in capsys.readouterr().err
    with listening(create_app(load_served_model(long))) as address:
        run(tmp_path / "long", *arguments, "--url", f"http://{address}")


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 513])
def test_a_served_model_has_only_so_many_positions(bert, length):
    with pytest.raises(ValueError, match=r"--max-length must be 3 to 508 .*, got"):
        load_served_model(serve(bert, "cola", prompt_side="sentence", max_length=length))
    with pytest.raises(ValueError, match="for texts that are sent"):
        load_served_model(serve(bert, "cola", max_length=length))


@pytest.mark.slow
def test_a_dry_run_tells_the_cost_first(tmp_path, roberta, capsys):
    arguments = ["agnews", "--model", roberta, "--estimator", "policy-gradient", "--num-words", "9", "--dry-run"]
    assert cli.main(["run", *arguments, *SIZES, "--shots", "2", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    cost = json.loads(out)["forecast"]
    assert cost["num_requests"] == cost["num_rounds"] * CLIENTS * STEPS * SAMPLES * BATCH <= 64_000
    assert cost["uplink_bytes"] == cost["num_rounds"] * CLIENTS * 3 * (5 * 9 * 4)
    assert 0 < cost["seconds"] < 10_000
    assert f"would cost {cost['num_requests']:,} requests" in err
    assert f"and {cost['num_eval_requests']:,} for evaluation" in err


BAD_INPUTS = {
    "label-word": (["--label-words", " terrible", " greatest-ever"], "' greatest-ever' is "),
    "number-of-words": (["--label-words", " bad"], "as many label words, got 1"),
    "long-prompt": (["--prompt-length", "600"], "a prompt of 600 tokens"),
    "template": (["--templates", "{0} It was."], "and [MASK], each once"),
    "no-words": (["--estimator", "policy-gradient", "--vocabulary", "empty.txt"], "no words for a prompt"),
    "no-file": (["--estimator", "policy-gradient", "--vocabulary", "absent.txt"], "no words for a prompt"),
    "pictures": (["--generator", "frame"], "--generator frame is not for texts"),
    "words-by-spsa": (["--generator", "tokens"], "goes with --estimator policy-gradient"),
    "words-by-cma": (["--estimator", "policy-gradient", "--optimizer", "cma-es"], "is not for words"),
    "replaced": (["--replaced", "1.5"], "--replaced must be in [0, 1]"),
    "deep-fedbpt": (["--generator", "deep", "--optimizer", "fedbpt"], "got --generator deep"),
    "deep-served": (["--generator", "deep", "--url", "http://127.0.0.1:9"], "no prompt in each layer"),
    "no-column": (["--data", "no-label.csv"], "no-label.csv"),
    "few": (["--data", "few.csv"], "16 shots"),
}


@pytest.mark.slow
def test_an_encoder_has_no_prompt_in_each_layer(bert, capsys):
    assert cli.main(["run", "sst2", "--model", bert, "--generator", "deep", "--quiet"]) == 2
    assert "--generator deep is for masked language models" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_one_line(tmp_path, monkeypatch, roberta, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("no-label.csv").write_text("sentence\nfine\n")
    Path("few.csv").write_text("sentence,label\n" + "fine,positive\n" * 3 + "bad,negative\n" * 3)
    assert cli.main(["run", "sst2", "--model", roberta, *arguments, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not Path("runs").exists()
