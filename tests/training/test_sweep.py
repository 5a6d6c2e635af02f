"""Runs in one program are the runs alone: the same draws, the first round to the rounding of sums."""

from dataclasses import replace

import numpy as np
import pytest

from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.run import run
from fedbbpt_jax.training.sweep import run_together

pytestmark = pytest.mark.slow
BASE = Experiment(budget=800, eval_every=1, num_clients=3, num_directions=2)  # 192 requests a round, 4 rounds
CHOICES = [replace(BASE, seed=seed, lr=lr) for seed in (0, 1) for lr in (0.003, 0.03)]


@pytest.fixture(scope="module")
def together():
    rows = []
    return run_together(CHOICES, lambda i, row: rows.append((i, row["round"]))), rows


def test_rows_come_for_all_runs_after_each_segment(together):
    assert together[1] == [(i, number) for number in range(5) for i in range(4)]


@pytest.mark.parametrize("i", range(4))
def test_each_run_is_the_run_alone(together, i):
    found, alone = together[0][i], run(CHOICES[i])
    assert found.experiment == alone.experiment
    for a, b in zip(found.rows[:2], alone.rows[:2], strict=True):  # before and after the first round
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    same = ("num_requests", "num_evaluations", "num_valid", "round", "uplink_bytes", "num_eval_requests", "stopped_by")
    assert {name: found.summary[name] for name in same} == {name: alone.summary[name] for name in same}
    assert found.summary["zero_shot_accuracy"] == pytest.approx(alone.summary["zero_shot_accuracy"])
    np.testing.assert_allclose(found.params["picture"], alone.params["picture"], atol=2e-3)


def test_runs_differ_among_each_other(together):
    params = [np.asarray(outcome.params["picture"]) for outcome in together[0]]
    assert all(not np.allclose(params[i], params[j]) for i in range(4) for j in range(i))


def test_other_differences_are_refused():
    with pytest.raises(ValueError, match="may differ in their seed and step size only"):
        run_together([BASE, replace(BASE, num_directions=3)], lambda i, row: None)


def test_clients_in_shards_are_refused():
    spread = replace(BASE, num_clients=8, placement="shard")
    with pytest.raises(ValueError, match="need placement compile, got shard"):
        run_together([spread, replace(spread, seed=1)], lambda i, row: None)
