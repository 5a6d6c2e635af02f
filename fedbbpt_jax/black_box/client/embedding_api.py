"""How servers of language models are asked to go on with embeddings in place of texts: soft prompts for decoders.

| interface | what it takes | made by |
|---|---|---|
| vLLM's completions, started with `--enable-prompt-embeds` | tensors as PyTorch writes them | `prompt_embeds` |
| SGLang's own, started with `--disable-radix-cache` | lists of numbers | `input_embeds` |

Both are asked by `connect_texts`, whose `render` puts a soft prompt among a text's embeddings (`among_embeddings`).

Source: vLLM, "Prompt embedding inputs"; SGLang, "Sampling parameters", `input_embeds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedbbpt_jax.black_box.client.text_api import TextApi, completions, sglang
from fedbbpt_jax.models.sentence_classifiers import EncodedText


def prompt_embeds(
    model: str,
    encode: Callable[[np.ndarray], str],
    num_top: int = 5,
    most_texts: int = 16,
    options: Mapping[str, Any] | None = None,
) -> TextApi:
    """Returns vLLM's interface `/v1/completions` for embeddings.

    Args:
      model: its name at the server.
      encode: float32 `[T, E]` to the base64 text of what `torch.save` writes of it, the same one each time. This
        package does without PyTorch: `lambda x: base64.b64encode(saved(torch.from_numpy(x))).decode()`.
      num_top: tokens whose log-probabilities are asked for.
      most_texts: in one message.
      options: more entries of the request, such as `{"logprob_token_ids": [...]}`.

    Example:
      >>> api = prompt_embeds("m", lambda x: f"{x.shape} in base64")
      >>> api.request([np.ones((7, 16), np.float32)])["prompt_embeds"]
      ['(7, 16) in base64']
    """
    api = completions(model, num_top, most_texts, options)

    def request(embedded: Sequence[np.ndarray]) -> dict[str, Any]:
        body = api.request([])
        del body["prompt"]
        return body | {"prompt_embeds": [encode(x) for x in embedded]}

    return api._replace(request=request)


def input_embeds(model: str, token_ids: Sequence[int], most_texts: int = 16) -> TextApi:
    """Returns SGLang's interface `/generate` for embeddings.

    Args:
      model: its name at the server.
      token_ids: N, of the label words, in their order; of the model's own tokenizer.
      most_texts: in one message.

    Example:
      >>> input_embeds("m", [7, 9]).request([np.array([[0.5, 1.0]], np.float32)])["input_embeds"]
      [[[0.5, 1.0]]]
    """
    api = sglang(model, token_ids, most_texts)

    def request(embedded: Sequence[np.ndarray]) -> dict[str, Any]:
        body = api.request([])
        del body["text"]
        return body | {"input_embeds": [x.tolist() for x in embedded]}

    return api._replace(request=request)


def among_embeddings(words: np.ndarray) -> Callable[[np.ndarray, EncodedText], np.ndarray]:
    """Returns a `render` that puts a soft prompt `[P, E]` behind the first token of a text, float32 `[T, E]` in all.

    Args:
      words: the model's word embeddings `[V, E]`, such as the tensor `model.embed_tokens.weight` of its safetensors.

    Example:
      >>> words = np.arange(8, dtype=np.float32).reshape(4, 2)
      >>> text = EncodedText(np.array([1, 3, 0]), np.array([True, True, False]))
      >>> among_embeddings(words)(np.array([[0.5, 0.5]]), text).tolist()
      [[2.0, 3.0], [0.5, 0.5], [6.0, 7.0]]
    """

    def render(prompt: np.ndarray, text: EncodedText) -> np.ndarray:
        embedded = words[np.asarray(text.ids)[np.asarray(text.attended)]]
        return np.concatenate([embedded[:1], prompt, embedded[1:]]).astype(np.float32)

    return render
