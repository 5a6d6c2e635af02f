"""Chunk sizes are known, remembered or timed, in that order."""

import json
from functools import partial

import jax
import pytest
from conftest import linear_box, vector_generator

from fedbbpt_jax.federated.averaging import weighted_mean
from fedbbpt_jax.objectives import cross_entropy
from fedbbpt_jax.training import chunk_size
from fedbbpt_jax.training.chunk_size import DEFAULT, SIZES, cache_file, choose_chunk_size, measure_examples_in_flight
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.prepare import prepare
from fedbbpt_jax.types import Method

BOX = jax.tree_util.Partial(linear_box)
METHOD = Method(vector_generator(4), cross_entropy, None, weighted_mean())


@pytest.fixture
def seconds(monkeypatch, tmp_path):
    """Pretended seconds for each size; the sizes that were timed are noted."""
    monkeypatch.setenv("FEDBBPT_CACHE", str(tmp_path / "cache"))
    timed, per_size = [], {size: size * 1e-3 for size in SIZES}

    def pretend(box, method, examples, size):
        timed.append(size)
        if isinstance(per_size[size], Exception):
            raise per_size[size]
        return per_size[size]

    monkeypatch.setattr(chunk_size, "seconds_of_answers", pretend)
    return per_size, timed


def choose(vectors, model="a model of one's own", batch_size=4):
    return choose_chunk_size(model, BOX, METHOD, vectors, batch_size)


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ((1, 2, 4, 8, 16, 32), 4096),
        ((1, 1.04, 9, 9, 9, 9), 4),
        ((1, 1.06, 1.1, 9, 9, 9), 16),
        ((1, 2, 4, 1, 9, 9), 64),
    ],
)
def test_sizes_grow_while_that_pays(seconds, vectors, rates, best):
    seconds[0].update({size: 1e-5 * size / rate for size, rate in zip(SIZES, rates, strict=True)})
    assert measure_examples_in_flight(BOX, METHOD, vectors) == best


def test_what_takes_long_is_not_tried_larger(seconds, vectors):
    """A large model on a CPU: the next size would take seconds for nothing."""
    seconds[0].update({4: 0.3, 16: 0.6, 64: 0.7})
    assert measure_examples_in_flight(BOX, METHOD, vectors) == 16
    assert seconds[1] == [4, 16]


def test_sizes_that_do_not_fit_are_not_chosen(seconds, vectors):
    seconds[0].update({16: 1e-3, 64: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")})
    assert measure_examples_in_flight(BOX, METHOD, vectors) == 16
    seconds[0][64] = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure_examples_in_flight(BOX, METHOD, vectors)


def test_a_model_is_timed_once(seconds, vectors):
    per_size, timed = seconds
    per_size.update({16: 1e-3})
    assert [choose(vectors), choose(vectors, batch_size=8), choose(vectors, batch_size=100)] == [4, 2, 1]
    assert timed == [4, 16, 64]
    choose(vectors._replace(inputs=vectors.inputs[:, :3]))
    assert len(timed) > 3, "other inputs need a measurement of their own"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": "b"}', '{"a": 0}'])
def test_a_damaged_memory_is_measured_anew(seconds, vectors, content):
    cache_file().parent.mkdir()
    cache_file().write_text(content)
    assert choose(vectors) == 1
    assert list(json.loads(cache_file().read_text()).values()) == [4]


def test_where_nothing_can_be_remembered_all_agree(seconds, vectors, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDBBPT_CACHE", str(tmp_path / "file"))
    assert choose(vectors) == DEFAULT // 4
    assert seconds[1] == []


def test_the_shipped_model_is_known_and_an_option_overrides(seconds):
    assert prepare(Experiment()).experiment.chunk_size == 16
    assert prepare(Experiment(batch_size=16)).experiment.chunk_size == 4
    assert prepare(Experiment(chunk_size=3)).experiment.chunk_size == 3
    assert seconds[1] == []


def test_time_is_that_of_a_real_query(vectors):
    assert 0 < chunk_size.seconds_of_answers(BOX, METHOD, vectors, size=100) < 10
    broken = jax.tree_util.Partial(partial(linear_box))
    assert measure_examples_in_flight(broken, METHOD, vectors) in SIZES
