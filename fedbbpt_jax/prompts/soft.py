r"""Soft prompts in few numbers: P embeddings $A z + p_0$ of z in d dimensions, A random and fixed.

$$p = p_0 + \sum_i z_i A_i, \qquad A_{ije} \sim (0, s^2), \qquad s = \alpha\, \mathrm{std} / (\sqrt d\, \sigma)$$

with std of the word embeddings and σ the optimizer's first step size, so that the first candidates are spread as words
are. BBT's two forms are two $p_0$: it either puts the prompt before its text ("cat"), or adds Az to the embeddings of
filler tokens that stand there ("add"); in both P positions stand behind the first token, and $p_0$ is what they hold at
z = 0.

**Where A is.** A has d·P·E numbers (25.6 million for RoBERTa-large, d = 500 and P = 50): too many to be a constant of
a compiled program, and to be drawn anew for each candidate. So the generator's prompt is z itself, and A belongs to the
client's end of the black box: `projected(box, projection)` is a box of z whose A is a leaf, which enters `jit` as an
argument, and one product serves all candidates of a chunk. A is never sent: all parties draw it from the same key and
compare a `fingerprint` of 32 bytes (public code draws it everywhere and hopes).

Source: Sun et al., 2022, "Black-Box Tuning for Language-Model-as-a-Service" (BBT), and 2022, "BBTv2: Towards a
Gradient-Free Future with Large Language Models" (a prompt for each layer), with the published code's s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fedbbpt_jax.estimators.spsa import check_positive
from fedbbpt_jax.models.classifiers import DeepPrompt, MaskedText
from fedbbpt_jax.models.loading import PretrainedText
from fedbbpt_jax.types import BlackBox, PromptGenerator, Query, Response

Entries = Callable[[Array, tuple[int, ...]], Array]
"""`(key, shape) -> numbers` of mean 0 and variance 1."""


class Projection(NamedTuple):
    """What makes prompts of z.

    Attributes:
      matrix: A, `[d, P, E]`, or one for each layer, `[L, d, P, E]`.
      offset: $p_0$, `[P, E]`.
    """

    matrix: Array
    offset: Array


def intrinsic(*shape: int) -> PromptGenerator:
    """Returns the generator whose parameters are z, zeros of a shape at first, and whose prompt is z.

    Args:
      *shape: d, or L and d for a prompt in each layer.

    Raises:
      ValueError: a size is not positive, or there is none.

    Example:
      >>> generator = intrinsic(500)
      >>> generator.generate(generator.init(jax.random.key(0)), jnp.zeros((1, 0))).shape
      (500,)
    """
    if min(shape, default=0) < 1:
        raise ValueError(f"expected positive sizes, got {shape}")
    return PromptGenerator(lambda key: jnp.zeros(shape), lambda params, features: params)


def normal_entries(key: Array, shape: tuple[int, ...]) -> Array:
    """Returns standard normal numbers, as the published code of BBT has them."""
    return jax.random.normal(key, shape)


def uniform_entries(key: Array, shape: tuple[int, ...]) -> Array:
    """Returns uniform numbers of variance 1; the paper on BBT prefers them to normal ones."""
    return jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5)


def draw_projection(
    key: Array,
    intrinsic_dim: int,
    offset: Array,
    spreads: Array,
    step_size: float,
    *,
    alpha: float = 1.0,
    entries: Entries = normal_entries,
) -> Projection:
    """Returns the projection that every party with this key and this model draws.

    Args:
      key: the parties'.
      intrinsic_dim: d.
      offset: `[P, E]`, what the positions hold at z = 0: `word_embeddings` of some tokens, or zeros.
      spreads: std of the word embeddings; or `[L]`, of them and of the states before each further layer (`spreads`).
      step_size: σ, the optimizer's first.
      alpha: α.
      entries: the distribution of A.

    Raises:
      ValueError: a size is not positive.

    Example:
      >>> projection = draw_projection(jax.random.key(0), 500, jnp.zeros((2, 8)), jnp.asarray(0.1), step_size=1.0)
      >>> projection.matrix.shape
      (500, 2, 8)
      >>> prompt = soft_prompt(projection, jax.random.normal(jax.random.key(1), (500,)))
      >>> prompt.std().round(1)
      Array(0.1, dtype=float32)
    """
    check_positive(intrinsic_dim=intrinsic_dim, step_size=step_size, alpha=alpha)
    spreads = jnp.asarray(spreads)
    std = alpha * spreads / (intrinsic_dim**0.5 * step_size)
    shape = (*spreads.shape, intrinsic_dim, *offset.shape)
    return Projection(std.reshape(*spreads.shape, 1, 1, 1) * entries(key, shape), jnp.asarray(offset))


def soft_prompt(projection: Projection, z: Array) -> Array | DeepPrompt:
    """Returns word embeddings `[..., P, E]` of z `[..., d]`, or a prompt for each layer of z `[..., L, d]`.

    In the first layer the prompt is words; before the others it is added to the states of the words' positions.
    """
    with jax.default_matmul_precision("highest"):
        if projection.matrix.ndim == 3:
            return projection.offset + jnp.einsum("...d,dpe->...pe", z, projection.matrix)
        layers = jnp.einsum("...ld,ldpe->...lpe", z, projection.matrix)
    return DeepPrompt(projection.offset + layers[..., 0, :, :], layers.at[..., 0, :, :].set(0.0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Projected:
    """A black box of z; the box inside is sent soft prompts. Made by `projected`."""

    box: BlackBox
    projection: Projection

    def __call__(self, query: Query, /) -> Response:
        """Returns the response to prompts z, `[C, K, d]` or `[C, K, B, d]`; with L before d for each layer."""
        return self.box(query._replace(prompt=soft_prompt(self.projection, query.prompt)))


def projected(box: BlackBox, projection: Projection) -> BlackBox:
    """Returns the client's end of a black box of soft prompts: a box whose prompts are z.

    Args:
      box: answers word embeddings `[C, K, P, E]`, such as `query_only(masked_lm_classifier(...))`.
      projection: the client's own copy of what all have drawn.

    Example:
      >>> box = jax.tree_util.Partial(lambda query: Response(query.prompt.sum((-2, -1)), jnp.array(True)))
      >>> projection = Projection(matrix=jnp.ones((3, 2, 4)), offset=jnp.zeros((2, 4)))
      >>> projected(box, projection)(Query(jnp.array([[[1.0, 2.0, 3.0]]]), None)).scores
      Array([[48.]], dtype=float32)
    """
    return Projected(box, projection)


def fingerprint(projection: Projection) -> Array:
    """Returns 8 numbers that tell projections apart, float32 `[8]`: products of A and $p_0$ with fixed vectors.

    They are compared with a tolerance (`check_fingerprint`), where a hash of the bytes would call two machines
    different that round the same normal numbers in another way.
    """
    flat = projection.matrix.reshape(-1, projection.offset.size)  # [(L*)d, P*E]
    left, right, base = jax.random.split(jax.random.key(0), 3)
    with jax.default_matmul_precision("highest"):
        right_products = flat @ jax.random.normal(right, (flat.shape[1], 4))
        of_matrix = jnp.einsum("ri,ri->i", jax.random.normal(left, (flat.shape[0], 4)), right_products)
        of_offset = projection.offset.reshape(-1) @ jax.random.normal(base, (flat.shape[1], 4))
    return jnp.concatenate([of_matrix, of_offset])


def check_fingerprint(projection: Projection, expected: np.ndarray | Array) -> None:
    """Raises ValueError where a projection is not the one that another party has the fingerprint of.

    The tolerance is 1e-3 of the size that the products of such a projection have, far above rounding (1e-6) and far
    below the difference of two draws (1). A single row that differs is found.
    """
    found, expected = np.asarray(fingerprint(projection)), np.asarray(expected)
    sizes = [jnp.linalg.norm(part.reshape(-1)) for part in projection]
    tolerance = 1e-3 * np.repeat(np.asarray(sizes), 4)
    if found.shape != expected.shape or not (np.abs(found - expected) <= tolerance).all():
        raise ValueError(
            f"another projection than the other party's: fingerprint {found.round(4).tolist()}, expected "
            f"{expected.round(4).tolist()}; check key, sizes, step size and model"
        )


def word_embeddings(model: PretrainedText) -> Array:
    """Returns the word embeddings of a RoBERTa or BERT, `[V, E]`; of RoBERTa's, rows 1000 to 1049 are BBT's fillers."""
    return model.params.get("roberta", model.params)["embeddings"]["word_embeddings"]["embedding"]


def spreads(model: PretrainedText, texts: MaskedText) -> Array:
    """Returns std of the word embeddings and of the states before each layer but the first, float32 `[L]`.

    One pass for each layer; those who may only query the model are told these L numbers.

    Args:
      model: a RoBERTa.
      texts: `[B, T]`, attended at places that count.
    """
    network: Any = nnx.merge(model.graphdef, model.params)
    layers = list(network.roberta.encoder.layers)
    found = [word_embeddings(model).std()]
    for index in range(1, len(layers)):
        network.roberta.encoder.layers = nnx.List(layers[:index])
        states = network.roberta(jnp.asarray(texts.ids), jnp.asarray(texts.attended))
        found.append(states[np.asarray(texts.attended)].std())
    return jnp.stack(found)
