"""RoBERTa with its masked-language-model head, and soft prompts for it.

A soft prompt stands right behind the first token `<s>`. Its P positions count as tokens: they are attended to, and the
text behind them moves up by P. (transformers, given embeddings instead of ids, numbers positions without regard to
padding; here padding is never counted.)

Source: Liu et al., 2019, "RoBERTa"; prompt placement and per-layer prefixes as in Sun et al., 2022, "BBTv2".
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from fedbbpt_jax.models.bert import BERT_SPELLINGS, BertEmbeddings
from fedbbpt_jax.models.checkpoint import Dialect
from fedbbpt_jax.models.layers import Config, Encoder, PostNormBlock, behind_first, gelu, layer_norm, linear

ROBERTA_DIALECT = Dialect(
    spellings=(*BERT_SPELLINGS, ("lm_head.transform.", "lm_head.")),
    # A tied head repeats the word embeddings and its own bias under other names.
    ignored=("roberta.pooler.", "roberta.embeddings.position_ids", "lm_head.decoder."),
)
ROBERTA_UNTIED_DIALECT = ROBERTA_DIALECT._replace(ignored=(*ROBERTA_DIALECT.ignored[:2], "lm_head.bias"))


class RobertaEncoder(nnx.Module):
    """Token ids, and a soft prompt behind the first of them, to states."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.pad_token_id = config.pad_token_id
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(PostNormBlock, config, rngs=rngs)

    def __call__(self, ids: Array, attended: Array, prompt: Array | None = None, deep: Array | None = None) -> Array:
        """Returns last hidden states `[B, P + T, E]`.

        Args:
          ids: int32 `[B, T]`, the first of each row `<s>`.
          attended: bool `[B, T]`, False hides padding.
          prompt: word embeddings `[B, P, E]`; none if left out (P = 0).
          deep: `[L, P, E]` or `[B, L, P, E]`, added to the P states before each of the L layers (BBTv2's prefixes).

        Raises:
          ValueError: prompt and text are longer than the model's positions.
        """
        words = self.embeddings.word_embeddings(ids)
        prompt = jnp.zeros((len(ids), 0, words.shape[-1])) if prompt is None else prompt
        num_prompt = prompt.shape[1]
        is_prompt = jnp.ones((len(ids), num_prompt), bool)
        counted = behind_first(ids != self.pad_token_id, is_prompt)
        positions = jnp.cumsum(counted, axis=1) * counted + self.pad_token_id
        longest = self.embeddings.position_embeddings.num_embeddings - self.pad_token_id - 1
        if counted.shape[1] > longest:
            raise ValueError(f"a prompt of {num_prompt} and a text of {ids.shape[1]} tokens exceed {longest} positions")
        states = self.embeddings(behind_first(words, prompt), positions)
        mask = behind_first(attended, is_prompt)[:, None, None]
        for index, layer in enumerate(self.encoder.layers):
            if deep is not None:
                states = states.at[:, 1 : 1 + num_prompt].add(deep[..., index, :, :])
            states = layer(states, mask)
        return states


class LMTransform(nnx.Module):
    """What stands between a state and its product with the words."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.dense = linear(width, width, rngs=rngs)
        self.layer_norm = layer_norm(width, config.layer_norm_eps, rngs=rngs)

    def __call__(self, states: Array) -> Array:
        """Returns `[..., E]` of states `[..., E]`."""
        return self.layer_norm(gelu(self.dense(states)))


class LMHead(nnx.Module):
    """States to scores of words; a tied head has no words but the embeddings of the input."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.transform = LMTransform(config, rngs=rngs)
        if config.tie_word_embeddings:
            self.bias = nnx.Param(jnp.zeros(config.vocab_size))
        else:
            self.decoder = linear(config.hidden_size, config.vocab_size, rngs=rngs)


class RobertaForMaskedLM(nnx.Module):
    """RoBERTa and its head over all words."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.tied = config.tie_word_embeddings
        self.roberta = RobertaEncoder(config, rngs=rngs)
        self.lm_head = LMHead(config, rngs=rngs)

    def __call__(self, ids: Array, attended: Array, prompt: Array | None = None, deep: Array | None = None) -> Array:
        """Returns scores of all words, float32 `[B, P + T, V]`; arguments as for `RobertaEncoder`."""
        words, bias = self.output_words()
        return self.lm_head.transform(self.roberta(ids, attended, prompt, deep)) @ words.T + bias

    def output_words(self) -> tuple[Array, Array]:
        """Returns what the head multiplies and adds: `[V, E]` and `[V]`."""
        if self.tied:
            return self.roberta.embeddings.word_embeddings.embedding[...], self.lm_head.bias[...]
        return self.lm_head.decoder.kernel[...].T, self.lm_head.decoder.bias[...]  # type: ignore[index]
