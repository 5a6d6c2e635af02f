"""BERT as an encoder of sentences: the mean of the last states of their tokens.

Source: Devlin et al., 2019, "BERT"; Reimers and Gurevych, 2019, "Sentence-BERT" (mean pooling).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from fedbbpt_jax.models.checkpoint import Dialect
from fedbbpt_jax.models.layers import Config, Encoder, PostNormBlock, behind_first, layer_norm, unit

BERT_SPELLINGS = (
    ("embeddings.layer_norm.", "embeddings.LayerNorm."),
    ("encoder.layers.", "encoder.layer."),
    ("layer_norm1.", "attention.output.LayerNorm."),
    ("layer_norm2.", "output.LayerNorm."),
    ("self_attn.q_proj.", "attention.self.query."),
    ("self_attn.k_proj.", "attention.self.key."),
    ("self_attn.v_proj.", "attention.self.value."),
    ("self_attn.out_proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
BERT_DIALECT = Dialect(
    prefix="bert.", spellings=BERT_SPELLINGS, ignored=("pooler.", "cls.", "classifier.", "embeddings.position_ids")
)


class BertEmbeddings(nnx.Module):
    """Word, position and (only the first) token-type embeddings, normalised."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.word_embeddings = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.layer_norm = layer_norm(width, config.layer_norm_eps, rngs=rngs)

    def __call__(self, words: Array, positions: Array) -> Array:
        """Returns `[B, T, E]` of word embeddings `[B, T, E]` at positions int32 `[B, T]` or `[T]`.

        Raises:
          ValueError: there are more tokens than positions.
        """
        num_positions = self.position_embeddings.num_embeddings
        if words.shape[-2] > num_positions:
            raise ValueError(f"{words.shape[-2]} tokens are more than the model's {num_positions} positions")
        first_type = self.token_type_embeddings.embedding[...][0]
        return self.layer_norm(words + self.position_embeddings(positions) + first_type)


class BertEncoder(nnx.Module):
    """Token ids to states and to sentence embeddings."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(PostNormBlock, config, rngs=rngs)

    def __call__(self, ids: Array, attended: Array, prompt: Array | None = None) -> Array:
        """Returns last hidden states `[B, P + T, E]`.

        Args:
          ids: int32 `[B, T]`, the first of each row `[CLS]`.
          attended: bool `[B, T]`, False hides padding.
          prompt: word embeddings `[B, P, E]`, right behind the first token; none if left out (P = 0).

        Raises:
          ValueError: prompt and text are longer than the model's positions.
        """
        words = self.embeddings.word_embeddings(ids)
        if prompt is not None:
            words = behind_first(words, prompt)
            attended = behind_first(attended, jnp.ones(prompt.shape[:2], bool))
        return self.encoder(self.embeddings(words, jnp.arange(words.shape[1])), attended[:, None, None])

    def embed(self, ids: Array, attended: Array, prompt: Array | None = None) -> Array:
        """Returns unit sentence embeddings, float32 `[B, E]`: the mean over the attended tokens, the prompt's too."""
        num_prompt = 0 if prompt is None else prompt.shape[1]
        weights = behind_first(attended, jnp.ones((len(ids), num_prompt), bool))[..., None]
        return unit((weights * self(ids, attended, prompt)).sum(1))
