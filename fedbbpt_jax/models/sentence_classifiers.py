"""A frozen encoder of sentences as a classifier: the cosine between a text and the texts that describe the classes.

The prompt may stand in the sentences, or in the class texts; then sentences are embedded once, before any query, and a
query costs as many short texts as there are classes, however many sentences it is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fedbbpt_jax.models.bert import BertEncoder
from fedbbpt_jax.models.loading import PretrainedText, tokenize

SCALE = 20.0
"""What cosines are multiplied by, as sentence encoders are trained (Reimers and Gurevych, 2019, their public code)."""


class EncodedText(NamedTuple):
    """Texts: ids int32 `[B, T]`, and attended bool `[B, T]`, False at padding."""

    ids: Any
    attended: Any


class SentenceClassifier(nnx.Module):
    """Prompted sentences against fixed class texts."""

    def __init__(self, encoder: BertEncoder, class_texts: EncodedText):
        self.trunk = encoder
        self.class_embeddings = nnx.Variable(encoder.embed(*class_texts))

    def __call__(self, prompts: Array, texts: EncodedText) -> Array:
        """Returns scores, float32 `[B, N]`.

        Args:
          prompts: token ids `[B, P]`, or word embeddings `[B, P, E]`; they stand behind the first token.
          texts: B sentences.
        """
        embeddings = self.trunk.embed(texts.ids, texts.attended, as_embeddings(self.trunk, prompts))
        with jax.default_matmul_precision("highest"):
            return SCALE * embeddings @ self.class_embeddings[...].T

    @staticmethod
    def prompt_rank(prompts: Array) -> int:
        """Returns the number of axes of one prompt."""
        return 1 if jnp.issubdtype(prompts.dtype, jnp.integer) else 2


class SentenceEmbedder(nnx.Module):
    """Prompted sentences to their embeddings."""

    def __init__(self, encoder: BertEncoder):
        self.trunk = encoder

    def __call__(self, prompts: Array, texts: EncodedText) -> Array:
        """Returns unit embeddings, float32 `[B, E]`; arguments as for `SentenceClassifier`."""
        return self.trunk.embed(texts.ids, texts.attended, as_embeddings(self.trunk, prompts))

    @staticmethod
    def prompt_rank(prompts: Array) -> int:
        """Returns the number of axes of one prompt."""
        return 1 if jnp.issubdtype(prompts.dtype, jnp.integer) else 2


class LabelClassifier(nnx.Module):
    """Fixed sentence embeddings against prompted class texts."""

    def __init__(self, encoder: BertEncoder, class_texts: EncodedText):
        self.trunk = encoder
        self.class_ids, self.class_attended = (nnx.Variable(jnp.asarray(x)) for x in class_texts)

    def __call__(self, prompts: Array, sentences: Array) -> Array:
        """Returns scores, float32 `[M, B, N]`.

        Args:
          prompts: M of them, as for `SentenceClassifier`; each goes to all class texts.
          sentences: unit embeddings `[M, B, E]`.
        """
        ids, attended = self.class_ids[...], self.class_attended[...]
        num_prompts, num_classes = len(prompts), len(ids)

        def for_each_prompt(x: Array) -> Array:  # [N, T] -> [M*N, T]
            return jnp.tile(x, (num_prompts, 1))

        words = jnp.repeat(as_embeddings(self.trunk, prompts), num_classes, axis=0)
        embeddings = self.trunk.embed(for_each_prompt(ids), for_each_prompt(attended), words)
        with jax.default_matmul_precision("highest"):
            classes = embeddings.reshape(num_prompts, num_classes, -1)
            return SCALE * jnp.einsum("mbe,mne->mbn", sentences, classes)


def as_embeddings(encoder: Any, prompts: Array) -> Array:
    """Returns prompts as word embeddings `[..., P, E]`; those are what they are, token ids `[..., P]` are looked up."""
    if jnp.issubdtype(prompts.dtype, jnp.integer):
        return encoder.embeddings.word_embeddings(prompts)
    return prompts


def encode_class_texts(model: PretrainedText, texts: Sequence[str]) -> EncodedText:
    """Returns the texts that describe the classes, as the encoder takes them.

    Raises:
      ValueError: there are not two texts, or two are the same to the tokenizer.
    """
    encoded = EncodedText(*tokenize(model.tokenizer, texts)) if len(texts) > 1 else None
    if encoded is None or len(np.unique(encoded.ids, axis=0)) < len(texts):
        raise ValueError(f"expected different texts for at least two classes, got {list(texts)}")
    return encoded


def embed_sentences(model: PretrainedText, texts: EncodedText, chunk_size: int = 64) -> np.ndarray:
    """Returns unit embeddings, float32 `[n, E]`; the encoder is given `chunk_size` texts at a time."""
    encoder: Any = nnx.merge(model.graphdef, model.params)
    embed = nnx.jit(BertEncoder.embed)
    num = len(texts.ids)
    found = []
    for start in range(0, num, chunk_size):
        rows = np.minimum(np.arange(start, start + min(chunk_size, num)), num - 1)  # the last chunk is as large
        found.append(np.asarray(embed(encoder, jnp.asarray(texts.ids[rows]), jnp.asarray(texts.attended[rows]))))
    return np.concatenate(found)[:num]
