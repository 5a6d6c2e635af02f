"""Everything that can be wrong with an answer is seen, and counted by kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedbbpt_jax.black_box.client.answers import (
    LOG_PROBABILITIES,
    PROBABILITIES,
    SCORES,
    RejectedAnswerError,
    pack_scores,
    read_answer,
    unpack_scores,
    usable_rows,
)
from fedbbpt_jax.black_box.protocol import encode
from fedbbpt_jax.errors import ResponseFormatError

SHAPE = (2, 3, 4)


def message(scores=None, *, message_id="7", parameters=None, name="scores"):
    scores = np.arange(24, dtype=np.float32).reshape(SHAPE) if scores is None else scores
    return encode("outputs", {name: scores}, {"id": message_id, "parameters": parameters or {}})


def test_an_answer_arrives_bit_for_bit():
    sent = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    sent[0, 0] = [np.nan, -np.inf, -0.0, 1e-45]
    scores, fingerprint = read_answer(*message(sent, parameters={"system_fingerprint": "v1"}), "7", SHAPE)
    assert scores.tobytes() == sent.tobytes()
    assert fingerprint == "v1"
    assert unpack_scores(pack_scores(scores), SHAPE).tobytes() == sent.tobytes()


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("body", (b"", None)),
        ("body", (b"<html>", None)),
        ("body", (b"{}", None)),
        ("body", (message()[0][:-1], message()[1])),
        ("body", (message()[0] + b"0", message()[1])),
        ("body", (message()[0], message()[1] - 1)),
        ("body", (message()[0], 10**9)),
        ("id", message(message_id="8")),
        ("id", message(message_id=7)),
        ("id", message(message_id=None)),
        ("tensors", message(name="logits")),
        ("tensors", encode("outputs", {}, {"id": "7"})),
        ("tensors", encode("outputs", {"scores": np.zeros(SHAPE, "f"), "extra": np.zeros(1, "f")}, {"id": "7"})),
        ("datatype", message(np.zeros(SHAPE, np.float16))),
        ("datatype", message(np.zeros(SHAPE, np.int32))),
        ("shape", message(np.zeros((2, 3, 3), np.float32))),
        ("shape", message(np.zeros((3, 2, 4), np.float32))),
        ("shape", message(np.zeros((2, 2, 4), np.float32))),
        ("shape", message(np.zeros(24, np.float32))),
        ("fingerprint", message(parameters={"system_fingerprint": 3})),
        ("fingerprint", message(parameters={"system_fingerprint": "a" * 1000})),
    ],
)
def test_what_is_no_answer_is_rejected(kind, sent):
    with pytest.raises(RejectedAnswerError) as error:
        read_answer(*sent, "7", SHAPE)
    assert error.value.kind == kind


@settings(deadline=None)
@given(st.data())
def test_no_changed_byte_of_the_head_passes_as_another_shape(data):
    body, length = message()
    place = data.draw(st.integers(0, length - 1))
    changed = body[:place] + bytes([data.draw(st.integers(0, 255))]) + body[place + 1 :]
    try:
        scores, _ = read_answer(changed, length, "7", SHAPE)
    except RejectedAnswerError:
        return
    assert scores.shape == SHAPE


@pytest.mark.parametrize(
    ("row", "scale", "kind"),
    [
        ([-1, -2, np.nan, -3], SCORES, "nan"),
        ([-1, np.nan, np.inf, -9999], LOG_PROBABILITIES, "nan"),
        ([-1, -2, -np.inf, -3], SCORES, "infinite"),
        ([-1, -2, np.inf, -3], LOG_PROBABILITIES, "infinite"),
        ([-1, -2, -9999, -3], LOG_PROBABILITIES, "missing"),
        ([-1, -2, -9999, -3], SCORES, "missing"),
        ([-1, -2, 0.1, -3], LOG_PROBABILITIES, "too high"),
        ([0.1, 0.2, 1.1, 0.3], PROBABILITIES, "too high"),
        ([0.1, 0.2, -0.1, 0.3], PROBABILITIES, "too low"),
        ([0.1, 2e30, -0.1, 0.3], SCORES, "too high"),
    ],
)
def test_a_row_with_a_wrong_number_is_not_used(row, scale, kind):
    good = [0.0, 0.25, 0.5, 1.0] if scale == PROBABILITIES else [-1.0, -0.5, -2.0, 0.0]
    usable, counts = usable_rows(np.array([[good, row], [row, good]], np.float32), scale)
    assert usable.tolist() == [[True, False], [False, True]]
    assert counts == {kind: 2}


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (3, 5, 2), elements=st.floats(width=32) | st.just(-9999.0)),
    st.sampled_from([SCORES, LOG_PROBABILITIES, PROBABILITIES]),
)
def test_what_is_used_is_on_the_scale_and_the_rest_is_counted_once(scores, scale):
    usable, counts = usable_rows(scores, scale)
    kept = scores[usable]
    assert np.isfinite(kept).all()
    assert ((kept >= scale.low) & (kept <= scale.high) & (kept != -9999)).all()
    assert sum(counts.values()) == (~usable).sum()


@pytest.mark.parametrize(
    "payload", [b"", b"\0" * 11, pack_scores(np.zeros((2, 4, 3), "f")), pack_scores(np.zeros(SHAPE))[:-4]]
)
def test_what_was_kept_is_of_the_shape_that_is_asked(payload):
    with pytest.raises(ResponseFormatError, match="expected scores of shape"):
        unpack_scores(payload, SHAPE)
