"""The command line, run in process; every promise it makes about files, fields and exit codes."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fedbbpt_jax import cli
from fedbbpt_jax.commands import run as run_file
from fedbbpt_jax.data.tasks import descriptions, load_task
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.training.experiment import GENERATORS, MODELS, Experiment, estimator_descriptions
from fedbbpt_jax.training.run import run

FILES = {"config.json", "state", "metrics.jsonl", "summary.json", "prompt.safetensors"} | {
    f"{name}.png" for name in ("accuracy", "partition", "prompt")
}
# 5 clients · 10 candidates · 4 steps · 8 examples are 1,600 requests per round.
SIZES = ["--num-clients", "5", "--num-directions", "5", "--local-steps", "4", "--batch-size", "8", "--lr", "0.03"]
TINY = [*SIZES, "--budget", "3200", "--eval-every", "1", "--quiet"]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Returns every path below a folder with the content of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedbbpt {version('fedbbpt_jax')}\n"


KINDS = {
    "tasks": descriptions(),
    "models": MODELS,
    "estimators": estimator_descriptions(),
    "generators": GENERATORS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_list_as_json(kind, capsys):
    assert cli.main(["list", kind, "--json", "-"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == [{"name": name, "description": text} for name, text in KINDS[kind].items()]


@pytest.mark.parametrize("kind", KINDS)
def test_list_for_people(kind, capsys):
    assert cli.main(["list", kind]) == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert first_words == list(KINDS[kind])


def test_list_to_a_file(tmp_path, capsys):
    assert cli.main(["list", "models", "--json", str(tmp_path / "models.json")]) == 0
    assert [entry["name"] for entry in json.loads((tmp_path / "models.json").read_text())] == list(MODELS)
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Two rounds on the default task: exit code, output and folder."""
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["run", *TINY, "--output-dir", str(folder), "--json", "-"])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), folder=folder)


def test_run_prints_its_summary_as_json_and_nothing_else(tiny_run):
    assert tiny_run.code == 0
    assert tiny_run.err == ""
    assert json.loads(tiny_run.out) == summary_of(tiny_run.folder)


def test_run_leaves_all_its_files(tiny_run):
    assert {file.name for file in tiny_run.folder.iterdir()} == FILES


def test_summary_has_all_fields(tiny_run):
    summary = summary_of(tiny_run.folder)
    assert summary["task"] == "sensor"
    assert 0.2 < summary["zero_shot_accuracy"] < 0.6  # a tenth is chance, and the clean task has more than 0.96
    assert summary["test_accuracy"] != summary["zero_shot_accuracy"]
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["num_evaluations"] == 400
    assert summary["num_requests"] == summary["num_valid"] == 3200
    assert summary["num_eval_requests"] == 2 * 1000 + 3 * len(load_task("sensor").validation.labels)
    assert summary["wall_seconds"] > summary["compile_seconds"] > 0
    assert summary["stopped_by"] == "budget"
    assert summary["seed"] == 0


def test_bytes_are_those_of_the_client_states(tiny_run):
    """Twice, 5 clients send 192 parameters and two moments of them in float32 each way."""
    summary = summary_of(tiny_run.folder)
    assert summary["uplink_bytes"] == summary["downlink_bytes"] == 2 * 5 * 3 * 192 * 4
    assert summary["uplink_bytes_per_client"] == summary["downlink_bytes_per_client"] == 3 * 192 * 4


def test_rows_are_the_evaluations(tiny_run):
    first, middle, last = rows_of(tiny_run.folder)
    summary = summary_of(tiny_run.folder)
    assert (first["round"], first["num_requests"], first["uplink_bytes"]) == (0, 0, 0)
    assert last["accuracy"] == summary["validation_accuracy"]
    same = ("round", "num_evaluations", "num_requests", "num_valid", "uplink_bytes", "downlink_bytes", "seed")
    assert [last[name] for name in same] == [summary[name] for name in same]
    assert (middle["round"], middle["num_requests"]) == (1, 1600)
    assert last["round"] == 2


def test_config_says_what_was_run(tiny_run):
    config = json.loads((tiny_run.folder / "config.json").read_text())
    expected = {"task": "sensor", "budget": 3200, "num_rounds": 2, "cohort": 5, "lr": 0.03, "precision": "highest"}
    assert expected.items() <= config.items()
    assert config["seeds"] == [0]


