"""A run that was killed goes on: real processes, real signals."""

import json
import multiprocessing
import signal
import time
from multiprocessing import forkserver

import pytest

from fedbbpt_jax import cli

SIZES = ["--num-clients", "2", "--num-directions", "2", "--local-steps", "2", "--chunk-size", "8", "--quiet"]
ROUNDS = ["--num-rounds", "24", "--eval-every", "2"]
SLOW_TO_IMPORT = ["fedbbpt_jax.cli", "sklearn.model_selection", "transformers.models.clip.image_processing_pil_clip"]


@pytest.fixture(scope="module")
def start():
    """Starts runs in processes of their own, forked from one that has imported everything and computed nothing.

    They compile in haste.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        forkserver.ensure_running()

    def started(*arguments):
        process = context.Process(target=run, args=(["run", *map(str, arguments)],))
        process.start()
        return process

    return started


def run(arguments):
    raise SystemExit(cli.main(arguments))


def num_rows(folder):
    try:
        return (folder / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:  # a resumed run writes all rows anew
        return 0


def wait_for_rows(process, folder, number):
    deadline = time.monotonic() + 240
    while num_rows(folder) < number and process.is_alive():
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
def test_killed_again_and_again(start, tmp_path):
    """Ten runs, each killed where it has one row more; the last is let go."""
    whole = start(*SIZES, *ROUNDS, "--output-dir", tmp_path / "whole")
    folder = tmp_path / "killed"
    process = start(*SIZES, *ROUNDS, "--output-dir", folder)
    for number in range(1, 11):
        wait_for_rows(process, folder, number)
        time.sleep(0.03 * (number % 4))  # in an evaluation, in rounds, in a checkpoint
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
        process = start("--resume", folder, "--quiet")
    for finished in (process, whole):
        finished.join(300)
        assert finished.exitcode == 0
    assert results(folder) == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_terminate_is_an_interrupt(start, tmp_path):
    process = start(*SIZES, "--budget", "1000000000", "--eval-every", "1", "--output-dir", tmp_path)
    wait_for_rows(process, tmp_path, 3)
    process.terminate()
    process.join(120)
    assert process.exitcode == 130
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
