import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedbbpt_jax.models.layers import ACTIVATIONS, Encoder, PatchEmbedding, SelfAttention, causal_mask

RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(2, 5, 12)).astype(np.float32)  # [B, T, E]
ATOL = 2e-5  # float32 sums of tens of terms of size 1


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(2, 12, 3, 20, "gelu", 1e-5, rngs=nnx.Rngs(0))


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
    layer = SelfAttention(12, 3, rngs=nnx.Rngs(0))
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        projection.bias[...] = jnp.asarray(RNG.normal(size=12), jnp.float32)
    attended = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    mask = np.asarray(causal_mask(5) & attended[:, None, None]) if masked else np.ones((2, 1, 5, 5), bool)
    with jax.default_matmul_precision("highest"):
        ours = layer(TOKENS, mask if masked else None)
    np.testing.assert_allclose(ours, attend(layer, TOKENS, mask, num_heads=3), atol=ATOL)


def test_causal_mask_is_the_lower_triangle():
    mask = causal_mask(4)
    assert mask.shape == (1, 1, 4, 4)
    assert all(bool(mask[0, 0, t, s]) == (s <= t) for t, s in np.ndindex(4, 4))


def test_causal_encoder_does_not_look_ahead(encoder):
    changed = TOKENS.copy()
    changed[:, 3:] += 1
    before, after = (np.asarray(encoder(x, causal_mask(5))) for x in (TOKENS, changed))
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=ATOL)
    assert (np.abs(after[:, 3:] - before[:, 3:]).max(-1) > 1e-2).all()


def test_encoder_without_mask_looks_everywhere(encoder):
    changed = TOKENS.copy()
    changed[:, 4, 0] += 1  # one number only: a shift of all is undone by layer normalisation
    difference = np.abs(np.asarray(encoder(changed)) - np.asarray(encoder(TOKENS))).max(-1)
    assert (difference > 1e-4).all()


def test_patch_embedding_is_a_strided_convolution():
    layer = PatchEmbedding(patch=4, width=6, rngs=nnx.Rngs(0))
    images = RNG.random((2, 12, 8, 3)).astype(np.float32)
    kernel = np.asarray(layer.kernel[...])
    expected = np.stack(
        [
            np.tensordot(images[:, y : y + 4, x : x + 4], kernel, axes=3)
            for y, x in [(0, 0), (0, 4), (4, 0), (4, 4), (8, 0), (8, 4)]
        ],
        axis=1,
    )  # rows first
    np.testing.assert_allclose(layer(images), expected, atol=ATOL)