def test_prompt_file_holds_a_prompt_for_each_shown_image(tiny_run):
    stored = load_file(tiny_run.folder / "prompt.safetensors")
    assert stored["params.picture"].shape == (1, 8, 8, 3)
    assert stored["prompt"].shape == (6, 32, 32, 3)
    assert np.abs(stored["prompt"]).max() > 0


@pytest.mark.parametrize("name", ["accuracy.png", "prompt.png"])
def test_figures_can_be_opened(tiny_run, name):
    with Image.open(tiny_run.folder / name) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 400


@pytest.mark.slow
def test_several_seeds_share_a_folder_and_repeat_single_runs(tiny_run, tmp_path, capsys):
    folder = tmp_path / "new"
    arguments = [*TINY, "--num-rounds", "2", "--seeds", "0..1", "--output-dir", str(folder)]
    assert cli.main(["run", *arguments, "--json", str(folder / "out.json")]) == 0
    assert capsys.readouterr() == ("", "")
    assert summary_of(folder) == json.loads((folder / "out.json").read_text())
    figures = summary_of(folder)["runs"]["federated"]
    assert figures["seed"] == [0, 1]
    assert figures["stopped_by"] == ["budget", "budget"]
    assert figures["test_accuracy"][0] == summary_of(tiny_run.folder)["test_accuracy"]
    accuracies = {seed: [row["accuracy"] for row in rows_of(folder) if row["seed"] == seed] for seed in (0, 1)}
    assert accuracies[0] == [row["accuracy"] for row in rows_of(tiny_run.folder)]
    assert accuracies[1] != accuracies[0]


