"""What a probe finds of boxes that were given a character."""

import ml_dtypes
import numpy as np
import pytest

from fedbbpt_jax.black_box.probe import CONCURRENCIES, probe, quantum
from fedbbpt_jax.types import Response

RNG = np.random.default_rng(0)
PROMPTS, INPUTS = RNG.normal(size=(8, 3)).astype("f"), RNG.normal(size=(8, 3)).astype("f")


def curve(query):
    """Scores `[C, K, B, 3]`, float32."""
    moved = query.prompt[:, :, None] + query.inputs[:, None]
    return (moved + 0.3 * np.sin(moved)).astype("f")


def as_it_is(scores, query):
    return scores


def box_of(change, is_valid=lambda scores: np.ones(scores.shape[:3], bool)):
    def box(query):
        scores = change(curve(query), query)
        return Response(scores, is_valid(scores))

    return box


def test_an_exact_box_has_nothing_to_tell():
    found = probe(box_of(as_it_is), PROMPTS, INPUTS)
    assert (found.noise, found.num_distinct, found.alone_or_together, found.order, found.unusable) == (0, 1, 0, 0, 0)
    assert found.quantum < 1e-6
    assert found.concurrency in CONCURRENCIES


def test_noise_is_found_and_measured():
    rng = np.random.default_rng(1)
    found = probe(box_of(lambda scores, _: scores + rng.normal(0, 0.1, scores.shape).astype("f")), PROMPTS, INPUTS)
    assert found.num_distinct == 8
    assert 0.1 < found.noise < 0.3  # the largest of 24 deviations of 8 draws each
    assert found.alone_or_together > 0.1


def test_company_and_order_are_found():
    crowded = probe(box_of(lambda scores, query: scores + 1e-3 * query.prompt.shape[1]), PROMPTS, INPUTS)
    assert crowded.alone_or_together == pytest.approx(7e-3, rel=1e-2)
    assert crowded.order == crowded.noise == 0
    place = np.arange(8, dtype="f")[None, :, None, None] / 100
    placed = probe(box_of(lambda scores, _: scores + place[:, : scores.shape[1]]), PROMPTS, INPUTS)
    assert placed.order == pytest.approx(7e-2, rel=1e-3)


def test_what_is_not_usable_is_counted():
    """The first two places of every message."""

    def is_valid(scores):
        return np.broadcast_to(np.arange(scores.shape[2]) > 1, scores.shape[:3])

    assert probe(box_of(as_it_is, is_valid), PROMPTS, INPUTS).unusable == pytest.approx(2 / 8)


def test_the_queries_are_different_and_about_fifty():
    """So that a server with a memory answers none of them from there."""
    seen, rows = set(), []

    def box(query):
        for prompts, inputs in zip(query.prompt, query.inputs, strict=True):
            seen.add(prompts.tobytes() + inputs.tobytes())
            rows.append(len(prompts) * len(inputs))
        return Response(curve(query), np.ones((*query.prompt.shape[:2], query.inputs.shape[1]), bool))

    found = probe(box, PROMPTS, INPUTS)
    assert len(seen) == len(rows)
    assert found.num_requests == sum(rows)
    assert 40 <= found.num_evaluations == sum(rows) / 8 <= 60


@pytest.mark.parametrize("decimals", range(7))
def test_decimals_are_found(decimals):
    scores = np.round(RNG.normal(0, 0.4, 500), decimals).astype("f")
    assert quantum(scores) == pytest.approx(10.0**-decimals)


def test_short_types_are_found():
    scores = RNG.normal(0, 5, 300)
    largest = np.abs(scores).max()
    assert quantum(scores.astype(ml_dtypes.bfloat16).astype("f")) == pytest.approx(largest / 256, rel=0.01)
    assert quantum(scores.astype(np.float16).astype("f")) == pytest.approx(largest / 2048, rel=0.01)
    assert quantum(scores.astype("f")) < 2e-6


def test_too_few_examples():
    with pytest.raises(ValueError, match="got 8 and 7"):
        probe(box_of(as_it_is), PROMPTS, INPUTS[:7])
