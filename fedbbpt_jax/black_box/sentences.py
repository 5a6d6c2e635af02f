"""Frozen sentence encoders as black boxes: the prompt in the sentences, or in the texts that describe the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedbbpt_jax.black_box.frozen import Precision, PromptedClassifier, frozen
from fedbbpt_jax.models.loading import PretrainedText
from fedbbpt_jax.models.sentence_classifiers import (
    LabelClassifier,
    SentenceClassifier,
    SentenceEmbedder,
    encode_class_texts,
)
from fedbbpt_jax.types import Query, Response


def sentence_classifier(
    model: PretrainedText, class_texts: Sequence[str], precision: Precision = "highest"
) -> PromptedClassifier:
    """Returns the classifier of prompted sentences by which of `class_texts` they are nearest to.

    Its queries hold prompts as token ids `[C, K, P]` or word embeddings `[C, K, P, E]`, and `EncodedText` inputs
    `[C, B, T]`; the prompt stands behind the first token.

    Args:
      model: a loaded BERT.
      class_texts: N texts, such as "world news"; they are embedded here, once, without a prompt.
      precision: of the frozen trunk.

    Raises:
      ValueError: the texts are not different ones for at least two classes.
    """
    encoder: Any = nnx.merge(model.graphdef, model.params)
    return frozen(SentenceClassifier(encoder, _on_device(model, class_texts)), precision)


def sentence_embedder(model: PretrainedText, precision: Precision = "highest") -> PromptedClassifier:
    """Returns an encoder as a function of queries, whose scores are unit embeddings; as `sentence_classifier`."""
    return frozen(SentenceEmbedder(nnx.merge(model.graphdef, model.params)), precision)


@partial(jax.tree_util.register_dataclass, data_fields=("classifier",), meta_fields=())
@dataclass(frozen=True, repr=False)
class PromptedLabels:
    """A frozen classifier of sentence embeddings as a function of queries. Made by `label_classifier`."""

    classifier: PromptedClassifier

    def __call__(self, query: Query, /) -> Response:
        """Returns scores of embeddings `[C, B, E]` under prompts `[C, K, P]` or `[C, K, P, E]`.

        Raises:
          ValueError: prompts are of other clients, or depend on the sentence.
        """
        box, (num_clients, num_candidates) = self.classifier, query.prompt.shape[:2]
        model: Any = nnx.merge(box.graphdef, box.params)
        is_ids = jnp.issubdtype(query.prompt.dtype, jnp.integer)
        if query.prompt.ndim != (3 if is_ids else 4) or num_clients != len(query.inputs):
            raise ValueError(
                f"expected a prompt [C, K, P] or [C, K, P, E] for {len(query.inputs)} clients, got {query.prompt.shape}"
            )
        prompts = query.prompt.reshape(num_clients * num_candidates, *query.prompt.shape[2:])
        sentences = jnp.repeat(jnp.asarray(query.inputs), num_candidates, axis=0)  # [C*K, B, E]
        with jax.default_matmul_precision("highest" if box.precision == "highest" else "default"):
            scores = model(prompts, sentences)
        scores = scores.reshape(num_clients, num_candidates, *scores.shape[1:])
        return Response(scores, jnp.isfinite(scores).all(-1))


def label_classifier(
    model: PretrainedText, class_texts: Sequence[str], precision: Precision = "highest"
) -> PromptedLabels:
    """Returns the classifier of sentence embeddings by which of the prompted `class_texts` they are nearest to.

    Its queries hold prompts as token ids `[C, K, P]` or word embeddings `[C, K, P, E]`, which stand behind the first
    token of every class text, and embeddings `[C, B, E]` of sentences (`embed_sentences`), made once before.

    Args:
      model: a loaded BERT.
      class_texts: N texts, such as "world news".
      precision: of the frozen trunk.

    Raises:
      ValueError: as for `sentence_classifier`.
    """
    encoder: Any = nnx.merge(model.graphdef, model.params)
    return PromptedLabels(frozen(LabelClassifier(encoder, encode_class_texts(model, class_texts)), precision))


def _on_device(model: PretrainedText, class_texts: Sequence[str]) -> Any:
    return jax.tree.map(jnp.asarray, encode_class_texts(model, class_texts))
