import contextlib
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedbbpt_jax.black_box.protocol import decode, encode, named_leaves, tree_like
from fedbbpt_jax.errors import ResponseFormatError

DTYPES = ("<f4", "<f2", "<i8", "<i4", "u1", "?")
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


class Text(NamedTuple):
    ids: np.ndarray
    attended: np.ndarray


def message(**changes) -> tuple[bytes, int]:
    """Returns a message of one tensor x of two float32, whose entry is changed."""
    entry = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}} | changes
    head = json.dumps({"inputs": [entry]}).encode()
    return head + np.ones(2, np.float32).tobytes(), len(head)


@given(st.dictionaries(st.text(max_size=5), ARRAYS, max_size=3))
def test_what_was_sent_arrives_bit_for_bit(tensors):
    body, length = encode("inputs", tensors, {"id": "7"})
    found, head = decode("inputs", body, length)
    assert head["id"] == "7"
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes()


@given(st.data())
def test_a_shortened_or_lengthened_message_is_refused(data):
    body, length = encode("outputs", {"scores": np.ones((2, 3), np.float32), "n": np.ones(1, np.int32)})
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(ResponseFormatError):
        decode("outputs", body[:cut], min(length, cut))
    with pytest.raises(ResponseFormatError):
        decode("outputs", body + b"\0", length)


@given(st.binary(max_size=60), st.integers(-2, 70))
def test_any_bytes_are_refused_by_name_or_read(body, length):
    with contextlib.suppress(ResponseFormatError):
        decode("inputs", body, length)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["shape", "binary_data_size"]), inner)
        ),
        max_leaves=8,
    ),
    st.sampled_from(["name", "shape", "datatype", "parameters", "data"]),
)
def test_any_entry_is_refused_by_name_or_read(value, name):
    body, length = message(**{name: value})
    with contextlib.suppress(ResponseFormatError):
        decode("inputs", body, length)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [3]}, "is 12 bytes, got 8 of 8"),
        ({"shape": [-2]}, "no shape"),
        ({"shape": [1] * 9}, "no shape"),
        ({"datatype": "BYTES"}, "must be one of FP32"),
        ({"name": 3}, "no name"),
        ({"parameters": {}, "data": [1]}, "expected 2 numbers"),
        ({"parameters": {}, "data": ["a", "b"]}, "expected 2 numbers"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said(changes, words):
    with pytest.raises(ResponseFormatError, match=words):
        decode("inputs", *message(**changes))


def test_numbers_may_be_json():
    head = {"inputs": [{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[0.5, 1], [2, 3]]}]}
    found, _ = decode("inputs", json.dumps(head).encode())
    np.testing.assert_array_equal(found["x"], np.array([[0.5, 1], [2, 3]], np.float32))
    assert found["x"].dtype == np.float32


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_json_has_no_numbers_that_are_none(constant):
    head = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [%s]}]}' % constant.encode()
    with pytest.raises(ResponseFormatError, match=constant):
        decode("inputs", head)


def test_integers_do_not_overflow_in_silence():
    head = {"inputs": [{"name": "x", "shape": [1], "datatype": "UINT8", "data": [256]}]}
    with pytest.raises(ResponseFormatError, match="not uint8"):
        decode("inputs", json.dumps(head).encode())


def test_a_name_comes_once():
    entry = {"name": "x", "shape": [0], "datatype": "FP32", "data": []}
    with pytest.raises(ResponseFormatError, match="twice"):
        decode("inputs", json.dumps({"inputs": [entry, entry]}).encode())


def test_a_type_that_is_not_carried_is_refused():
    with pytest.raises(ValueError, match="must be one of FP32"):
        encode("inputs", {"x": np.ones(1, np.complex64)})


@pytest.mark.parametrize("tree", [np.arange(3), {"a": np.arange(2), "b": (np.ones(1), np.zeros(2))}])
def test_a_tree_is_found_again(tree):
    found = tree_like("inputs", tree, named_leaves("inputs", tree))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(a, b)


def test_leaves_are_called_by_their_fields():
    text = Text(np.arange(2), np.ones(2))
    assert list(named_leaves("inputs", text)) == ["inputs.ids", "inputs.attended"]
    with pytest.raises(ResponseFormatError, match=r"'inputs\.attended', got inputs\.ids"):
        tree_like("inputs", text, {"inputs.ids": np.arange(2)})
