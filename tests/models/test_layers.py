import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_checkpoints import RANDOM, random_network

from fedbbpt_jax.models.layers import (
    ACTIVATIONS,
    Encoder,
    PatchEmbedding,
    PostNormBlock,
    PreNormBlock,
    SelfAttention,
    behind_first,
    causal_mask,
    linear,
    unit,
)

RNG = np.random.default_rng(0)
B, T, E = 6, 9, RANDOM["hidden_size"]
TOKENS = RNG.normal(size=(B, T, E)).astype(np.float32)
ATOL = 2e-5  # float32 sums of tens of terms of size 1
SIZES = SimpleNamespace(**RANDOM, hidden_act="gelu", layer_norm_eps=1e-5)


@pytest.fixture(autouse=True, scope="module")
def exact():
    """As the other tests of models, with whom these share compiled operations."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=[PreNormBlock, PostNormBlock])
def encoder(request) -> Encoder:
    return nnx.merge(*random_network(partial(Encoder, request.param), SIZES))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
    ],
    ids=["quick_gelu", "gelu"],
)
def test_activation_is_its_formula(name, reference):
    """Within float32 rounding; the two formulas differ by up to 0.02."""
    x = np.linspace(-6, 6, 61)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), [reference(v) for v in x], atol=1e-6)


def attend(layer: SelfAttention, x: np.ndarray, mask: np.ndarray, num_heads: int) -> np.ndarray:
    """Self-attention written out: one head, one example, one token at a time."""
    project = lambda p, x: x @ np.asarray(p.kernel[...]) + np.asarray(p.bias[...])  # noqa: E731
    query, key, value = (project(p, x) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    mixed = np.zeros_like(x)
    size = x.shape[-1] // num_heads
    for b, t, h in np.ndindex(x.shape[0], x.shape[1], num_heads):
        part = slice(h * size, (h + 1) * size)
        seen = np.flatnonzero(mask[b, 0, t])
        weights = np.exp(key[b, seen, part] @ query[b, t, part] / math.sqrt(size))
        mixed[b, t, part] = weights @ value[b, seen, part] / weights.sum()
    return project(layer.out_proj, mixed)


@pytest.mark.parametrize("masked", [False, True], ids=["everything", "causal-and-padded"])
def test_attention_matches_the_sum_written_out(masked):
    layer = SelfAttention(E, 3, rngs=nnx.Rngs(0))
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        projection.bias[...] = jnp.asarray(RNG.normal(size=E), jnp.float32)
    attended = np.arange(T) < np.array([[9], [7], [5], [3], [1], [8]])
    mask = np.asarray(causal_mask(T) & attended[:, None, None]) if masked else np.ones((B, 1, T, T), bool)
    ours = layer(TOKENS, mask if masked else None)
    np.testing.assert_allclose(ours, attend(layer, TOKENS, mask, num_heads=3), atol=ATOL)


def test_causal_mask_is_the_lower_triangle():
    mask = causal_mask(4)
    assert mask.shape == (1, 1, 4, 4)
    assert all(bool(mask[0, 0, t, s]) == (s <= t) for t, s in np.ndindex(4, 4))


def test_causal_encoder_does_not_look_ahead(encoder):
    changed = TOKENS.copy()
    changed[:, 3:] += 1
    before, after = (np.asarray(encoder(x, causal_mask(T))) for x in (TOKENS, changed))
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=ATOL)
    assert (np.abs(after[:, 3:] - before[:, 3:]).max(-1) > 1e-2).all()


def test_encoder_without_mask_looks_everywhere(encoder):
    changed = TOKENS.copy()
    changed[:, T - 1, 0] += 1  # one number only: a shift of all is undone by layer normalisation
    difference = np.abs(np.asarray(encoder(changed)) - np.asarray(encoder(TOKENS))).max(-1)
    assert (difference > 1e-4).all()


@pytest.mark.parametrize("use_bias", [False, True], ids=["no-bias", "bias"])
def test_patch_embedding_is_a_strided_convolution(use_bias):
    layer = PatchEmbedding(patch=4, width=6, use_bias=use_bias, rngs=nnx.Rngs(0))
    bias = RNG.normal(size=6).astype(np.float32) if use_bias else np.zeros(6)
    if use_bias:
        layer.bias[...] = jnp.asarray(bias)
    images = RNG.random((2, 12, 8, 3)).astype(np.float32)
    kernel = np.asarray(layer.kernel[...])
    expected = np.stack(
        [
            np.tensordot(images[:, y : y + 4, x : x + 4], kernel, axes=3)
            for y, x in [(0, 0), (0, 4), (4, 0), (4, 4), (8, 0), (8, 4)]
        ],
        axis=1,
    )  # rows first
    np.testing.assert_allclose(layer(images), expected + bias, atol=ATOL)


def test_what_is_inserted_stands_behind_the_first_token():
    text, inserted = np.arange(6).reshape(2, 3), np.array([[7, 8], [9, 10]])
    np.testing.assert_array_equal(
        behind_first(jnp.asarray(text), jnp.asarray(inserted)), [[0, 7, 8, 1, 2], [3, 9, 10, 4, 5]]
    )


def test_unit_vectors_are_float32_whatever_comes_in():
    vectors = unit(jnp.asarray(TOKENS, jnp.bfloat16))
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)  # float32


def test_a_bfloat16_kernel_multiplies_in_bfloat16_and_adds_in_float32():
    """The products of bfloat16 numbers are exact in float32; rounded to bfloat16, the sums would be off by 2^-8."""
    layer = linear(E, 7, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(layer.kernel[...].astype(jnp.bfloat16))
    layer.bias[...] = jnp.asarray(RNG.normal(size=7), jnp.float32)
    rounded = np.asarray(jnp.asarray(TOKENS, jnp.bfloat16), np.float32)
    expected = rounded @ np.asarray(layer.kernel[...], np.float32) + np.asarray(layer.bias[...])
    answer = layer(TOKENS)
    assert answer.dtype == jnp.float32
    np.testing.assert_allclose(answer, expected, atol=1e-6)  # float32
