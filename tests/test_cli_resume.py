"""A run that was killed goes on: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fedbbpt_jax import cli

SIZES = ["--num-clients", "2", "--num-directions", "2", "--local-steps", "2", "--chunk-size", "8", "--quiet"]
ROUNDS = ["--num-rounds", "24", "--eval-every", "2"]
CODE = "import sys; from fedbbpt_jax.cli import main; raise SystemExit(main())"


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CODE, "run", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def num_rows(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_rows(process, folder, number):
    deadline = time.monotonic() + 240
    while num_rows(folder) < number and process.poll() is None:
        assert time.monotonic() < deadline, "no rounds within four minutes"
        time.sleep(0.02)


def results(folder):
    """Returns all that a run has found, without how long it took."""

    def without_times(row):
        return {name: value for name, value in row.items() if not name.endswith("seconds")}

    rows = [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = without_times(json.loads((folder / "summary.json").read_text()))
    return rows, summary, (folder / "prompt.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """Ten runs, each killed where it has one row more; the last is let go."""
    assert cli.main(["run", *SIZES, *ROUNDS, "--output-dir", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "killed"
    process = start(*SIZES, *ROUNDS, "--output-dir", folder)
    for number in range(1, 11):
        wait_for_rows(process, folder, number)
        time.sleep(0.03 * (number % 4))  # in an evaluation, in rounds, in a checkpoint
        process.kill()
        process.communicate()
        assert not (folder / "summary.json").exists()
        process = start("--resume", folder, "--quiet")
    assert process.wait(timeout=300) == 0, process.communicate()
    process.communicate()
    assert results(folder) == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_terminate_is_an_interrupt(tmp_path, capsys):
    process = start(*SIZES, "--budget", "1000000000", "--eval-every", "1", "--output-dir", tmp_path)
    wait_for_rows(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped_by"] == "interrupted"
    steps = [int(path.name) for path in (tmp_path / "state" / "seed-0" / "run-0" / "checkpoints").iterdir()]
    assert max(steps) == summary["round"] >= 2


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--seeds", "0..2"], "{}", "no other option can be given"),
        ([], None, "holds no run to resume"),
        ([], "{}", "config.json is not what a run has written"),
        ([], '{"asked": {"experiment": {"text": 3}}}', "config.json is not what a run has written"),
    ],
)
def test_what_cannot_be_resumed(tmp_path, capsys, arguments, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert cli.main(["run", "--resume", str(tmp_path), *arguments, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
