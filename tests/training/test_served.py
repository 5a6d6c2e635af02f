"""The same run against a served model: over HTTP, through faults and kills, and again from its journal."""

import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from serving import listening, send

from fedbbpt_jax import cli
from fedbbpt_jax.black_box.frozen import query_only
from fedbbpt_jax.black_box.ledger.ledger import open_ledger
from fedbbpt_jax.black_box.rows import in_rows
from fedbbpt_jax.black_box.server.app import create_app
from fedbbpt_jax.black_box.server.http_faults import Faults, with_faults
from fedbbpt_jax.black_box.server.served_model import NUM_ROWS
from fedbbpt_jax.commands.serve import Serve, load_served_model, row_like
from fedbbpt_jax.errors import BudgetExceededError, QueryFailedError
from fedbbpt_jax.training import served
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.load import load_classifier, load_experiment_task
from fedbbpt_jax.training.prepare import prepare
from fedbbpt_jax.training.resolve import requests_per_round, resolve
from fedbbpt_jax.training.run import play, run

pytestmark = pytest.mark.slow
TINY = Experiment(num_clients=2, num_directions=2, local_steps=2, num_rounds=4, eval_every=2, dropout=0.1)
OPTIONS = [
    "--num-clients",
    "2",
    "--num-directions",
    "2",
    "--local-steps",
    "2",
    "--num-rounds",
    "4",
    "--eval-every",
    "2",
]
# A fifth of all queries fails.
FAULTS = Faults(rate_limited=0.1, server_error=0.05, reset=0.03, malformed=0.01, truncated=0.01)


class Killed(Exception):
    """Ends a run as a signal does that cannot be caught."""


@pytest.fixture(scope="module")
def model():
    return load_served_model(Serve(task="sensor"))


@pytest.fixture
def server(model):
    with listening(create_app(model)) as address:
        yield f"http://{address}"


def faulty(model, faults):
    app = create_app(model)
    return app, listening(with_faults(app, faults, app.state.count_fault))


def rows_and_params(outcome):
    rows = [{name: x for name, x in row.items() if not name.endswith("seconds")} for row in outcome.rows]
    return rows, [np.asarray(x).tobytes() for x in jax.tree.leaves(outcome.params)], outcome.summary["test_accuracy"]


def computed(app):
    """Returns the requests that a server has computed, by its own count."""
    text = send(app, ("GET", "/metrics", None, {}))[0].text
    return next(
        int(float(line.split()[1])) for line in text.splitlines() if line.startswith("fedbbpt_requests_computed_total")
    )


def test_a_served_run_is_the_run_in_process(server):
    found, here = run(replace(TINY, url=server)), run(TINY)
    assert found.rows[0]["loss"] == pytest.approx(here.rows[0]["loss"], abs=1e-6)
    assert found.rows[1]["loss"] == pytest.approx(here.rows[1]["loss"], abs=1e-4)
    assert found.summary["test_accuracy"] == pytest.approx(here.summary["test_accuracy"], abs=0.01)
    for name in ("num_requests", "num_valid", "uplink_bytes", "num_eval_requests"):
        assert found.summary[name] == here.summary[name]


def test_bit_for_bit_in_rows(server):
    """The box in this process, asked in the served shape; and a second served run."""
    e = resolve(replace(TINY, url=server))
    box = in_rows(
        query_only(load_classifier(e, load_experiment_task(e))), row_like(e, load_experiment_task(e)), NUM_ROWS
    )
    with open_ledger(None, "in process") as ledger:
        here = play(prepare(e, served.Served(box, ledger)), time.perf_counter(), lambda row: None, None)
    first, second = (run(replace(TINY, url=server)) for _ in range(2))
    assert rows_and_params(first) == rows_and_params(here)
    assert rows_and_params(second) == rows_and_params(first)


def test_faults_and_kills_change_nothing_and_cost_nothing(model, tmp_path):
    """Every query is answered in the end: the run is the undisturbed one, and each query was computed once."""
    with listening(create_app(model)) as address:
        expected = run(replace(TINY, url=f"http://{address}"))
    app, listener = faulty(model, FAULTS)
    with listener as address:
        e, seen = replace(TINY, url=f"http://{address}"), []

        def kill(row):
            seen.append(row)
            if len(seen) in (1, 4):
                raise Killed

        for _ in range(2):
            with pytest.raises(Killed):
                run(e, kill, tmp_path)
        found = run(e, folder=tmp_path)
        assert rows_and_params(found) == rows_and_params(expected)
        wanted = found.summary["num_requests"] + found.summary["num_eval_requests"]
        with open_ledger(tmp_path / served.JOURNAL, served._name_of_run(resolve(e))) as ledger:
            balance = ledger.balance()
            assert balance.answered == balance.charged
            assert balance.answered.num_requests == computed(app) <= wanted
            assert ledger.balance("training").charged.num_requests == found.summary["num_requests"]


def test_a_budget_is_never_exceeded(model, tmp_path, monkeypatch):
    """One request too few for the last evaluation: it is not sent."""
    whole = served.num_eval_requests
    monkeypatch.setattr(served, "num_eval_requests", lambda e, task: whole(e, task) - len(task.test.labels) - 1)
    app, listener = faulty(model, Faults())
    with listener as address:
        e = replace(TINY, url=f"http://{address}")
        e = replace(e, budget=e.num_rounds * requests_per_round(resolve(e)), dropout=0.0)
        with pytest.raises(BudgetExceededError):
            run(e, folder=tmp_path)
        limit = e.budget + served.num_eval_requests(resolve(e), load_experiment_task(resolve(e)))
        assert limit - 64 < computed(app) <= limit


def test_the_command_line_replays_and_tells_drift(model, tmp_path, capsys):
    _, listener = faulty(model, Faults(flip_after=20))
    with listener as address:
        arguments = ["run", "--url", f"http://{address}", *OPTIONS, "--quiet"]
        assert cli.main([*arguments, "--output-dir", str(tmp_path / "drift")]) == 5
        assert "the model was" in capsys.readouterr().err
    with listening(create_app(model)) as address:
        arguments[2] = f"http://{address}"
        assert cli.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 0
    assert cli.main(["replay", str(tmp_path / "run")]) == 0  # the server is gone
    assert "the same, bit for bit" in capsys.readouterr().err
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"round": 4', '"round": 5'))
    assert cli.main(["replay", str(tmp_path / "run"), "--quiet"]) == 6
    journal = next(Path(tmp_path / "run").rglob("journal"))
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(content)
    assert cli.main(["replay", str(tmp_path / "run"), "--quiet"]) == 6
    assert "damaged" in capsys.readouterr().err


def test_a_dry_run_asks_nobody(capsys):
    assert cli.main(["run", "--url", "http://127.0.0.1:9", *OPTIONS, "--dry-run"]) == 0
    assert "for evaluation, " in capsys.readouterr().err


def test_where_nobody_answers():
    with pytest.raises(QueryFailedError):
        run(replace(TINY, url="http://127.0.0.1:9"))


def test_a_run_in_process_has_nothing_to_replay(tmp_path, capsys):
    assert cli.main(["run", *OPTIONS, "--quiet", "--output-dir", str(tmp_path / "run")]) == 0
    assert cli.main(["replay", str(tmp_path / "run")]) == 6
    assert "journal" in capsys.readouterr().err
