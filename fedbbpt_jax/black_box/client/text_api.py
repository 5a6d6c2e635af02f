"""How servers with the interface of OpenAI's are asked to go on with texts, and where their log-probabilities stand.

Source: OpenAI, "API reference", `/v1/chat/completions` and `/v1/completions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedbbpt_jax.black_box.client.answers import MISSING, RejectedAnswerError

Tops = list[tuple[str, float]]
"""First tokens that were likely, and their log-probabilities, nats."""

_LARGEST = 1e30


class TextApi(NamedTuple):
    """How a model is asked to go on with texts. Made by `chat` or `completions`.

    Attributes:
      model: its name at the server.
      path: that is asked.
      most_texts: in one message.
      request: `texts -> body`.
      tops: `(body of an answer, number of texts) -> likely first tokens of each`; raises `RejectedAnswerError`.
    """

    model: str
    path: str
    most_texts: int
    request: Callable[[Sequence[str]], dict[str, Any]]
    tops: Callable[[Any, int], list[Tops]]


def chat(model: str, num_top: int = 20, options: Mapping[str, Any] | None = None) -> TextApi:
    """Returns the interface `/v1/chat/completions`: one text in a message, as the user's.

    Args:
      model: its name at the server.
      num_top: tokens whose log-probabilities are asked for; servers allow up to 20.
      options: more entries of the request, such as `{"seed": 0}`.

    Example:
      >>> sorted(chat("m").request(["It was"]))
      ['logprobs', 'max_tokens', 'messages', 'model', 'temperature', 'top_logprobs']
    """
    fixed = {"model": model, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": num_top}

    def request(texts: Sequence[str]) -> dict[str, Any]:
        return {**fixed, **(options or {}), "messages": [{"role": "user", "content": texts[0]}]}

    def tops(body: Any, num_texts: int) -> list[Tops]:
        (choice,) = _choices(body, num_texts)
        if choice.get("finish_reason") == "content_filter":
            return [[]]
        try:
            return [
                [(str(t["token"]), _number(t["logprob"])) for t in choice["logprobs"]["content"][0]["top_logprobs"]]
            ]
        except (KeyError, IndexError, TypeError) as error:
            raise RejectedAnswerError("logprobs", "the answer has no log-probabilities") from error

    return TextApi(model, "/v1/chat/completions", 1, request, tops)


def completions(
    model: str, num_top: int = 5, most_texts: int = 128, options: Mapping[str, Any] | None = None
) -> TextApi:
    """Returns the interface `/v1/completions`: many texts in a message, all candidates of an example together.

    Args:
      model: its name at the server.
      num_top: tokens whose log-probabilities are asked for; OpenAI allows 5, others more.
      most_texts: in one message.
      options: more entries of the request.

    Example:
      >>> completions("m").request(["It was", "All was"])["prompt"]
      ['It was', 'All was']
    """
    fixed = {"model": model, "max_tokens": 1, "temperature": 0, "logprobs": num_top}

    def request(texts: Sequence[str]) -> dict[str, Any]:
        return {**fixed, **(options or {}), "prompt": list(texts)}

    def tops(body: Any, num_texts: int) -> list[Tops]:
        try:
            found = [choice["logprobs"]["top_logprobs"][0] for choice in _choices(body, num_texts)]
            return [[(str(token), _number(value)) for token, value in top.items()] for top in found]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RejectedAnswerError("logprobs", "the answer has no log-probabilities") from error

    return TextApi(model, "/v1/completions", most_texts, request, tops)


def word_score(word: str, tops: Tops) -> float:
    """Returns log Σ p over the tokens that are a word, with and without a space before it; `MISSING` if none is.

    Args:
      word: such as " great".
      tops: of one text.

    Example:
      >>> tops = [(" yes", math.log(0.5)), ("yes", math.log(0.25)), ("no", -2.0)]
      >>> round(math.exp(word_score("yes", tops)), 6)
      0.75
    """
    found = [value for token, value in tops if token.strip() == word.strip() and value != MISSING]
    wrong = [value for value in found if not math.isfinite(value)]
    if wrong or not found:
        return wrong[0] if wrong else MISSING
    return max(found) + math.log(sum(math.exp(value - max(found)) for value in found))


def _choices(body: Any, num_texts: int) -> list[dict[str, Any]]:
    """Returns one choice for each text, in the order of the texts."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise RejectedAnswerError("choices", "the answer has no choices")
    by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
    if len(choices) != num_texts or set(by_index) != set(range(num_texts)):
        raise RejectedAnswerError("choices", f"expected a choice for each of {num_texts} texts, got {len(choices)}")
    return [by_index[index] for index in range(num_texts)]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RejectedAnswerError("logprobs", "a log-probability is no number")
    return math.copysign(math.inf, value) if abs(value) > _LARGEST else float(value)