@pytest.mark.slow
def test_comparison_runs_all_baselines_at_equal_requests(tmp_path):
    assert cli.main(["run", *SIZES, "--budget", "6400", "--compare", "--quiet", "--output-dir", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == FILES
    summary = summary_of(tmp_path)
    (white_box,) = summary["white_box"]
    assert white_box["test_accuracy"] > 0.85
    requests = {label: run["num_requests"] for label, run in summary["runs"].items()}
    assert requests == {label: [1600 if "1/4 budget" in label else 6400] for label in requests}
    assert {row["run"] for row in rows_of(tmp_path)} == requests.keys()
    for label in ("federated, iid", "federated", "centralised", "local only, iid"):
        assert 0 < summary["runs"][label]["recovered"][0] < 1


BAD_INPUTS = {
    "api-of-images": (
        ["--url", "http://127.0.0.1:9", "--model", "m", "--api", "chat"],
        "asked about images by --api v2",
    ),
    "unknown-task": (["sensr"], "unknown task 'sensr'; did you mean 'sensor'"),
    "shots-0": (["--shots", "0"], "--shots must be positive and finite, got 0"),
    "alpha-0": (["--partition", "dirichlet:0"], "--partition must be dirichlet:ALPHA with ALPHA > 0"),
    "alpha-inf": (["--partition", "dirichlet:inf"], "--partition must be dirichlet:ALPHA with ALPHA > 0"),
    "clients-0": (["--num-clients", "0"], "--num-clients must be at least 1, got 0"),
    "clients-1000": (["--num-clients", "1000"], "--budget must pay for one round of "),
    "clients-1000-paid": (
        ["--num-clients", "1000", "--budget", "1000000", "--shots", "16"],
        "160 examples cannot be split among 1000 clients",
    ),
    "dropout-1": (["--dropout", "1"], "--dropout must be in [0, 1), got 1.0"),
    "kept-apart": (
        ["--federation", "isolated", "--client-state", "kept"],
        "--client-state kept is of --federation fedavg",
    ),
    "no-server": (
        ["--federation", "isolated", "--server-optimizer", "fedadam"],
        "--server-optimizer has nothing to do",
    ),
    "placement": (["--placement", "shard"], "--placement shard needs a client for each of 8 devices, got 5"),
    "lr-words": (["--lr", "high"], "--lr must be a number, or a list such as 0.003,0.01, got 'high'"),
    "lr-twice": (["--lr", "0.1,0.1"], "--lr must be a number, or a list"),
    "lr-negative": (["--lr", "0.1,-1"], "--lr must be positive and finite, got -1.0"),
    "lr-host": (["--lr", "0.1,0.2", "--placement", "host"], "several step sizes are one program of one process"),
    "lr-texts": (["agnews", "--lr", "0.1,0.2"], "several step sizes are one program with one box"),
    "lr-compared": (["--lr", "0.1,0.2", "--compare"], "--compare is of one step size, got --lr 0.1,0.2"),
    "cohort-6": (["--cohort", "6"], "--cohort must be at most --num-clients 5, got 6"),
    "budget-10": (["--budget", "10"], "--budget must pay for one round of "),
    "budget-of-a-quarter": (["--compare", *SIZES, "--budget", "1600"], "--budget"),
    "seed": (["--seed", "-1"], "--seed must be between 0 and 2**32 - 1, got -1"),
    "seeds-backwards": (["--seeds", "4..0"], "--seeds must be a range such as 0..4 or a list such as 0,3,7"),
    "seeds-twice": (["--seeds", "1,1"], "--seeds must be a range such as 0..4 or a list such as 0,3,7"),
    "seeds-words": (["--seeds", "a..b"], "--seeds must be a range such as 0..4 or a list such as 0,3,7"),
    "occupied-folder": (["--output-dir", "occupied"], "occupied is not empty and may hold another run"),
    "folder-is-a-file": (["--output-dir", "file"], "cannot write to file"),
    "folder-below-a-file": (["--output-dir", "file/below"], "cannot write to file/below"),
    "model-truncated": (["--model", "truncated"], "cannot read truncated/model.safetensors"),
    "model-unknown": (["--model", "nothing"], "'nothing' is no folder here, and the hub gave nothing"),
    "model-no-folder": (["--model", "./nothing"], "./nothing is no folder"),
    "model-of-texts": (["--model", "texts"], "texts holds a 'bert' model; expected 'clip'"),
    "model-without-config": (["--model", "unnamed"], "unnamed holds no config.json"),
    "encoder-is-a-clip": (["--encoder", "clip"], "holds a 'clip' model; expected 'vit_mae' or 'vit'"),
    "data-unknown": (["--data", "nothing/at-all"], "cannot load 'nothing/at-all'"),
    "data-with-an-empty-class": (["--data", "photographs"], "cat"),
    "template": (["--templates", "a photo"], "template"),
    "json-nowhere": ([*TINY, "--json", "nothing/summary.json"], "nothing/summary.json"),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with an older run, a file, spoilt models, and photographs of one class of two."""
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "summary.json").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "truncated").mkdir()
    for file in MINI_CLIP.iterdir():
        content = file.read_bytes()
        (tmp_path / "truncated" / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    for name, config in {"texts": {"model_type": "bert"}, "clip": {"model_type": "clip"}, "unnamed": None}.items():
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    for label in ("cat", "dog"):
        (tmp_path / "photographs" / "train" / label).mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (9, 9)).save(tmp_path / "photographs" / "train" / "dog" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, workplace, capsys):
    before = tree(workplace)
    assert cli.main(["run", "--quiet", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedbbpt: ")
    assert message in err
    assert err.count("\n") == 1
    assert tree(workplace) == before


def test_list_to_a_file_that_cannot_be_written(workplace, capsys):
    assert cli.main(["list", "tasks", "--json", "nothing/tasks.json"]) == 2
    assert "nothing/tasks.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--generator", "none"],
        ["run", "--shots", "many"],
        ["run", "--nothing"],
        ["list", "cats"],
        ["walk"],
    ],
    ids=" ".join,
)
def test_arguments_that_cannot_be_parsed(arguments, workplace, capsys):
    before = tree(workplace)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert arguments[-1].lstrip("-") in capsys.readouterr().err
    assert tree(workplace) == before


def test_an_interrupt_between_rounds_keeps_what_was_reached(tmp_path, monkeypatch, capsys):
    """Ctrl-C as the second of three evaluations is recorded."""

    def append_row(folder, label, row):
        write(folder, label, row)
        if row["round"] == 1:
            raise KeyboardInterrupt

    write = run_file.append_row
    monkeypatch.setattr(run_file, "append_row", append_row)
    assert cli.main(["run", *TINY, "--output-dir", str(tmp_path)]) == 130
    assert {file.name for file in tmp_path.iterdir()} == FILES
    summary = summary_of(tmp_path)
    assert summary["stopped_by"] == "interrupted"
    assert (summary["round"], summary["num_requests"]) == (1, 1600)
    assert summary["test_accuracy"] != summary["zero_shot_accuracy"]
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_an_interrupt_before_the_record_counts_the_rounds_that_it_keeps(monkeypatch):
    """A real Ctrl-C mostly falls between rounds and record, where the loop waits; there the clock is read.

    The prompt starts at zero, so a prompt that has moved was paid for.
    """
    rows, interrupts = [], [KeyboardInterrupt]

    def perf_counter():
        if rows and interrupts:
            raise interrupts.pop()
        return time.perf_counter()

    monkeypatch.setattr("fedbbpt_jax.training.progress.time", SimpleNamespace(perf_counter=perf_counter))
    outcome = run(Experiment(budget=3200, batch_size=8, eval_every=1), rows.append)
    assert outcome.summary["stopped_by"] == "interrupted"
    has_moved = any(leaf.any() for leaf in jax.tree.leaves(outcome.params))
    assert has_moved == (outcome.summary["num_requests"] > 0)


@pytest.mark.slow
def test_an_interrupt_while_a_later_seed_starts_keeps_the_earlier_ones(tmp_path, monkeypatch, capsys):
    def interrupted_later(experiment, on_row, folder):
        if experiment.seed == 1:
            raise KeyboardInterrupt
        return run(experiment, on_row, folder)

    monkeypatch.setattr("fedbbpt_jax.training.compare.run", interrupted_later)
    assert cli.main(["run", *TINY, "--seeds", "0..2", "--output-dir", str(tmp_path)]) == 130
    assert summary_of(tmp_path)["seed"] == 0
    assert "before the first round" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_host_placement_runs_like_any_other(tmp_path):
    small = ["--num-clients", "2", "--num-directions", "2", "--budget", "256", "--eval-every", "3", "--quiet"]
    losses = []
    for placement in ("host", "compile"):
        folder = tmp_path / placement
        assert cli.main(["run", *small, "--placement", placement, "--output-dir", str(folder)]) == 0
        losses.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_a_sweep_compares_step_sizes_on_validation_data(tmp_path, capsys):
    small = ["--num-clients", "2", "--num-directions", "2", "--budget", "256", "--eval-every", "1"]
    assert cli.main(["run", *small, "--seeds", "0,1", "--lr", "0.003,0.03", "--output-dir", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "validation acc. %" in err
    assert "test acc" not in err
    summary = summary_of(tmp_path)
    assert list(summary["runs"]) == ["step 0.003", "step 0.03"]
    assert summary["runs"]["step 0.03"]["seed"] == [0, 1]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {(row["run"], row["seed"]) for row in rows} == {
        (f"step {lr}", seed) for lr in (0.003, 0.03) for seed in (0, 1)
    }


@pytest.mark.slow
def test_clients_that_are_away_send_nothing(tmp_path):
    """Of 5 clients 3 and then 1 can come."""
    np.save(tmp_path / "trace.npy", np.array([[True] * 3 + [False] * 2, [False] * 4 + [True]]))
    options = [
        "--availability",
        str(tmp_path / "trace.npy"),
        "--num-rounds",
        "2",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert cli.main(["run", *options, "--quiet"]) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["uplink_bytes"] == summary["downlink_bytes"] == (3 + 1) * 3 * 192 * 4
    assert summary["num_requests"] == (3 + 1) * 4 * 10 * 4


def test_a_dry_run_shows_who_would_hold_what(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--dry-run", "--partition", "pathological:2", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["mean_classes"] == 2
    assert len([line for line in err.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"], ["3"], ["4"])]) == 5
    assert not list(tmp_path.iterdir())


def test_a_dry_run_draws_it_where_a_folder_is_named(tmp_path):
    assert cli.main(["run", "--dry-run", "--output-dir", str(tmp_path / "dry")]) == 0
    assert [file.name for file in (tmp_path / "dry").iterdir()] == ["partition.png"]


@pytest.mark.slow
def test_sigint_during_the_rounds_of_a_real_process(tmp_path):
    # A job in a shell's background inherits that SIGINT is ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from fedbbpt_jax.cli import main; raise SystemExit(main())"
    arguments = ["run", *SIZES, "--budget", "1000000000", "--eval-every", "1"]
    arguments += ["--output-dir", str(tmp_path), "--json", "-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    metrics = tmp_path / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 240
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no rounds within four minutes"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert {file.name for file in tmp_path.iterdir()} == FILES
    summary = summary_of(tmp_path)
    assert json.loads(out) == summary
    assert summary["stopped_by"] == "interrupted"
    assert summary["round"] >= 2
    assert summary["num_requests"] == 1600 * summary["round"]
