"""Frozen networks with a head: a prompt and an input to class scores.

A classifier is a module that is called with prompts and inputs, both `[B, ...]`, and returns scores, float32 `[B, N]`.
What does not depend on the prompt (class features, the words of a verbaliser) is computed when it is made. Its `trunk`
may run at a lower precision; what follows is always float32, because zeroth-order methods divide small differences of
scores by small perturbations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fedbbpt_jax.models.clip import CLIP
from fedbbpt_jax.models.layers import unit
from fedbbpt_jax.models.loading import PixelFormat, tokenize
from fedbbpt_jax.models.roberta import RobertaForMaskedLM


class ImageClassifier(nnx.Module):
    """The image tower of a CLIP, scoring prompted pixels against fixed class features; no text tower comes along."""

    def __init__(self, clip: CLIP, class_features: Array, pixels: PixelFormat):
        self.trunk = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.logit_scale = clip.logit_scale
        self.class_features = nnx.Variable(class_features)
        self.mean = nnx.Variable(jnp.asarray(pixels.mean))
        self.std = nnx.Variable(jnp.asarray(pixels.std))

    def __call__(self, prompts: Array, images: Array) -> Array:
        """Returns exp(logit_scale)·cosine, float32 `[B, N]`.

        Args:
          prompts: in pixel units `[B, H, W, 3]`, added to the images; the sum is clipped to [0, 1].
          images: float in [0, 1] or uint8, `[B, H, W, 3]`.
        """
        prompted = jnp.clip(as_float(images) + prompts, 0.0, 1.0)
        pooled = self.trunk((prompted - self.mean[...]) / self.std[...])
        with jax.default_matmul_precision("highest"):
            features = unit(self.visual_projection(pooled))
            return jnp.exp(self.logit_scale[...]) * features @ self.class_features[...].T

    @staticmethod
    def prompt_rank(prompts: Array) -> int:
        """Returns the number of axes of one prompt."""
        del prompts
        return 3


class MaskedText(NamedTuple):
    """Texts with one mask token each: ids int32 `[B, T]`, and attended bool `[B, T]`, False at padding."""

    ids: Any
    attended: Any


class DeepPrompt(NamedTuple):
    """A soft prompt with a part in each layer.

    Attributes:
      words: word embeddings `[B, P, E]`.
      layers: `[B, L, P, E]`, added to the states of the P positions before each of the L layers.
    """

    words: Any
    layers: Any


class VerbalizedClassifier(nnx.Module):
    """A masked language model that scores label words at the mask: all other words are left out of the head."""

    def __init__(self, model: RobertaForMaskedLM, word_ids: np.ndarray, mask_token_id: int):
        words, bias = model.output_words()
        self.mask_token_id = mask_token_id
        self.trunk = model.roberta
        self.transform = model.lm_head.transform
        self.label_words = nnx.Variable(words[word_ids])
        self.label_bias = nnx.Variable(bias[word_ids])

    def __call__(self, prompts: Array | DeepPrompt, texts: MaskedText) -> Array:
        """Returns the language model's scores of the label words, float32 `[B, N]`; NaN for a text without a mask.

        Args:
          prompts: token ids `[B, P]`, word embeddings `[B, P, E]` or a `DeepPrompt`; they stand behind the first token.
          texts: each with one mask, not at the first token.
        """
        words, layers = prompts if isinstance(prompts, DeepPrompt) else (prompts, None)
        if jnp.issubdtype(words.dtype, jnp.integer):
            words = self.trunk.embeddings.word_embeddings(words)
        states = self.trunk(texts.ids, texts.attended, words, layers)
        is_mask = texts.ids == self.mask_token_id
        at_mask = states[jnp.arange(len(states)), jnp.argmax(is_mask, axis=-1) + words.shape[1]]
        with jax.default_matmul_precision("highest"):
            scores = self.transform(at_mask) @ self.label_words[...].T + self.label_bias[...]
        return jnp.where(is_mask.any(-1, keepdims=True), scores, jnp.nan)

    @staticmethod
    def prompt_rank(prompts: Array) -> int:
        """Returns the number of axes of one prompt; of its words, where it has parts."""
        return 1 if jnp.issubdtype(prompts.dtype, jnp.integer) else 2


def class_features(clip: CLIP, tokenizer: Any, class_names: Sequence[str], templates: Sequence[str]) -> Array:
    """Returns unit text features of the classes, float32 `[N, E]`: the mean over the templates, scaled to length 1.

    Source: Radford et al., 2021, section 3.1.4 (prompt ensembling).

    Args:
      clip: encodes the texts.
      tokenizer: of the same checkpoint.
      class_names: N names.
      templates: each with one `{}` for the name.

    Raises:
      ValueError: there is no class or template, a template has not exactly one `{}`, a text is longer than the model's
        positions, or the model cannot tell two names apart.
    """
    if not class_names or not templates:
        raise ValueError(f"expected class names and templates, got {list(class_names)} and {list(templates)}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template must hold one {{}} for the class name, got {template!r}")
    encode = nnx.jit(CLIP.encode_text)
    per_template = [
        encode(clip, *map(jnp.asarray, tokenize(tokenizer, [template.replace("{}", name) for name in class_names])))
        for template in templates
    ]
    features = unit(jnp.stack(per_template).mean(0))
    _check_told_apart(np.asarray(features), class_names)
    return features


def _check_told_apart(features: np.ndarray, class_names: Sequence[str]) -> None:
    seen: dict[bytes, str] = {}
    for name, row in zip(class_names, features, strict=True):
        other = seen.setdefault(row.tobytes(), name)
        if other != name:
            raise ValueError(
                f"the model gives the classes {other!r} and {name!r} the same features: either its tokenizer knows "
                "neither word, or no text holds its eos_token_id"
            )


def label_word_ids(tokenizer: Any, label_words: Sequence[str]) -> np.ndarray:
    """Returns the token of each label word, int32 `[N]`.

    Args:
      tokenizer: of transformers.
      label_words: N words as they stand in the text, with the space before them, such as (" terrible", " great").

    Raises:
      ValueError: a word is empty or not one token (the pieces are named), or two words are the same token.
    """
    if not all(label_words) or not label_words:
        raise ValueError(f"expected a label word for each class, got {list(label_words)}")
    pieces = [tokenizer.encode(word, add_special_tokens=False) for word in label_words]
    for word, ids in zip(label_words, pieces, strict=True):
        if len(ids) != 1:
            spaced = "" if word.startswith(" ") else f"; did you mean {' ' + word!r}, with the space before it?"
            raise ValueError(
                f"the label word {word!r} is {len(ids)} tokens {tokenizer.convert_ids_to_tokens(ids)}, "
                f"but the model fills one mask{spaced}"
            )
    if len({ids[0] for ids in pieces}) < len(pieces):
        raise ValueError(f"the label words {list(label_words)} are not different tokens")
    return np.asarray(pieces, np.int32)[:, 0]


def as_float(images: Array) -> Array:
    """Returns images in [0, 1]; uint8 ones are divided by 255."""
    return images / jnp.float32(255) if images.dtype == jnp.uint8 else images
