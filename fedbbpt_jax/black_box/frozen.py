"""Frozen classifiers of prompted inputs, and the wall that makes them query-only.

The wall is what code can be held to, not a hard boundary: in-process Python cannot hide memory, and whoever takes the
box apart as a pytree finds the weights, which `jit` needs as arguments. What it does guarantee is that nothing public
gives them away and that no method differentiates through the model, by accident or by design. The hard boundary is a
served box in another process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from fedbbpt_jax.models.classifiers import ImageClassifier, VerbalizedClassifier, class_features, label_word_ids
from fedbbpt_jax.models.loading import PretrainedCLIP, PretrainedText
from fedbbpt_jax.types import BlackBox, Query, Response

Precision = Literal["highest", "default", "bfloat16"]
"""Of matrix products: exact float32; the backend's own choice (tf32 or bfloat16 passes on accelerators); or a bfloat16
trunk that accumulates in float32. Heads, and everything between two products, stay in float32."""


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("graphdef", "precision"))
@dataclass(frozen=True, repr=False)
class PromptedClassifier:
    """A frozen classifier (`models/classifiers.py`) as a function of queries.

    A pytree whose leaves are the weights. It can be differentiated, which only white-box baselines may do; methods get
    `query_only` of it.
    """

    graphdef: nnx.GraphDef
    params: Any
    precision: Precision

    def __call__(self, query: Query, /) -> Response:
        """Returns scores of inputs `[C, B, ...]` under prompts `[C, K, ...]` or `[C, K, B, ...]`.

        Raises:
          ValueError: prompt and inputs are not of the same clients and examples.
        """
        model: Any = nnx.merge(self.graphdef, self.params)
        words = jax.tree.leaves(query.prompt)[0]  # of a prompt in parts the first tells the axes of all
        per_example = words.ndim == 3 + model.prompt_rank(words)
        prompts = query.prompt if per_example else jax.tree.map(lambda x: x[:, :, None], query.prompt)
        num_clients, batch = jax.tree.leaves(query.inputs)[0].shape[:2]
        axes = num_clients, words.shape[1], batch
        if words.shape[0] != num_clients or (per_example and words.shape[2] not in (1, batch)):
            raise ValueError(
                f"expected a prompt [C, K, ...] or [C, K, B, ...] for {num_clients} clients and {batch} examples, got "
                f"{words.shape}"
            )

        def flat(x):  # [C, K, B, ...] -> [C*K*B, ...]
            return jnp.broadcast_to(x, (*axes, *x.shape[3:])).reshape(math.prod(axes), *x.shape[3:])

        inputs = jax.tree.map(lambda x: flat(jnp.asarray(x)[:, None]), query.inputs)
        with jax.default_matmul_precision("highest" if self.precision == "highest" else "default"):
            scores = model(jax.tree.map(flat, prompts), inputs).reshape(*axes, -1)
        return Response(scores, jnp.isfinite(scores).all(-1))


def clip_classifier(
    clip: PretrainedCLIP,
    class_names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    precision: Precision = "highest",
) -> PromptedClassifier:
    """Returns the zero-shot classifier of images among `class_names`, whose features are computed here, once.

    Its queries hold prompts `[C, K, H, W, 3]` or `[C, K, B, H, W, 3]` in pixel units, which are added to the images
    `[C, B, H, W, 3]` (float in [0, 1], or uint8); the sum is clipped to [0, 1].

    Args:
      clip: a loaded CLIP; only its image tower is kept.
      class_names: N names, such as "seven".
      templates: such as ("the digit {}",); the features of several are averaged.
      precision: of the frozen trunk.

    Raises:
      ValueError: a template has not exactly one `{}`, or a text is longer than the model's positions.
    """
    model = nnx.merge(clip.graphdef, clip.params)
    with jax.default_matmul_precision("highest"):
        features = class_features(model, clip.tokenizer, class_names, templates)
    return frozen(ImageClassifier(model, features, clip.pixels), precision)


def masked_lm_classifier(
    model: PretrainedText, label_words: Sequence[str], precision: Precision = "highest"
) -> PromptedClassifier:
    """Returns the classifier of texts by which of `label_words` a masked language model puts at the mask.

    Its queries hold prompts as token ids `[C, K, P]`, word embeddings `[C, K, P, E]` or a `DeepPrompt` of such, and
    `MaskedText` inputs `[C, B, T]`; the prompt stands behind the first token.

    Args:
      model: a loaded RoBERTa.
      label_words: N words, each one token, with the space before them, such as (" terrible", " great").
      precision: of the frozen trunk.

    Raises:
      ValueError: a label word is not one token, or two are the same.
    """
    word_ids = label_word_ids(model.tokenizer, label_words)
    masked_lm: Any = nnx.merge(model.graphdef, model.params)
    return frozen(VerbalizedClassifier(masked_lm, word_ids, model.tokenizer.mask_token_id), precision)


def frozen(classifier: nnx.Module, precision: Precision = "highest") -> PromptedClassifier:
    """Returns a classifier (`models/classifiers.py`) as a function of queries, its trunk at `precision`."""
    graphdef, state = nnx.split(classifier)
    params = nnx.to_pure_dict(state)
    if precision == "bfloat16":
        flat: dict[tuple, Any] = traverse_util.flatten_dict(params)
        params = traverse_util.unflatten_dict(
            {p: x.astype(jnp.bfloat16) if p[0] == "trunk" and p[-1] == "kernel" else x for p, x in flat.items()}
        )
    return PromptedClassifier(graphdef, params, precision)


class QueryOnly:
    """A black box: answers queries and refuses to be differentiated or pickled. Made by `query_only`."""

    __slots__ = ("_inner",)

    def __init__(self, inner: BlackBox):
        self._inner = inner

    def __call__(self, query: Query, /) -> Response:
        """Returns the response to `query`.

        Raises:
          TypeError: on differentiation through the answer, while tracing.
        """
        return _answer(self._inner, query)

    def __repr__(self) -> str:
        return "QueryOnly()"

    def __copy__(self) -> QueryOnly:
        return self

    def __deepcopy__(self, memo: dict) -> QueryOnly:
        return self

    def __reduce__(self):
        raise TypeError("a black box cannot be pickled: its weights stay where they are")


jax.tree_util.register_pytree_node(QueryOnly, lambda box: ((box._inner,), None), lambda _, parts: QueryOnly(*parts))


def query_only(classifier: BlackBox) -> BlackBox:
    """Returns `classifier` behind the wall: the same answers, and a `TypeError` for whoever asks for a gradient.

    Args:
      classifier: a pytree, so that its weights enter `jit` as arguments (a function: by `jax.tree_util.Partial`).

    Example:
      >>> box = query_only(jax.tree_util.Partial(lambda query: Response(query.prompt.sum(), jnp.array(True))))
      >>> try:
      ...     jax.grad(lambda p: box(Query(p, None)).scores)(jnp.ones(3))
      ... except TypeError as error:
      ...     print(error)
      a black box answers queries only: it has no gradient
    """
    return QueryOnly(classifier)


@jax.custom_jvp
def _answer(classifier: BlackBox, query: Query) -> Response:
    return classifier(query)


@_answer.defjvp
def _refuse(primals, tangents):
    raise TypeError("a black box answers queries only: it has no gradient")
