"""What a whole experiment compiles, and the memory that it needs."""

import logging

import jax
import numpy as np
import pytest

from fedbbpt_jax.errors import DeviceMemoryError
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.prepare import prepare
from fedbbpt_jax.training.resolve import resolve
from fedbbpt_jax.training.run import advice_on_memory, run


def test_one_compilation_for_all_cohorts_and_segments(caplog):
    """Three of seven clients a round, some of whom stay away; segments of 2, 2 and 1 rounds."""
    sizes = {"num_directions": 3, "local_steps": 2, "batch_size": 3}
    choices = {"num_clients": 7, "cohort": 3, "dropout": 0.3, "num_rounds": 5, "eval_every": 2}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        assert run(Experiment(**sizes, **choices)).summary["round"] == 5
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation of jit(run_rounds)" in r.getMessage()]
    assert len(compiled) == 1


def test_too_little_memory_is_an_advice():
    e = resolve(Experiment(chunk_size=16))
    with pytest.raises(DeviceMemoryError, match=r"16 candidates of 4 examples .* --chunk-size 8"), advice_on_memory(e):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), advice_on_memory(e):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.slow
@pytest.mark.parametrize(("cohort", "num_directions"), [(50, 50), (500, 5)])
def test_memory_hardly_grows_with_the_number_of_candidates(cohort, num_directions):
    """5,000 candidates against 500, by more directions or by more clients; promised is 1.2 times."""

    def peak(cohort, num_directions):
        sizes = {"num_clients": 500, "cohort": cohort, "num_directions": num_directions, "partition": "iid"}
        s = prepare(Experiment(**sizes, budget=10**9, num_rounds=1))
        lowered = s.programs.run_rounds.lower(s.rounds_box, s.server, s.clients, s.key, np.zeros(1, np.int32))
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    assert peak(cohort, num_directions) < 1.1 * peak(50, 5)
