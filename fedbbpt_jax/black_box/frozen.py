"""A frozen classifier of prompted images, and the wall that makes it query-only.

The wall is what code can be held to, not a hard boundary: in-process Python cannot hide memory. What it does guarantee
is that no method differentiates through the model, by accident or by design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedbbpt_jax.models.clip import ImageClassifier, tokenize
from fedbbpt_jax.models.loading import PretrainedCLIP
from fedbbpt_jax.types import BlackBox, Query, Response


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("graphdef", "precision"))
@dataclass(frozen=True, repr=False)
class PromptedClassifier:
    """A frozen network that classifies images with a prompt added to their pixels and the sum clipped to [0, 1].

    A pytree whose leaves are the weights. It can be differentiated, which only white-box baselines may do; methods get
    `query_only` of it.
    """

    graphdef: nnx.GraphDef
    params: Any
    precision: str

    def __call__(self, query: Query, /) -> Response:
        """Returns scores of pixels `[C, B, H, W, 3]` under prompts `[C, K, H, W, 3]` or `[C, K, B, H, W, 3]`."""
        prompt = query.prompt if query.prompt.ndim == 6 else query.prompt[:, :, None]  # [C, K, B or 1, H, W, 3]
        pixels = jnp.clip(query.inputs[:, None] + prompt, 0.0, 1.0)  # [C, K, B, H, W, 3]
        with jax.default_matmul_precision(self.precision):
            model = nnx.merge(self.graphdef, self.params)
            scores = model(pixels.reshape(-1, *pixels.shape[3:]))  # [C*K*B, N]
        scores = scores.reshape(*pixels.shape[:3], -1)
        return Response(scores, jnp.isfinite(scores).all(-1))


def clip_classifier(clip: PretrainedCLIP, class_texts: Sequence[str], precision: str = "highest") -> PromptedClassifier:
    """Returns the zero-shot classifier among `class_texts`, whose features are computed here, once.

    Args:
      clip: a loaded CLIP; only its image tower is kept.
      class_texts: N texts, such as "the digit seven".
      precision: of matrix products: "highest", or "default", which lets accelerators round to tf32 or bfloat16.
    """
    model = nnx.merge(clip.graphdef, clip.params)
    class_features = model.encode_text(*tokenize(clip.tokenizer, list(class_texts)))
    graphdef, state = nnx.split(ImageClassifier(model, class_features, clip.mean, clip.std))
    return PromptedClassifier(graphdef, nnx.to_pure_dict(state), precision)


@partial(jax.tree_util.register_dataclass, data_fields=("_inner",), meta_fields=())
@dataclass(frozen=True, repr=False)
class QueryOnly:
    """A black box: answers queries and refuses to be differentiated. Made by `query_only`."""

    _inner: BlackBox

    def __call__(self, query: Query, /) -> Response:
        """Returns the response to `query`.

        Raises:
          TypeError: on differentiation through the answer, while tracing.
        """
        return _answer(self._inner, query)

    def __repr__(self) -> str:
        return "QueryOnly()"


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
