"""Two real processes with two meshes' halves on this machine: the same results as one, and an end when one dies."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from fedbbpt_jax import cli

ARGUMENTS = [
    "run",
    "--num-clients",
    "4",
    "--budget",
    "1920",
    "--eval-every",
    "1",
    "--chunk-size",
    "8",
    "--quiet",
]  # 3 rounds


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(port, process_id, folder, *arguments):
    """Returns a process with one device, whose messages go to `folder`.err."""
    program = [sys.executable, "-c", "import sys; from fedbbpt_jax.cli import main; sys.exit(main())"]
    processes = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(process_id)]
    where = ["--output-dir", str(folder)]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [*program, *ARGUMENTS, *arguments, *processes, *where]
    with folder.with_suffix(".err").open("w") as messages:
        return subprocess.Popen(command, stderr=messages, env=environment)


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "wall_seconds"} for row in rows]


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    port = free_port()
    both = [start(port, i, tmp_path / f"of-{i}") for i in (0, 1)]
    messages = [tmp_path / f"of-{i}.err" for i in (0, 1)]
    assert [process.wait(300) for process in both] == [0, 0], [file.read_text() for file in messages]
    assert not (tmp_path / "of-1").exists()  # process 0 writes for all
    assert cli.main([*ARGUMENTS, "--output-dir", str(tmp_path / "alone")]) == 0
    together, alone = rows_of(tmp_path / "of-0"), rows_of(tmp_path / "alone")
    assert len(together) == len(alone) == 4
    for a, b in zip(together, alone, strict=True):
        assert a.pop("loss") == pytest.approx(b.pop("loss"), abs=1e-5)
        assert a == b


@pytest.mark.slow
def test_the_others_end_when_a_process_dies(tmp_path):
    port = free_port()
    survivor, victim = (start(port, i, tmp_path / f"of-{i}", "--budget", "1000000") for i in (0, 1))
    metrics = tmp_path / "of-0" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert survivor.poll() is None, (tmp_path / "of-0.err").read_text()
        time.sleep(0.5)
    victim.kill()
    victim.wait()
    assert survivor.wait(60) != 0  # a hang would end here
    assert "another process was lost" in (tmp_path / "of-0.err").read_text()


@pytest.mark.parametrize("missing", ["--coordinator", "--num-processes", "--process-id"])
def test_half_a_description_is_refused(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"--coordinator": "localhost:1", "--num-processes": "2", "--process-id": "0"}
    given.pop(missing)
    assert cli.main(["run", *(word for pair in given.items() for word in pair)]) == 2
    assert "--coordinator, --num-processes and --process-id belong together" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
